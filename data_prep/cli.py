"""Flags and steps that all converters share."""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from data_prep import leakage, record_writer
from data_prep.plan import BuildOptions, Source, build_sample, take
from fsmde_jax.data import schema
from fsmde_jax.errors import ConfigError, DataError

_DRY_RUN_SAMPLES = 4


def parse_size(text: str) -> tuple[int, int] | None:
    """(height, width) of `HxW`, None of `native`."""
    if text == "native":
        return None
    try:
        height, width = (int(x) for x in text.lower().split("x"))
        if height < 1 or width < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 352x640, or 'native'; got {text!r}") from None
    return height, width


def parse_slice(text: str) -> slice:
    """A Python slice from `START:STOP:STEP`, each part optional."""
    parts = text.split(":")
    try:
        numbers = [int(part) if part else None for part in parts]
    except ValueError:
        numbers = []
    step = numbers[2] if len(numbers) == 3 else None
    if len(numbers) not in (2, 3) or (step is not None and step < 1):
        raise argparse.ArgumentTypeError(f"expected START:STOP or START:STOP:STEP, e.g. ::2 or 10:20; got {text!r}")
    return slice(*numbers)


def add_common_flags(parser: argparse.ArgumentParser, *, image_size: str) -> None:
    """Adds the flags of `run`."""
    parser.add_argument("--out", required=True, metavar="R", help="records folder to write: one folder = one split")
    parser.add_argument(
        "--image_size", type=parse_size, default=parse_size(image_size), metavar="HxW",
        help=f"stored image size (default {image_size}); 'native' keeps JPEG files byte for byte",
    )  # fmt: skip
    parser.add_argument(
        "--jpeg_quality", type=int, default=95, help="quality of images that are encoded again (default 95)"
    )
    parser.add_argument("--cameras", nargs="+", metavar="NAME", help="cameras to take (default: all)")
    parser.add_argument(
        "--sweeps",
        type=int,
        default=0,
        metavar="K",
        help="neighbouring LiDAR sweeps added to the TRAINING labels (default 0)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="convert the first N samples only")
    parser.add_argument(
        "--samples", type=parse_slice, default=slice(None), metavar="START:STOP:STEP",
        help="convert these samples only, as in a Python slice, e.g. ::2 for every other one",
    )  # fmt: skip
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes (default: all cores); the records do not depend on it",
    )
    parser.add_argument(
        "--on_error",
        choices=("stop", "skip"),
        default="stop",
        help="skip: leave out damaged samples and list them in the manifest",
    )
    parser.add_argument("--dry_run", action="store_true", help="print samples, time and disk estimates; write nothing")


def check_flags(args: argparse.Namespace) -> None:
    """`ConfigError` for numbers out of range."""
    for name, low, high in (("jpeg_quality", 1, 100), ("sweeps", 0, 1000), ("workers", 1, 1024), ("limit", 1, 10**9)):
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"--{name}={value}: expected {low} to {high}")


def run(args: argparse.Namespace, source: Source) -> None:
    """Converts `source` (or only estimates, with --dry_run) and says what was made."""
    source = take(take(source, args.samples), slice(args.limit))
    options = BuildOptions(args.image_size, args.jpeg_quality, source.point_rule)
    if args.dry_run:
        _dry_run(source, options, args)
        return
    leakage.check_siblings(Path(args.out), source)
    started = time.perf_counter()
    try:
        made = record_writer.convert(
            source, args.out, options, sweeps=args.sweeps, workers=args.workers, on_error=args.on_error
        )
    except KeyboardInterrupt:
        print(f"\n{args.out}: interrupted; the same command goes on from the finished shards", file=sys.stderr)
        sys.exit(130)
    seconds = time.perf_counter() - started
    size = sum(shard["num_bytes"] for shard in made.shards)
    kind = "the complete official split" if made.complete_split else "a subset"
    print(
        f"{args.out}: {made.num_samples} samples ({kind}), {len(made.cameras)} cameras, {size / 1e6:.1f} MB,"
        f" {seconds:.0f} s"
    )
    for name, one in made.statistics["cameras"].items():
        if one["samples_without_points"]:
            print(f"  note: camera {name} has no LiDAR point in {one['samples_without_points']} samples")
    if made.skipped:
        print(f"  note: {len(made.skipped)} samples were skipped; manifest.json lists them with reasons")
    print(f"check it with: python -m data_prep.verify {args.out}")


def _dry_run(source: Source, options: BuildOptions, args: argparse.Namespace) -> None:
    """Converts a few samples in memory and extrapolates."""
    total = len(source.sample_ids)
    if total == 0:
        raise DataError(f"split {source.split!r} has no samples here")
    seconds, sizes, problems = [], [], []
    for index in sorted({int(i) for i in np.linspace(0, total - 1, _DRY_RUN_SAMPLES + 1)}):
        started = time.perf_counter()
        try:
            sizes.append(len(schema.encode(build_sample(source.describe(index), options))))
            seconds.append(time.perf_counter() - started)
        except DataError as error:
            problems.append(str(error))
    folder = Path(args.out).absolute()
    while not folder.exists():
        folder = folder.parent
    print(
        f"{source.dataset} {source.version} {source.split}: {total} samples of {len(source.scenes)} scenes,"
        f" {len(source.cameras)} cameras: {', '.join(source.cameras)}"
    )
    if sizes:
        took = seconds[1:] or seconds  # the first one warms up
        minutes = float(np.mean(took)) * total / args.workers / 60
        print(
            f"about {minutes:.1f} minutes with {args.workers} workers ({1 / float(np.mean(took)):.1f} samples/s"
            f" each), {np.mean(sizes) * total / 1e9:.2f} GB of records"
        )
    print(f"free at {folder}: {shutil.disk_usage(folder).free / 1e9:.1f} GB")
    for problem in problems:
        print(f"problem: {problem}")
    print("dry run: nothing was written")
