"""From a config to the objects of a job. The only place where config keys meet constructors."""

from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from fsmde_jax import distributed, optim, weights
from fsmde_jax.build_teacher import Distilled, check_distillation, labels
from fsmde_jax.data.pipeline import AugmentOptions
from fsmde_jax.data.records import Records, open_records
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.losses import total
from fsmde_jax.models import depth_bins, registry
from fsmde_jax.names import check_name, flatten
from fsmde_jax.state import LossFn, ReadFn, TrainState, init_state, make_train_step

TASKS = ("student", "teacher")
_LENGTHS = {
    "data.image_size": 2, "augment.scale": 2, "model.focal_range": 2, "model.decoder_channels": 5, "distill.tokens": 2,
}  # fmt: skip
_POSITIVE = (
    "train.steps",
    "train.batch_parts",
    "train.fsdp",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "eval.batch_size",
)


def check(config: ml_collections.ConfigDict) -> None:
    """Checks what no constructor checks, before any work.

    Raises:
      ConfigError: naming the key and what was expected.
    """
    flat = flatten(config.to_dict())
    for key, length in _LENGTHS.items():
        if len(flat[key]) != length:
            raise ConfigError(f"{key} = {tuple(flat[key])}: expected {length} numbers")
    for key in _POSITIVE:
        if flat[key] < 1:
            raise ConfigError(f"{key} = {flat[key]}: expected at least 1")
    check_name("task", flat["task"], TASKS)
    if flat["task"] == "teacher" and flat["train.encoder_weights"]:
        raise ConfigError("train.encoder_weights: a student's; a teacher starts from teacher.weights")
    if flat["task"] == "student":
        check_distillation(flat)
        if flat["data.dense_depth"] and (flat["data.label_fraction"] < 1 or flat["data.labelled_samples"]):
            raise ConfigError(
                "data.dense_depth = True: every pixel of every sample is a label then; leave data.label_fraction at 1"
                " and data.labelled_samples at 0"
            )
    if not 0 <= flat["optim.average_decay"] < 1:
        raise ConfigError(f"optim.average_decay = {flat['optim.average_decay']}: expected 0 (none) or more, below 1")
    if flat["loss.gradient_weight"] < 0:
        raise ConfigError(f"loss.gradient_weight = {flat['loss.gradient_weight']}: expected 0 or more")
    if flat["eval.checkpoint"] not in ("best", "latest"):
        raise ConfigError(f"eval.checkpoint = {flat['eval.checkpoint']!r}: expected best or latest")


def build_model(config: ml_collections.ConfigDict) -> nn.Module:
    """What is trained: the student that `config.model` describes, or the teacher of `config.teacher`."""
    m, t = config.model, config.teacher
    if config.task == "teacher":
        return registry.build_teacher(variant=t.variant, longer_side=t.longer_side, dtype=t.dtype, remat=t.remat)
    return registry.build_student(
        encoder=m.encoder, decoder_channels=tuple(m.decoder_channels), bins=m.bins, probabilities=m.probabilities,
        expectation=m.expectation, num_bins=m.num_bins, min_depth=m.min_depth, max_depth=m.max_depth,
        focal_canonical=m.focal_canonical, focal_range=tuple(m.focal_range), cross_view_blocks=m.cross_view_blocks,
        dtype=m.dtype,
    )  # fmt: skip


def loss_fn(config: ml_collections.ConfigDict, distilled: Distilled | None = None) -> LossFn:
    """The training loss; with `distilled` that of a student with a teacher."""
    if distilled is not None:
        return distilled.loss
    if config.task == "teacher":
        weight = config.loss.gradient_weight
        return lambda outputs, batch, *_: total.relative_depth_loss(outputs, batch, gradient_weight=weight)
    options = labels(config)
    return lambda outputs, batch, *_: total.supervised_loss(outputs, batch, **options)


