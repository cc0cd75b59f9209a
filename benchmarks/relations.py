"""What the relations that view-relational distillation hands on know: do tokens find their point in the next view?

  python -m benchmarks.relations --teacher tiny --records records/world_val --features
  python -m benchmarks.relations --teacher teachers/small --records records/nuscenes_val --limit 200 \
      --student runs/nuscenes --out relations.json --picture relations.png

LiDAR points that two adjacent cameras see say which token of the one belongs to which of the other. Per tap of the
teacher and centering: how often the row's highest column (top-1), or one of its five highest (top-5), is the true one,
and the mean probability p of the true one at --tau_r. Beside it: the teacher on blank images (constant, of ImageNet's
mean colour), where only its position embedding speaks; chance; the most frequent column of each row of each pair of
cameras, fitted on half of the scenes (of the records, if they are of one scene) and measured on the other half, both
ways round; and what is possible at all. Each (record, directed pair of views, row, column) counts once.
"""

import argparse
import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from tqdm import tqdm

from fsmde_jax import build, checkpoint, compatible, evaluate, geometry, identity, relation_probe, sharding
from fsmde_jax.convert import add_teacher_flags
from fsmde_jax.data.pipeline import chosen_indices, eval_batches
from fsmde_jax.data.records import Records, open_records
from fsmde_jax.data.tfrecord import write_atomically
from fsmde_jax.errors import ConfigError, DataError, TrainingError, exit_with_message
from fsmde_jax.eval_options import EvalOptions
from fsmde_jax.losses.relational import CENTERS, tokens_of
from fsmde_jax.models.student import IMAGE_MEAN, normalise_images
from fsmde_jax.models.teacher_images import LONGER_SIDE, teacher_size
from fsmde_jax.relation_probe import Tally, Truth
from fsmde_jax.state import init_state, make_predict
from fsmde_jax.teacher import Teacher, open_teacher, weight_hash
from fsmde_jax.teacher_signal import run_teacher
from fsmde_jax.viz.colour import encode_png
from fsmde_jax.viz.relations import Query, relation_picture

TAPS = (0, 1, 2, 3)
QUERIES = 4  # rows of the picture
Means = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Source:
    """A network whose tokens are probed.

    Attributes:
      name: heading of its table.
      size: (H, W) of the images it is given.
      run: batch of one rig -> {kind of tokens: [N, T, C]}.
      with_blank: whether it is measured on blank images, too.
      made_by: JSON-ready, what the network is.
    """

    name: str
    size: tuple[int, int]
    run: Callable[[dict[str, Any]], dict[str, Any]]
    with_blank: bool
    made_by: dict[str, Any]


class _AllTaps:
    """A teacher's module whose every tap is all four, one after the other in the channels: one run gives them all."""

    def __init__(self, module: Any):
        self.module, self.patch = module, module.patch

    def apply(self, variables: Any, images: jax.Array) -> dict[str, Any]:
        outputs = self.module.apply(variables, images)
        return {**outputs, "taps": (jnp.concatenate(outputs["taps"], -1),) * len(TAPS)}


def _check_grid(grid: tuple[int, int], available: tuple[int, int], what: str) -> None:
    if grid[0] > available[0] or grid[1] > available[1]:
        shown, most = "x".join(map(str, grid)), "x".join(map(str, available))
        raise ConfigError(f"--tokens {shown}: finer than {what}, {most}; choose a coarser grid or a larger input")


