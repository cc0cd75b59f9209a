"""How far a teacher's map is off in metres, once `distill.bins=aligned` has fitted it: which `distill.shift` suits it?

  python -m benchmarks.alignment --teacher lite0 --records records/ablation_nuscenes_val --image_size 64x128 \
      --longer_side 192 --labels 0.06 --truth dense --student docs/results/runs/ablation/nuscenes/supervised/seed0
  python -m benchmarks.alignment --teacher teachers/small --records records/nuscenes_train --limit 200 --labels 0.5

Per view the map is fitted to a share of its LiDAR labels (--labels) and, with --student, to what a student says of
it, as in a view without labels; then abs_rel is measured on the other labels, or on exact depth (--truth dense). A row
per way of fitting: scale alone (`distill.shift=known`), scale and shift (`unknown`), and, for comparison, scale and
shift by least squares of depth's relative error and of inverse depth. Means over the views that every way can fit.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fsmde_jax import interpolate, load_model
from fsmde_jax.convert import add_teacher_flags
from fsmde_jax.data.pipeline import chosen_indices, eval_batches
from fsmde_jax.data.records import open_records, require_dense_depth
from fsmde_jax.errors import ConfigError, DataError, exit_with_message
from fsmde_jax.eval_data import label_maps
from fsmde_jax.losses import teacher_bins
from fsmde_jax.models.student import normalise_images
from fsmde_jax.models.teacher_images import LONGER_SIDE, teacher_size
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
    """Scale > 0 and shift of the least squares of D (s r + t) - 1, or of s r + t - 1 / D; NumPy, float64."""

    def run(r: np.ndarray, depth: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at_labels, inverse = upsampled(r, depth.shape[2:]), np.full(r.shape, np.nan)
        for view in range(r.shape[1]):
            known = mask[0, view]
            if known.sum() < teacher_bins.MIN_LABELS:
                continue
            x, d = (a[0, view][known].astype(np.float64) for a in (at_labels, depth))
            weight = d if relative else np.ones_like(d)
            (s, t), *_ = np.linalg.lstsq(np.stack([weight * x, weight], -1), weight / d, rcond=None)
            if s > 0:
                inverse[0, view] = s * r[0, view] + t
        valid = np.isfinite(inverse).all((2, 3))
        return 1 / np.clip(np.where(valid[..., None, None], inverse, 1), 1 / max_depth, 1 / min_depth), valid

    return run


def run(args: argparse.Namespace) -> None:
    """The measurement that the flags describe: prints its table."""
    if not 0 < args.labels < 1 and args.truth == "lidar":
        raise ConfigError(f"--labels {args.labels}: expected a share between 0 and 1: the others are measured on")
    teacher = open_teacher(args.teacher, variant=args.variant, version=args.version, max_depth=args.max_depth)
    records = open_records(args.records)
    if args.truth == "dense":
        require_dense_depth(records, "--truth dense")
    low, high = records.manifest.min_depth, records.manifest.max_depth
    size = args.image_size or tuple(int(side) for side in records[0].image_size[0])
    student = load_model(args.student) if args.student else None
    ways = {
        "scale (distill.shift=known)": trained_with(False, low, high),
        "scale and shift (distill.shift=unknown)": trained_with(True, low, high),
        "scale and shift, least squares of relative depth": least_squares(True, low, high),
        "scale and shift, least squares of inverse depth": least_squares(False, low, high),
    }
    r_of, rng = maps_of(teacher, size, args.longer_side), np.random.default_rng(0)
    errors: dict[str, list[np.ndarray]] = {}  # what was fitted to -> [ways] of a view, each
    own_error: list[float] = []
    total = len(chosen_indices(len(records), args.limit))
    batches = eval_batches(records, size, 1, args.limit)
    for batch, samples, _ in tqdm(batches, total=total, unit="rig", disable=None, dynamic_ncols=True):
        r, lidar = r_of(batch["images"]), batch["depth"]
        known = (lidar > low) & (lidar < high) & batch["ego_mask"]
        fitted = known & (rng.random(known.shape) < args.labels)
        truth = label_maps(batch, samples, args.truth)
        counts = (truth > low) & (truth < high) & batch["ego_mask"]
        if args.truth == "lidar":
            counts &= ~fitted
        to = {"labels": (lidar, fitted)}
        if student is not None:
            says = np.stack(student(batch["images"][0], batch["intrinsics"][0], batch["cam_to_ego"][0]).depth)[None]
            to["student"] = says, (says > low) & (says < high) & batch["ego_mask"]
            own_error.append(float(np.mean(np.abs(says / np.where(counts, truth, 1) - 1)[counts])))
        for name, (depth, mask) in to.items():
            found = [way(r, depth, mask) for way in ways.values()]
            fits = np.all([valid for _, valid in found], 0) & counts.any((2, 3))
            for view in np.flatnonzero(fits[0]):
                at, d = counts[0, view], truth[0, view]
                off = [np.abs(upsampled(m, size)[0, view][at] / d[at] - 1).mean() for m, _ in found]
                errors.setdefault(name, []).append(np.asarray(off))
    if not errors:
        raise DataError(f"{args.records}: no view has {teacher_bins.MIN_LABELS} labels to fit; use a larger --labels")
    print(f"## {teacher.card.source or teacher.card.variant}, {total} records, abs_rel on {args.truth} depth\n")
    print("| fitted by | " + " | ".join(f"to the {name}, {len(e)} views" for name, e in errors.items()) + " |")
    print("|---" * (len(errors) + 1) + "|")
    means = {name: np.mean(each, 0) for name, each in errors.items()}
    for i, way in enumerate(ways):
        print(f"| {way} | " + " | ".join(f"{mean[i]:.4f}" for mean in means.values()) + " |")
    if own_error:
        print(f"\nThe student itself: {np.mean(own_error):.4f}.")


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: expected HEIGHTxWIDTH, e.g. 352x640")
    return int(found[1]), int(found[2])


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
    parser.add_argument("--image_size", type=_size, metavar="HxW", help="of the student (default: the records')")
    parser.add_argument("--longer_side", type=int, default=0, metavar="PIXELS", help="of the teacher's input")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="records, spread evenly (default all)")
    add_teacher_flags(parser)
    args = parser.parse_args(argv)
    with exit_with_message():
        run(args)


if __name__ == "__main__":
    main()
