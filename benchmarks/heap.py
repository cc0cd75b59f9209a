"""What keeping freed memory gives on a CPU (`fsmde_jax.heap`): the same training step under settings of malloc.

    python -m benchmarks.heap                                        # six 96x160 views, EfficientNet-Lite0
    python -m benchmarks.heap --size 352x640 --encoder resnet18 --steps 1

Each side is a process of its own, and they take turns. The step is that of configs/nuscenes.py with the teacher's maps
and tokens in the batch: the student's forward and backward pass and the update. Ratios are medians over the rounds.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: its folder holds data_prep.py, which would hide the package data_prep
    sys.path[0] = str(Path(__file__).resolve().parents[1])

# Side -> its environment, and whether it keeps freed memory.
SIDES = {
    "glibc's own settings": ({}, False),
    "freed memory kept": ({}, True),
    "kept, in huge pages": ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, True),
}


def serve(asked: Any, keep: bool, args: argparse.Namespace) -> None:
    """A side: makes the step, then as many steps as it is asked for, and sends (seconds, page faults) of each."""
    from fsmde_jax import heap

    kept = heap.keep_freed_memory() if keep else False
    from benchmarks.step import Ours

    call = Ours(args).cached()
    for _ in range(args.uncounted):
        call()
    asked.send(kept)
    while count := asked.recv():
        faults, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        for _ in range(count):
            call()
        seconds = time.perf_counter() - started
        asked.send((seconds / count, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / count))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Side -> seconds of a step and page faults of a step in each round."""
    context = multiprocessing.get_context("spawn")
    before, sides = dict(os.environ), {}
    found: dict[str, Any] = {name: {"seconds": [], "page_faults": []} for name in SIDES}
    for name, (environment, keep) in SIDES.items():
        ours, theirs = context.Pipe()
        os.environ.update({"JAX_PLATFORMS": "cpu", **environment})  # malloc reads it when a process starts
        process = context.Process(target=serve, args=(theirs, keep, args), daemon=True)
        process.start()
        os.environ.clear()
        os.environ.update(before)
        theirs.close()
        if ours.recv() != keep:
            raise RuntimeError(f"{name}: malloc's settings could not be made, or the environment has others")
        sides[name] = ours
    for _ in range(args.rounds):
        for name, side in sides.items():
            side.send(args.steps)
            seconds, faults = side.recv()
            found[name]["seconds"].append(seconds)
            found[name]["page_faults"].append(faults)
    for side in sides.values():
        side.send(0)
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown, beside the first side."""
    first = next(iter(found.values()))["seconds"]
    lines = ["| | s a step | of the first | page faults a step |", "|---|---|---|---|"]
    for name, side in found.items():
        ratio = statistics.median(mine / other for mine, other in zip(side["seconds"], first, strict=True))
        lines.append(
            f"| {name} | {statistics.median(side['seconds']):.3f} | {ratio:.2f} |"
            f" {statistics.median(side['page_faults']):.0f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.heap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="96x160", metavar="HxW", help="of the images, pixels (default %(default)s)")
    parser.add_argument("--encoder", default="efficientnet_lite0", help="of the student (default %(default)s)")
    parser.add_argument("--bins", type=int, default=64, help="of the student's head (default %(default)s)")
    parser.add_argument("--cameras", type=int, default=6, help="of the rig (default %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of a side in a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="in which every side has its turn (default %(default)s)")
    parser.add_argument("--uncounted", type=int, default=5, help="steps of a side before (default %(default)s)")
    parser.add_argument("--out", metavar="FILE.json", help="write the numbers here, too")
    args = parser.parse_args(argv)
    command = shlex.join([*parser.prog.split(), *(sys.argv[1:] if argv is None else argv)])
    args = argparse.Namespace(**vars(args), batch=1, dtype="float32", parts=1, fsdp=1, compare=False)
    found = measure(args)
    print(table(found))
    if args.out:
        from fsmde_jax import identity
        from fsmde_jax.data.tfrecord import write_atomically

        known = identity.run_identity({}, {})
        made = {key: known[key] for key in ("date", "commit", "versions", "hardware")}
        write_atomically(
            Path(args.out), (json.dumps({**made, "command": command, "result": found}, indent=1) + "\n").encode()
        )


if __name__ == "__main__":
    main()