def teacher_source(
    teacher: Teacher, records: Records, grid: tuple[int, int], *, longer_side: int, taps: Sequence[int], features: bool
) -> Source:
    """The tokens of a teacher's taps and, if asked for, of its head's last feature map.

    Raises:
      ConfigError: the grid is finer than the teacher's own tokens.
    """
    module = _AllTaps(teacher.module(in_turn=jax.default_backend() == "cpu"))
    size = teacher_size([int(side) for side in records[0].image_size[0]], longer_side, module.patch)
    stride = teacher.token_stride
    _check_grid(grid, (size[0] // stride, size[1] // stride), "the teacher's own tokens")
    params = jax.device_put(teacher.params)

    @jax.jit
    def compute(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        maps = run_teacher(module, params, normalise_images(images), size=size)
        by_tap = jnp.split(tokens_of(maps.tokens, grid), len(TAPS), -1)
        kinds = {f"tap {tap}": by_tap[tap] for tap in taps}
        if features:
            kinds["features"] = tokens_of(maps.features, grid)
        return {kind: tokens[0].reshape(tokens.shape[1], -1, tokens.shape[-1]) for kind, tokens in kinds.items()}

    card = teacher.card
    return Source(
        f"teacher: {card.source or card.variant} ({card.variant}, {size[0]}x{size[1]})", size,
        lambda batch: compute(params, batch["images"]), True,
        {"teacher": dataclasses.asdict(card), "sha256": weight_hash(teacher), "input": list(size)},
    )  # fmt: skip


def student_source(workdir: Path, records: Records, grid: tuple[int, int]) -> Source:
    """The tokens of a run's student: its decoder's features, as distillation takes them. Best, else latest checkpoint.

    Raises:
      TrainingError: no checkpoint. ConfigError: the run trains a teacher, or the grid is finer than the features.
    """
    which = checkpoint.best_or_latest(workdir)
    tree, meta, step = checkpoint.read_parameters(workdir, which)
    where = f"{workdir} ({which} checkpoint, step {step})"
    config = ml_collections.ConfigDict({"task": "student", "teacher": {}, **meta["identity"]["config"]})
    if config.task != "student":
        raise ConfigError(f"--student {workdir}: trains a teacher; name it in --teacher after fsmde_jax.convert")
    model, size = build.build_model(config), (int(config.data.image_size[0]), int(config.data.image_size[1]))
    _check_grid(grid, (size[0] // 8, size[1] // 8), "the student's features")
    template = jax.eval_shape(
        lambda: init_state(model, optax.identity(), 0, len(records.cameras), size, sharding.make_mesh())
    )
    wanted = {"params": template.params, "batch_stats": template.batch_stats}
    variables = compatible.fit_parameters(wanted, tree, where)
    predict = make_predict(model, lambda outputs: tokens_of(outputs["features"], grid))

    def run(batch: dict[str, Any]) -> dict[str, Any]:
        inputs = {name: value for name, value in batch.items() if name != "record_index"}
        tokens = predict(variables["params"], variables["batch_stats"], inputs)
        return {"features": tokens[0].reshape(tokens.shape[1], -1, tokens.shape[-1])}

    made_by = {"run": workdir.name, "checkpoint": which, "step": step, "trained_as": meta["identity"]}
    return Source(f"student: {workdir.name} (step {step}, {size[0]}x{size[1]})", size, run, False, made_by)


def find_truths(records: Records, indices: Sequence[int], grid: tuple[int, int]) -> tuple[list[Truth], list[str]]:
    """The truth and the scene of each record.

    Raises:
      DataError: no record has a match.
    """
    truths, scenes = [], []
    for index in tqdm(indices, desc="correspondences", unit="rig", disable=None, dynamic_ncols=True):
        sample = records[index]
        truths.append(relation_probe.truth_of(sample, grid, records.where(index)))
        scenes.append(f"{records.manifest_of(index).dataset} {sample.scene}")
    if not any(len(truth.matches) for truth in truths):
        raise DataError(
            f"{records.folders[0]}: no LiDAR point is seen by two adjacent cameras in {len(truths)} records; use"
            " records whose cameras overlap, or more of them (--limit)"
        )
    return truths, scenes


def blank_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with constant images of ImageNet's mean colour."""
    colour = np.round(255 * np.asarray(IMAGE_MEAN)).astype(np.uint8)
    return {**batch, "images": np.broadcast_to(colour, batch["images"].shape)}


def measure(
    source: Source, records: Records, truths: Sequence[Truth], centers: Sequence[str], *, tau_r: float, limit: int
) -> tuple[dict[tuple[str, str, bool], Means], tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Means per (kind of tokens, centering, on blank images), and images and tokens of the first record with a match.

    Raises:
      TrainingError: a token is not finite; names the record.
    """
    tallies: dict[tuple[str, str, bool], Tally] = {}
    shown: tuple[np.ndarray, dict[str, np.ndarray]] | None = None
    blank_tokens: dict[str, np.ndarray] = {}  # the same for every record
    batches = eval_batches(records, source.size, 1, limit)
    progress = tqdm(batches, total=len(truths), desc=source.name, unit="rig", disable=None, dynamic_ncols=True)
    for (batch, _, (index,)), truth in zip(progress, truths, strict=True):
        if not len(truth.matches):
            continue
        tokens: dict[str, np.ndarray] = jax.device_get(source.run(batch))
        for kind, values in tokens.items():
            if not np.isfinite(values[truth.mask]).all():
                raise TrainingError(f"{source.name}: {kind} of {records.where(index)} are not finite")
        if shown is None:
            shown = batch["images"][0].copy(), tokens
            blank_tokens = jax.device_get(source.run(blank_batch(batch))) if source.with_blank else {}
        for blank, of in ((False, tokens), (True, blank_tokens)):
            ordered = sorted(of.items(), key=lambda item: item[0] == "features")  # jit sorts by name
            for (kind, values), center in itertools.product(ordered, centers):
                scores = relation_probe.relation_rows(values, truth, center=center)
                tally = tallies.setdefault((kind, center, blank), Tally())
                tally.add(scores, relation_probe.softmax_rows(scores, truth, tau_r=tau_r), truth)
    assert shown is not None, "there is a match in some record"
    return {key: tally.means() for key, tally in tallies.items()}, shown


def references(truths: Sequence[Truth], scenes: Sequence[str]) -> dict[str, Means]:
    """Means of what needs no network."""
    prior, by = relation_probe.cross_fitted_prior(truths, scenes)
    named = {"chance": relation_probe.chance, "best possible": relation_probe.best_possible}
    tallies = {name: Tally() for name in named}
    for name, predict in named.items():
        for truth in truths:
            tallies[name].add(*predict(truth), truth)
    label = "most frequent column " + (f"(of the other half of the {by})" if prior.matches else "(needs two records)")
    return {name: of.means() for name, of in ({"chance": tallies.pop("chance"), label: prior} | tallies).items()}


def _cells(means: Means) -> str:
    return " | ".join(f"{means[name]:.4f}" if means else "-" for name in relation_probe.MEASURES)


def reference_table(found: dict[str, Means]) -> str:
    """Markdown."""
    lines = ["| without a network | top-1 | top-5 | p |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {_cells(means)} |" for name, means in found.items())])


def source_table(means: dict[tuple[str, str, bool], Means], matches: int) -> str:
    """Markdown, a row per kind of tokens and centering."""
    with_blank = any(blank for _, _, blank in means)
    head = "| tokens | centering | top-1 | top-5 | p | correspondences |" + " blank: top-1 | top-5 | p |" * with_blank
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for kind, center, blank in means:
        if not blank:
            line = f"| {kind} | {center} | {_cells(means[kind, center, False])} | {matches} |"
            lines.append(line + (f" {_cells(means[kind, center, True])} |" if with_blank else ""))
    return "\n".join(lines)


def picture(
    images: np.ndarray, tokens: np.ndarray, truth: Truth, cam_to_ego: np.ndarray, names: Sequence[str], title: str,
    grid: tuple[int, int], *, center: str, tau_r: float,
) -> np.ndarray:  # fmt: skip
    """The pair of adjacent views with the most rows, the left one asking; rows spread evenly over those it has.

    Args:
      images: [N, H, W, 3] uint8; tokens: [N, T, C]; cam_to_ego: [N, 4, 4].
    """
    yaw = np.asarray(geometry.optical_yaw(cam_to_ego))
    rows = np.unique(truth.matches[:, :3], axis=0)
    to_the_right = rows[np.sin(yaw[rows[:, 0]] - yaw[rows[:, 1]]) >= 0]
    pairs, counts = np.unique((to_the_right if len(to_the_right) else rows)[:, :2], axis=0, return_counts=True)
    i, j = pairs[counts.argmax()].tolist()
    own = rows[(rows[:, :2] == [i, j]).all(1), 2]
    chosen = own[np.unique(np.linspace(0, len(own) - 1, QUERIES).round().astype(int))]
    scores = relation_probe.relation_rows(tokens, truth, center=center)
    relation = np.where(truth.columns, relation_probe.softmax_rows(scores, truth, tau_r=tau_r), np.nan)
    queries = []
    for row in chosen.tolist():
        at = np.flatnonzero((truth.matches[:, :3] == [i, j, row]).all(1))
        queries.append(Query(row, truth.matches[at, 3].tolist(), relation[at[0]]))
    return relation_picture(images[i], images[j], queries, grid, (names[i], names[j]), title=title)


def _grid(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: expected ROWSxCOLUMNS, e.g. 6x10")
    return int(found[1]), int(found[2])


def _write(path: Path, blob: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, blob)
    except OSError as error:
        raise DataError(f"{path}: cannot write ({error.strerror}); free space or choose another place") from error


def run(args: argparse.Namespace) -> None:
    """The measurement that the flags describe: prints the tables, writes --out and --picture."""
    if not args.tau_r > 0:
        raise ConfigError(f"--tau_r {args.tau_r}: expected a temperature above 0")
    teacher = open_teacher(args.teacher, variant=args.variant, version=args.version, max_depth=args.max_depth)
    records, grid = open_records(args.records), args.tokens
    manifest = records.manifest
    # Students first: a wrong folder is found before the long work.
    students = [student_source(Path(folder), records, grid) for folder in args.student]
    longer_side = args.longer_side or teacher.card.longer_side or LONGER_SIDE
    taught = teacher_source(teacher, records, grid, longer_side=longer_side, taps=args.taps, features=args.features)
    options = EvalOptions(taught.size, min_depth=manifest.min_depth, max_depth=manifest.max_depth, limit=args.limit)
    title, _ = evaluate.check_records(records, options)
    indices = chosen_indices(len(records), args.limit)
    truths, scenes = find_truths(records, indices, grid)
    matches, rows = sum(len(truth.matches) for truth in truths), sum(truth.num_rows for truth in truths)
    counted = f"{matches} correspondences in {rows} rows"
    print(f"## {title}\n\n{counted}; tokens {grid[0]}x{grid[1]}, tau_r {args.tau_r:g}.\n")
    without = references(truths, scenes)
    print(reference_table(without))
    report: list[dict[str, Any]] = []
    for source in (taught, *students):
        means, (images, tokens) = measure(source, records, truths, args.centers, tau_r=args.tau_r, limit=args.limit)
        print(f"\n### {source.name}\n\n{source_table(means, matches)}")
        listed = [{"tokens": k, "centering": c, "blank": b, **found} for (k, c, b), found in means.items()]
        report.append({"name": source.name, "made_by": source.made_by, "means": listed})
        if args.picture and source is taught:
            first = next(k for k, truth in enumerate(truths) if len(truth.matches))
            sample, kind = records[indices[first]], f"tap {args.taps[-1]}"
            title_of = f"{source.name}, {kind}, centering {args.centers[0]}, tau_r {args.tau_r:g}; {sample.sample_id}"
            drawn = picture(
                images, tokens[kind], truths[first], sample.cam_to_ego, sample.camera_names, title_of, grid,
                center=args.centers[0], tau_r=args.tau_r,
            )  # fmt: skip
            _write(Path(args.picture), encode_png(drawn))
    if args.out:
        config = {"tokens": list(grid), "tau_r": args.tau_r, "limit": args.limit}
        made_by = identity.run_identity(config, {"eval": records.fingerprint})
        whole = {"title": title, "records": len(truths), "correspondences": matches, "rows": rows}
        whole |= {"references": without, "sources": report, "identity": made_by}
        _write(Path(args.out), (json.dumps(whole, indent=1) + "\n").encode())


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.relations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", default="tiny", metavar="T", help="as of fsmde_jax.predict (default tiny)")
    parser.add_argument("--records", required=True, metavar="R", help="records folder, or several with commas between")
    parser.add_argument("--student", nargs="+", default=[], metavar="RUN", help="folders of runs that train a student")
    parser.add_argument("--tokens", type=_grid, default=(6, 10), metavar="HxW", help="grid of a view (default 6x10)")
    parser.add_argument("--taps", type=int, nargs="+", choices=TAPS, default=list(TAPS), help="of the teacher")
    parser.add_argument("--centers", nargs="+", choices=CENTERS, default=list(CENTERS), help="distill.center")
    parser.add_argument("--tau_r", type=float, default=0.1, metavar="TAU", help="distill.tau_r (default 0.1)")
    parser.add_argument("--features", action="store_true", help="also the teacher's last feature map")
    parser.add_argument("--longer_side", type=int, metavar="PIXELS", help="of the input (default: the card's, or 630)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="records, spread evenly (default all)")
    parser.add_argument("--out", metavar="FILE.json", help="write the numbers here, too")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the last tap's relation with the first centering")
    add_teacher_flags(parser)
    args = parser.parse_args(argv)
    with exit_with_message():
        run(args)


if __name__ == "__main__":
    main()
