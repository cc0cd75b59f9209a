"""From a config to a student's teacher: keys of `teacher` and `distill` checked, network opened, loss built."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from fsmde_jax import distributed, geometry
from fsmde_jax.data.records import Records
from fsmde_jax.data.teacher_maps import TeacherCache, open_cache
from fsmde_jax.distillation import BINS, SHIFTS, Distillation, Needs, needs
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.losses import baselines, relational, total
from fsmde_jax.losses.total import DistillWeights
from fsmde_jax.models import depth_bins, registry
from fsmde_jax.models.projector import Projector
from fsmde_jax.models.teacher_head import TeacherBins
from fsmde_jax.models.teacher_images import LONGER_SIDE, PATCH, teacher_size
from fsmde_jax.names import check_name
from fsmde_jax.teacher import Teacher, open_teacher, weight_hash

FEATURE_STRIDE = 8  # of the student's features that are compared with a teacher's
SUPERVISED_ONLY = "--config.distill.w_ckd=0 --config.distill.w_vr=0 --config.distill.baseline="


def check_distillation(flat: dict[str, Any]) -> None:
    """Checks the keys of `distill` and `teacher` (by their dotted names) for a student; opens nothing.

    Raises:
      ConfigError: naming the key and what was expected.
    """
    for key in ("w_ckd", "w_prob", "w_cross", "w_vr", "w_baseline", "tau_bin"):
        if flat[f"distill.{key}"] < 0:
            raise ConfigError(f"distill.{key} = {flat[f'distill.{key}']}: expected 0 or more")
    for key in ("tau", "tau_r"):
        if not flat[f"distill.{key}"] > 0:
            raise ConfigError(f"distill.{key} = {flat[f'distill.{key}']}: expected a temperature above 0")
    check_name("distill.bins", flat["distill.bins"], BINS)
    check_name("distill.shift", flat["distill.shift"], SHIFTS)
    check_name("distill.relation", flat["distill.relation"], total.RELATIONS)
    check_name("distill.center", flat["distill.center"], relational.CENTERS)
    check_name("teacher.dtype", flat["teacher.dtype"], registry.DTYPES)
    if min(flat["distill.tokens"]) < 1:
        raise ConfigError(f"distill.tokens = {tuple(flat['distill.tokens'])}: expected two numbers above 0")
    if flat["teacher.longer_side"] and flat["teacher.longer_side"] < PATCH:
        raise ConfigError(
            f"teacher.longer_side = {flat['teacher.longer_side']}: expected at least {PATCH} pixels, or 0"
        )
    if flat["distill.tap"] not in range(4):
        raise ConfigError(f"distill.tap = {flat['distill.tap']}: a teacher has the taps 0, 1, 2 and 3")
    if flat["distill.relation"] == "gram" and flat["distill.center"] == "view" and flat["distill.w_vr"]:
        raise ConfigError("distill.center = 'view': relation gram has one descriptor of a view, take 'rig' or 'none'")
    if flat["distill.baseline"]:
        baselines.baseline(flat["distill.baseline"])
    d = {key.removeprefix("distill."): flat[key] for key in flat if key.startswith("distill.")}
    if not _in_use(d):
        return
    if flat["distill.w_ckd"] and flat["distill.w_cross"] and flat["model.bins"] in ("uniform", "sid"):
        raise ConfigError(
            f"distill.w_cross = {flat['distill.w_cross']}: teaches bin centers, but those of model.bins ="
            f" {flat['model.bins']!r} are fixed; set it to 0, or take log, linear or attractor"
        )
    even_in_log = flat["model.bins"] in ("log", "sid", "attractor")
    if flat["distill.bins"] == "aligned" and needs(_weights(d)).logits and not even_in_log:
        raise ConfigError(
            f"distill.bins = 'aligned' spaces its bins evenly in log-depth, but those of model.bins ="
            f" {flat['model.bins']!r} are even in depth; take log, or distill.bins = 'soft_assign'"
        )
    if flat["distill.w_vr"] and flat["distill.relation"] == "gram" and flat["distill.intra"]:
        raise ConfigError(
            "distill.intra = True: relations within a view are between its tokens, but distill.relation = 'gram'"
            " compares whole views; take tokens or bins, or leave distill.intra at False"
        )
    if flat["distill.bins"] == "two_hot":
        others = [
            key for key, used in {
                "distill.w_cross": flat["distill.w_ckd"] and flat["distill.w_cross"],
                "distill.relation": flat["distill.w_vr"] and flat["distill.relation"] == "bins",
                "distill.baseline": flat["distill.w_baseline"] and flat["distill.baseline"] == "dist",
            }.items() if used
        ]  # fmt: skip
        if others:
            raise ConfigError(
                f"distill.bins = 'two_hot' serves the term of distill.w_prob alone, not {others[0]} ="
                f" {flat[others[0]]!r}: a distribution on the student's own centers says nothing about where they are"
            )


def _in_use(d: Mapping[str, Any]) -> bool:
    """Whether any term of the config section `distill` has a weight."""
    baseline = d["w_baseline"] if d["baseline"] else 0
    ckd = d["w_ckd"] if d["w_prob"] or d["w_cross"] else 0
    return any((ckd, d["w_vr"], baseline))


def _weights(d: Mapping[str, Any]) -> DistillWeights:
    """The section `distill` as weights and variants of the terms."""
    fields = {f.name for f in dataclasses.fields(DistillWeights)}
    return DistillWeights(**{**{key: d[key] for key in d if key in fields}, "tokens": tuple(d["tokens"])})


def labels(config: ml_collections.ConfigDict) -> dict[str, float]:
    """The options of `total.supervised_loss`."""
    return {
        "min_depth": config.model.min_depth, "max_depth": config.model.max_depth,
        "silog_lambda": config.loss.silog_lambda, "chamfer_weight": config.loss.chamfer_weight,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Distilled:
    """What a student's training with a teacher needs besides the student."""

    loss: Distillation
    teacher: Teacher
    cache: TeacherCache | None  # None = the teacher runs in the step

    @property
    def frozen(self) -> Any:
        """The parameters that are an argument of the step."""
        return None if self.cache else self.teacher.params

    @property
    def identity(self) -> dict[str, Any]:
        """What the teacher was, for the run's identity."""
        card = self.teacher.card
        cached = self.cache.manifest.teacher if self.cache else None
        return {"sha256": weight_hash(self.teacher), "variant": card.variant, "source": card.source,
                "size": list(self.loss.size), "cached": cached}  # fmt: skip


