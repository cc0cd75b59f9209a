"""How far a teacher's map is off in metres, once `distill.bins=aligned` has fitted it: which `distill.shift` suits it?

  python -m benchmarks.alignment --teacher lite0 --records records/ablation_nuscenes_val --image_size 64x128 \
      --longer_side 192 --labels 0.06 --truth dense
  python -m benchmarks.alignment --teacher teachers/small --records records/nuscenes_train --limit 200 \
      --student runs/nuscenes --out alignment.json

Per view the map is fitted to a share of its LiDAR labels (--labels) and, with --student, to the depth that a student
predicts, which stands for what it says in training of a view without labels; then abs_rel is measured on the other
labels, or on exact depth (--truth dense). A row per way of fitting: scale alone (`distill.shift=known`), scale and
shift (`unknown`), and, for comparison, scale and shift by least squares of depth's relative error and of inverse
depth. Means over the views that can be fitted by every way, the same for all rows of a column and for the student's
own error.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fsmde_jax import identity, interpolate, load_model
from fsmde_jax.convert import add_teacher_flags
from fsmde_jax.data.pipeline import chosen_indices, eval_batches
from fsmde_jax.data.records import Records, open_records, require_dense_depth
from fsmde_jax.data.tfrecord import write_atomically
from fsmde_jax.errors import ConfigError, DataError, exit_with_message
from fsmde_jax.eval_data import label_maps
from fsmde_jax.losses import teacher_bins
from fsmde_jax.models.student import STRIDE, normalise_images
from fsmde_jax.models.teacher_images import LONGER_SIDE, teacher_size
from fsmde_jax.names import parse_size
from fsmde_jax.teacher import Teacher, open_teacher
from fsmde_jax.teacher_signal import run_teacher

Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]  # r, depth, mask -> depth, valid


def maps_of(teacher: Teacher, size: tuple[int, int], longer_side: int) -> Callable[[np.ndarray], np.ndarray]:
    """Images [1, N, H, W, 3] uint8 -> r [1, N, H / 2, W / 2]: what the student's head gets to see."""
    module = teacher.module(in_turn=jax.default_backend() == "cpu")
    wanted = teacher_size(size, longer_side or teacher.card.longer_side or LONGER_SIDE, module.patch)
    params = jax.device_put(teacher.params)

    @jax.jit
    def compute(params: Any, images: jax.Array) -> jax.Array:
        r = run_teacher(module, params, normalise_images(images), size=wanted).rel_inv_depth
        return teacher_bins.resize_rel_inv_depth(r, size[0] // 2, size[1] // 2)

    return lambda images: np.asarray(compute(params, images))


def upsampled(head: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[1, N, h, w] -> [1, N, H, W], as the student's depth and the labels' pixels of a map are."""
    return np.asarray(interpolate.resize(jnp.asarray(head)[..., None], *size, "bilinear"))[..., 0]


def trained_with(shift: bool, min_depth: float, max_depth: float) -> Fit:
    """What training does."""
    fit = jax.jit(teacher_bins.align_to_labels, static_argnames=("min_depth", "max_depth", "shift"))

    def run(r: np.ndarray, depth: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found, valid = fit(r, depth, mask, min_depth=min_depth, max_depth=max_depth, shift=shift)
        return np.asarray(found), np.asarray(valid)

    return run


def least_squares(relative: bool, min_depth: float, max_depth: float) -> Fit:
    """Scale and shift of the least squares of D (s r + t) - 1, or of s r + t - 1 / D; NumPy, float64."""

    def run(r: np.ndarray, depth: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at_labels, inverse = upsampled(r, depth.shape[2:]), np.ones(r.shape)
        valid = mask.sum((2, 3)) >= teacher_bins.MIN_LABELS
        for view in np.flatnonzero(valid[0]):
            x, d = (a[0, view][mask[0, view]].astype(np.float64) for a in (at_labels, depth))
            weight = d if relative else np.ones_like(d)
            (s, t), *_ = np.linalg.lstsq(np.stack([weight * x, weight], -1), weight / d, rcond=None)
            inverse[0, view] = s * r[0, view] + t
        return 1 / np.clip(inverse, 1 / max_depth, 1 / min_depth), valid

    return run


class Column:
    """Errors of the views that were fitted to one thing."""

    def __init__(self) -> None:
        self.views = 0  # with something to measure on, whether they could be fitted or not
        self.errors: list[list[float]] = []  # per view that could be: of each way, then of the student, if there is one

    def add(
        self, fitted: Sequence[tuple[np.ndarray, np.ndarray]], own: Sequence[np.ndarray], truth: np.ndarray,
        counts: np.ndarray,
    ) -> None:  # fmt: skip
        """One rig: (depth [1, N, h, w], valid [1, N]) of each way; own: the student's depth [1, N, H, W], or nothing;
        truth [1, N, H, W] metres, counts [1, N, H, W] bool."""
        maps = [*(upsampled(depth, truth.shape[2:]) for depth, _ in fitted), *own]
        measured = counts.any((2, 3))
        self.views += int(measured.sum())
        for view in np.flatnonzero((np.all([valid for _, valid in fitted], 0) & measured)[0]):
            at, d = counts[0, view], truth[0, view]
            self.errors.append([float(np.abs(m[0, view][at] / d[at] - 1).mean()) for m in maps])


def run(args: argparse.Namespace) -> None:
    """The measurement that the flags describe: prints its table, writes --out."""
    dense = args.truth == "dense"
    if not (0 < args.labels < 1 or (dense and args.labels == 1)):
        rest = "" if dense else ", since it is measured on the others"
        raise ConfigError(
            f"--labels {args.labels}: expected a share above 0 and {'at most' if dense else 'below'} 1{rest}"
        )
    teacher = open_teacher(args.teacher, variant=args.variant, version=args.version, max_depth=args.max_depth)
    records = open_records(args.records)
    if dense:
        require_dense_depth(records, "--truth dense")
    low, high = records.manifest.min_depth, records.manifest.max_depth
    size = parse_size(args.image_size or "x".join(map(str, records[0].image_size[0])), multiple=STRIDE)
    student = load_model(args.student) if args.student else None
    ways = {
        "scale (distill.shift=known)": trained_with(False, low, high),
        "scale and shift (distill.shift=unknown)": trained_with(True, low, high),
        "scale and shift, least squares of relative depth": least_squares(True, low, high),
        "scale and shift, least squares of inverse depth": least_squares(False, low, high),
    }
    r_of, rng = maps_of(teacher, size, args.longer_side), np.random.default_rng(0)
    columns = {"labels": Column()} | ({"student": Column()} if student else {})
    total = len(chosen_indices(len(records), args.limit))
    batches = eval_batches(records, size, 1, args.limit)
    for batch, samples, _ in tqdm(batches, total=total, unit="rig", disable=None, dynamic_ncols=True):
        r, lidar, visible = r_of(batch["images"]), batch["depth"], batch["ego_mask"]
        known = (lidar > low) & (lidar < high) & visible
        fitted = known & (rng.random(known.shape) < args.labels)
        truth = label_maps(batch, samples, args.truth)
        counts = (truth > low) & (truth < high) & visible & (dense | ~fitted)
        to, own = {"labels": (lidar, fitted)}, []
        if student is not None:
            own = [np.stack(student(batch["images"][0], batch["intrinsics"][0], batch["cam_to_ego"][0]).depth)[None]]
            to["student"] = own[0], (own[0] > low) & (own[0] < high) & visible
        for name, (depth, mask) in to.items():
            columns[name].add([way(r, depth, mask) for way in ways.values()], own, truth, counts)
    rows = [*ways, *(["the student itself"] if student else [])]
    report(args, teacher, records, total, rows, columns)


def report(
    args: argparse.Namespace, teacher: Teacher, records: Records, total: int, rows: Sequence[str],
    columns: dict[str, Column],
) -> None:  # fmt: skip
    """Prints the table and writes --out; `total` = rigs that were measured.

    Raises:
      DataError: a column has no view.
    """
    for name, column in columns.items():
        if not column.errors:
            reason = "has anything to be measured on" if not column.views else (
                f"could be fitted to the {name}: that takes {teacher_bins.MIN_LABELS} values that are not all the same"
            )  # fmt: skip
            raise DataError(f"{args.records}: no view {reason} (--labels {args.labels}, --truth {args.truth})")
    means = {name: np.mean(column.errors, 0).tolist() for name, column in columns.items()}
    print(f"## {teacher.card.source or teacher.card.variant}, {total} records, abs_rel on {args.truth} depth\n")
    heads = (f"to the {name}, {len(column.errors)} of {column.views} views" for name, column in columns.items())
    print("| fitted by | " + " | ".join(heads) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for i, row in enumerate(rows):
        print(f"| {row} | " + " | ".join(f"{mean[i]:.4f}" for mean in means.values()) + " |")
    if args.out:
        found = {
            name: {
                "views": column.views,
                "fitted": len(column.errors),
                "abs_rel": dict(zip(rows, means[name], strict=True)),
            }
            for name, column in columns.items()
        }
        config = {key: value for key, value in vars(args).items() if key != "out"}
        made_by = identity.run_identity(config, {"eval": records.fingerprint})
        whole = {"fitted_to": found, "teacher": dataclasses.asdict(teacher.card), "identity": made_by}
        write_atomically(Path(args.out), (json.dumps(whole, indent=1) + "\n").encode())


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.alignment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--teacher", default="tiny", metavar="T", help="as of fsmde_jax.predict (default tiny)")
    parser.add_argument("--records", required=True, metavar="R", help="records folder, or several with commas between")
    parser.add_argument("--student", default="", metavar="RUN", help="fit to what it says, too: as of load_model")
    parser.add_argument("--labels", type=float, default=0.5, metavar="SHARE", help="that are fitted to (default 0.5)")
    parser.add_argument("--truth", choices=("lidar", "dense"), default="lidar", help="what is measured on")
    parser.add_argument("--image_size", default="", metavar="HxW", help="of the student (default: the records')")
    parser.add_argument("--longer_side", type=int, default=0, metavar="PIXELS", help="of the teacher's input")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="records, spread evenly (default all)")
    parser.add_argument("--out", metavar="FILE.json", help="write the numbers here, too")
    add_teacher_flags(parser)
    args = parser.parse_args(argv)
    with exit_with_message():
        run(args)


if __name__ == "__main__":
    main()