def training(
    config: ml_collections.ConfigDict, mesh: Mesh, distilled: Distilled | None, cameras: int
) -> tuple[nn.Module, Callable[[], TrainState], Any]:
    """(model, a function that makes a fresh state on `mesh`, the compiled step) of a training job.

    Args:
      config: the job's.
      mesh: to be set (`jax.set_mesh`) where the functions are called.
      distilled: of a student with a teacher, whose `frozen` parameters the step takes.
      cameras: of a rig.
    """
    model, o = build_model(config), config.optim
    optimizer = optim.make_optimizer(
        weight_decay=o.weight_decay, clip_norm=o.clip_norm, encoder_lr_scale=o.encoder_lr_scale
    )
    companions = distilled.loss.companions if distilled else None
    size = (int(config.data.image_size[0]), int(config.data.image_size[1]))

    def fresh() -> TrainState:
        return init_state(
            model, optimizer, config.seed, cameras, size, mesh, companions, average=o.average_decay > 0
        )  # fmt: skip

    step = make_train_step(
        model, optimizer, loss_fn(config, distilled), mesh=mesh, parts=config.train.batch_parts,
        average_decay=o.average_decay,
    )  # fmt: skip
    return model, fresh, step


def read_fn(config: ml_collections.ConfigDict) -> ReadFn:
    """What `eval.protocol` measures of the outputs: depth in metres, or relative inverse depth for `affine`.

    With `eval.confidence`, depth and bins by name, as `confidence.measure` takes them.
    """

    def read(outputs: Any) -> Any:
        if config.task == "teacher":
            return outputs["rel_inv_depth"]
        if config.eval.confidence:
            return {name: outputs[name] for name in ("pred_depth", "bin_logits", "bin_centers")}
        return 1.0 / outputs["pred_depth"] if config.eval.protocol == "affine" else outputs["pred_depth"]

    return read


def augment_options(config: ml_collections.ConfigDict) -> AugmentOptions:
    """The training augmentation that `config.augment` describes."""
    return AugmentOptions(**{**config.augment.to_dict(), "scale": tuple(config.augment.scale)})


def encoder_weights(config: ml_collections.ConfigDict) -> tuple[Any, Any] | None:
    """Pretrained (params, batch_stats) of the encoder, or None where `train.encoder_weights` is empty."""
    if not config.train.encoder_weights:
        return None
    return weights.load_encoder(config.train.encoder_weights, config.model.encoder)


def open_split(config: ml_collections.ConfigDict, role: str) -> Records:
    """The records of a role, "train" or "eval".

    Raises:
      DataError: they are missing; the message holds the exact command that makes them.
      ConfigError: the key is empty.
    """
    folder, command = config.data[f"{role}_records"], config.data[f"prepare_{role}"]
    if not folder:
        raise ConfigError(
            f"data.{role}_records is empty: name the records folder, e.g. --config.data.{role}_records=records/x"
        )
    try:
        records = open_records(folder, tuple(config.data.cameras))
    except DataError as error:
        hint = f"\nTo make these records, run:\n  {command}" if command else ""
        raise DataError(f"{error}\n(config key data.{role}_records){hint}") from error
    if config.task == "student":
        _note_focals(config, records, folder, zoomed=role == "train")
    return records


def _note_focals(config: ml_collections.ConfigDict, records: Records, folder: str, zoomed: bool) -> None:
    """Prints a line for every camera, and for the extremes over all samples, that the bins cannot wholly serve."""
    sample, width = records[0], depth_bins.FOCAL_WIDTH
    scale = width / sample.image_size[:, 1]
    focals = dict(zip(sample.camera_names, sample.intrinsics[:, 0, 0] * scale, strict=True))
    for name, fraction in zip(("smallest", "largest"), records.manifest.focal_by_width, strict=False):
        focals[f"with the {name} fx of all samples"] = np.float32(fraction * width)
    zooms = sorted(set(config.augment.scale)) if zoomed else [1.0]
    names = [f"{name} (zoom {zoom:g})" if zoom != 1 else name for zoom in zooms for name in focals]
    intrinsics = np.tile(np.eye(3), (len(names), 1, 1))
    intrinsics[:, 0, 0] = [zoom * focal for zoom in zooms for focal in focals.values()]
    for text in depth_bins.check_focals(
        intrinsics, width, names, min_depth=config.model.min_depth, max_depth=config.model.max_depth,
        focal_canonical=config.model.focal_canonical, focal_range=tuple(config.model.focal_range),
    ):  # fmt: skip
        distributed.say(f"warning: {folder}: {text}", warning=True)