def distilled(config: ml_collections.ConfigDict, records: Records) -> Distilled | None:
    """The teacher that `config` asks for, opened and checked; None where every weight of `distill` is 0.

    Raises:
      ConfigError, DataError: the teacher or its cache cannot be used; says where to get one.
    """
    d, t = config.distill, config.teacher
    if config.task != "student" or not _in_use(d):
        if config.task == "student" and t.weights:
            distributed.say("note: every weight of distill is 0, so the teacher that the config names is not used")
        return None
    if not t.weights:
        raise ConfigError(
            "teacher.weights is empty, but distill.* asks for a teacher: name one"
            " (--config.teacher.weights=tiny ships with the package; docs/teacher.md tells where the published ones"
            f" are), or train without: {SUPERVISED_ONLY}"
        )
    if d.baseline and d.w_baseline and (d.w_ckd or d.w_vr):
        distributed.say(f"note: distill.baseline = {d.baseline!r} is added to w_ckd = {d.w_ckd} and w_vr = {d.w_vr}")
    try:
        teacher = open_teacher(t.weights)
    except DataError as error:
        raise DataError(
            f"{error}\n(config key teacher.weights) README, 'The foundation teacher', tells where the published weights"
            " are and how to convert them. Without them: --config.teacher.weights=tiny takes the small one in this"
            f" package, and\n  {SUPERVISED_ONLY}\ntrains on the labels alone."
        ) from error
    metric = "convert a metric checkpoint with python -m fsmde_jax.convert --max_depth 80 and name the new folder"
    if d.bins == "two_hot" and teacher.card.max_depth is None:
        raise ConfigError(
            f"distill.bins = 'two_hot' needs a metric teacher, and {t.weights!r} is a relative one; {metric}"
        )
    if not teacher.shift_known and "metric" in teacher.card.source.lower():
        raise ConfigError(f"teacher.weights = {t.weights!r}: no card says so, but its name says metric; {metric}")
    image_size = (int(config.data.image_size[0]), int(config.data.image_size[1]))
    patch = teacher.module().patch
    if 0 < t.longer_side < patch:
        raise ConfigError(
            f"teacher.longer_side = {t.longer_side}: {t.weights!r} needs at least {patch} pixels, or 0 for its own size"
        )
    size = teacher_size(image_size, t.longer_side or teacher.card.longer_side or LONGER_SIDE, patch)
    weights = dataclasses.replace(_weights(d), expectation=config.model.expectation)
    need = needs(weights)
    method = baselines.baseline(d.baseline) if d.baseline and d.w_baseline else None
    if weights.w_vr or (method and d.baseline == "cirkd"):
        _check_relations(weights, records, image_size, size, teacher)
    cache = _open_cache(config, records, teacher, size, need, method) if t.cache else None
    head = _teacher_bins(config) if d.bins == "learned" and need.logits else None
    on_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    module = None if cache else teacher.module(registry.DTYPES[t.dtype], in_turn=on_cpu)
    projector = Projector(teacher.module().sizes.embed_dim) if method and method.projector else None
    m = config.model
    depth_range = depth_bins.canonical_range(m.min_depth, m.max_depth, m.focal_canonical, tuple(m.focal_range))
    shift = d.shift == "unknown" if d.shift != "auto" else not teacher.shift_known
    loss = Distillation(
        module, size, d.tap, d.bins, d.tau_bin, weights, labels(config), depth_range, m.focal_canonical,
        shift, head, projector, config.train.batch_parts,
    )  # fmt: skip
    return Distilled(loss, teacher, cache)


