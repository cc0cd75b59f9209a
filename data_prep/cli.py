"""Flags and steps that all converters share."""

import argparse
import contextlib
import functools
import importlib
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import leakage, record_writer
from data_prep import manifest as manifests
from data_prep.plan import BuildOptions, Source, build_sample, take
from fsmde_jax.data import schema
from fsmde_jax.errors import ConfigError, DataError

_DRY_RUN_SAMPLES = 4
MAX_SIDE = 65535  # pixels, the limit of JPEG


def parse_size(text: str) -> tuple[int, int] | None:
    """(height, width) of `HxW`, None of `native`."""
    if text == "native":
        return None
    try:
        height, width = (int(x) for x in text.lower().split("x"))
        if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected HEIGHTxWIDTH such as 352x640, or 'native' (at most {MAX_SIDE}); got {text!r}"
        ) from None
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


def usable_cores() -> int:
    """Cores that this process may run on (containers and job schedulers lend fewer than there are)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_memory() -> float:
    """Bytes that new processes may take: what is free now, within a container's limit; infinite where unknown."""
    found = []
    with contextlib.suppress(OSError, AttributeError):  # Linux
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        found.append(1024.0 * int(re.search(r"MemAvailable:\s*(\d+)", text).group(1)))  # type: ignore[union-attr]
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        found.append(float(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))))
    if not found:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    return min(found, default=float("inf"))


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM (from a job scheduler) raises KeyboardInterrupt in the body, as Ctrl-C does; main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
        default=usable_cores(),
        help="processes (default: all cores that this process may use); the records do not depend on it",
    )
    parser.add_argument(
        "--on_error",
        choices=("stop", "skip"),
        default="stop",
        help="skip: leave out damaged samples and list them in the manifest",
    )
    parser.add_argument(
        "--runner", metavar="RUNNER",
        help="convert by Apache Beam instead of --workers: DirectRunner, DataflowRunner, FlinkRunner, SparkRunner ..."
        " (docs/scaling.md)",
    )  # fmt: skip
    parser.add_argument(
        "--beam_options", default="", metavar="'--key=value ...'", help="pipeline options of Beam, with --runner"
    )
    parser.add_argument("--dry_run", action="store_true", help="print samples, time and disk estimates; write nothing")


def check_flags(args: argparse.Namespace) -> None:
    """`ConfigError` for numbers out of range, and for a split that cannot be part of a file name."""
    for name, low, high in (("jpeg_quality", 1, 100), ("sweeps", 0, 1000), ("workers", 1, 1024), ("limit", 1, 10**9)):
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"--{name}={value}: expected {low} to {high}")
    split = getattr(args, "split", "train")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise ConfigError(f"--split={split}: expected letters, digits, _ and - only; it becomes part of file names")


def opener(function: str, *arguments: Any, **options: Any) -> Callable[[], Source]:
    """A picklable call of `module:function`: by name, as the module that runs as a command has another one."""
    return functools.partial(_call, function, arguments, options)


def _call(function: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Source:
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)(*arguments, **options)


def _opened(open_source: Callable[[], Source], samples: slice, limit: int | None) -> Source:
    return take(take(open_source(), samples), slice(limit))


def run(args: argparse.Namespace, open_source: Callable[[], Source]) -> None:
    """Converts a source (or only estimates, with --dry_run) and says what was made.

    `open_source` is picklable, as workers of Apache Beam call it, too. Exits with status 1 if a dry run found a
    problem, 130 if interrupted.
    """
    if args.beam_options and not args.runner:
        raise ConfigError("--beam_options belong to --runner")
    try:
        beam_options = tuple(shlex.split(args.beam_options))
    except ValueError as error:
        raise ConfigError(f"--beam_options {args.beam_options!r}: {error}; expected '--key=value ...'") from error
    open_part = functools.partial(_opened, open_source, args.samples, args.limit)
    source = open_part()
    options = BuildOptions(args.image_size, args.jpeg_quality, source.point_rule)
    if args.dry_run:
        _dry_run(source, options, args)
        return
    leakage.check_siblings(Path(args.out), source)
    started = time.perf_counter()
    try:
        with terminate_as_interrupt():
            made = record_writer.convert(
                source, args.out, options, sweeps=args.sweeps, workers=args.workers, on_error=args.on_error,
                cluster=record_writer.Cluster(open_part, args.runner, beam_options) if args.runner else None,
            )  # fmt: skip
    except KeyboardInterrupt:
        print(f"\n{args.out}: interrupted; the same command goes on from the finished shards", file=sys.stderr)
        sys.exit(130)
    seconds = time.perf_counter() - started
    size = sum(shard["num_bytes"] for shard in made.shards)
    print(
        f"{args.out}: {made.num_samples} samples ({manifests.kind(made)}), {len(made.cameras)} cameras,"
        f" {size / 1e6:.1f} MB, {seconds:.0f} s"
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
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        kind = "is not writable" if folder.is_dir() else "is not a folder"
        problems.append(f"--out={args.out} cannot be made: {folder} {kind}")
    elif (folder == Path(args.out).absolute()) and (folder / schema.MANIFEST_NAME).exists():
        print(f"note: {args.out} holds a finished conversion already")
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
    if problems:
        sys.exit(1)