def _check_relations(
    weights: DistillWeights, records: Records, image_size: tuple[int, int], size: tuple[int, int], teacher: Teacher
) -> None:
    """That tokens are not finer than their features (`ConfigError`) and that cameras are adjacent (a warning)."""
    of_bins = weights.relation == "bins" and weights.baseline != "cirkd"
    student = tuple(side // (2 if of_bins else FEATURE_STRIDE) for side in image_size)
    theirs = student if of_bins else tuple(side // teacher.token_stride for side in size)
    if any(g > s for sides in (student, theirs) for g, s in zip(weights.tokens, sides, strict=True)):
        raise ConfigError(
            f"distill.tokens = {weights.tokens}: finer than what is compared of the student, {student}, or of the"
            f" teacher, {theirs}, at these image sizes"
        )
    first = records[0]
    pairs = geometry.adjacency(first.cam_to_ego, first.intrinsics, first.image_size[:, 1])
    if weights.w_vr and not np.asarray(pairs).any():
        distributed.say(
            f"warning: distill.w_vr = {weights.w_vr}: no two of the cameras {records.cameras} are adjacent, so there"
            " are no relations to teach; set it to 0, or name other cameras in data.cameras",
            warning=True,
        )


def _teacher_bins(config: ml_collections.ConfigDict) -> TeacherBins:
    m = config.model
    return TeacherBins(
        m.bins,
        m.probabilities,
        m.expectation,
        m.num_bins,
        m.min_depth,
        m.max_depth,
        m.focal_canonical,
        tuple(m.focal_range),
    )


def _open_cache(
    config: ml_collections.ConfigDict,
    records: Records,
    teacher: Teacher,
    size: tuple[int, int],
    need: Needs,
    method: baselines.Baseline | None,
) -> TeacherCache:
    d = config.distill
    if d.bins not in ("soft_assign", "aligned") and need.logits:
        raise ConfigError(f"teacher.cache: distill.bins = {d.bins!r} needs the teacher in the step")
    if method and method.needs == "features" and d.baseline != "cirkd":
        raise ConfigError(
            f"teacher.cache: distill.baseline = {d.baseline!r} compares whole feature maps, a cache holds pooled"
            " tokens; run the teacher in the step"
        )
    cache = open_cache(
        config.teacher.cache, records, image_size=config.data.image_size, sha256=weight_hash(teacher),
        teacher_size=size, tokens=need.tokens,
    )  # fmt: skip
    cache.check(records, config.data.image_size, config.augment.scale)
    if need.tokens and d.tap != 3:
        raise ConfigError(f"teacher.cache: holds tokens of the last tap, but distill.tap = {d.tap}")
    grid = tuple(cache.manifest.tokens[:2]) if need.tokens and cache.manifest.tokens else None
    if grid and grid != tuple(d.tokens):
        raise ConfigError(f"teacher.cache: holds tokens of {grid}, but distill.tokens = {d.tokens}")
    return cache
