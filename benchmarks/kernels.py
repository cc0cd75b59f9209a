"""Where a network's time goes on a GPU: time per rig, kernel by kernel, from JAX's own profiler.

    python -m benchmarks.kernels --teachers small base large --attention cudnn      # bfloat16, six 350x630 views
    python -m benchmarks.kernels --students resnet18 --teachers small --attention xla --top 10

Calls are dispatched back to back, as a stream of rigs would be, so their time is the device's and not the host's; then
a few are traced. Images and results stay on the device. Weights are random. TFLOP/s count the operations of
`benchmarks.teacher.gflops`.
"""

import argparse
import dataclasses
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: its folder holds data_prep.py, which would hide the package data_prep
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import latency, teacher
from benchmarks.student import VIEWS

UNCOUNTED, TRACED = 10, 5  # calls


@dataclasses.dataclass
class Kernel:
    """All runs of one kernel in a trace: microseconds together, and how often."""

    microseconds: float = 0.0
    runs: int = 0


def kernels_of(events: Iterable[dict[str, Any]]) -> dict[str, Kernel]:
    """Kernels on a GPU's streams in the `traceEvents` of a Chrome trace as JAX writes it, longest first."""
    events = list(events)
    named = {(e["name"], e["pid"], e.get("tid")): e["args"]["name"] for e in events if e.get("ph") == "M"}
    devices = {pid for (kind, pid, _), name in named.items() if kind == "process_name" and "GPU" in name}
    streams = {(pid, tid) for (kind, pid, tid), name in named.items() if kind == "thread_name" and "Stream" in name}
    found: dict[str, Kernel] = {}
    for event in events:
        if event.get("ph") == "X" and event["pid"] in devices and (event["pid"], event["tid"]) in streams:
            kernel = found.setdefault(event["name"], Kernel())
            kernel.microseconds += event["dur"]
            kernel.runs += 1
    return dict(sorted(found.items(), key=lambda item: -item[1].microseconds))


def back_to_back(call: Callable[[], Any], repeats: int) -> float:
    """Seconds per call of `repeats` that are dispatched without waiting for each other."""
    import jax

    for _ in range(UNCOUNTED):
        result = call()
    jax.block_until_ready(result)
    started = time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / repeats


def traced(call: Callable[[], Any]) -> dict[str, Kernel]:
    """Kernels of `TRACED` calls."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(TRACED):
                jax.block_until_ready(call())
        path = next(Path(folder).rglob("*.trace.json.gz"))
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return kernels_of(json.load(file)["traceEvents"])


def measure(side: latency.Side, args: argparse.Namespace) -> dict[str, Any]:
    """Times and kernels of one network, per call, i.e. for a rig of six views."""
    import jax

    run, arguments = latency.program(side, args.size)
    counted = run
    if side.kind == "teacher":
        run = teacher.port(side.name, side.dtype, args.attention)
        counted = teacher.port(side.name, side.dtype, teacher.COUNTED)
    compiled = run.lower(*arguments).compile()

    def call() -> Any:
        return compiled(*arguments)

    seconds, kernels = back_to_back(call, args.repeats), traced(call)
    row = {
        "side": side.label, "attention": args.attention if side.kind == "teacher" else None,
        "device": jax.devices()[0].device_kind, "seconds": seconds,
        "kernel_seconds": sum(kernel.microseconds for kernel in kernels.values()) / TRACED / 1e6,
        "kernels": [
            {"name": name, "microseconds": kernel.microseconds / TRACED, "runs": kernel.runs / TRACED}
            for name, kernel in kernels.items()
        ],
    }  # fmt: skip
    return row | teacher.share_of_peak(1e9 * teacher.gflops(counted, *arguments), row["device"], seconds)


def show(row: dict[str, Any], top: int) -> str:
    """A row in Markdown."""
    share = f", {100 * row['share_of_16_bit_peak']:.0f} % of the 16-bit peak" if "share_of_16_bit_peak" in row else ""
    lines = [
        f"\n{row['side']} on {row['device']}: {1e3 * row['seconds']:.3f} ms per rig back to back, of which kernels"
        f" {1e3 * row['kernel_seconds']:.3f} ms; {row['tflops']:.0f} TFLOP/s{share}\n",
        "| kernel | us per rig | runs | share |", "|---|---|---|---|",
    ]  # fmt: skip
    for kernel in row["kernels"][:top]:
        part = kernel["microseconds"] / row["kernel_seconds"] / 1e4
        lines.append(f"| {kernel['name'][:70]} | {kernel['microseconds']:.1f} | {kernel['runs']:.0f} | {part:.1f} % |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--students", nargs="+", default=[], metavar="ENCODER", help="default: none")
    parser.add_argument("--teachers", nargs="*", default=["small"], metavar="VARIANT", help="default: small")
    parser.add_argument("--size", default="352x640", metavar="HxW", help="of the images, pixels (default 352x640)")
    parser.add_argument("--dtype", default="bfloat16", help="float32 or bfloat16 (default)")
    parser.add_argument("--attention", choices=("xla", "cudnn"), help="of teachers (default: as vit.attend chooses)")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls (default 20)")
    parser.add_argument("--top", type=int, default=15, help="kernels shown (default 15)")
    parser.add_argument("--out", metavar="FILE.json", help="write the numbers here, too")
    args = parser.parse_args()
    from fsmde_jax.errors import exit_with_message

    with exit_with_message():
        run(args)


def check(args: argparse.Namespace) -> None:
    """Checks the flags before any work and turns --size into numbers.

    Raises:
      ConfigError: a flag that cannot work, or no GPU.
    """
    import jax

    from fsmde_jax.errors import ConfigError

    flags = ["--no-torch", "--size", args.size, "--dtype", args.dtype, "--repeats", f"{args.repeats}"]
    checked = latency.parse(flags)
    checked.students, checked.teachers = args.students, args.teachers
    latency.check(checked)
    args.students, args.teachers, args.size = checked.students, checked.teachers, checked.size
    if not args.students and not args.teachers:
        raise ConfigError("--students, --teachers: name at least one network")
    if args.attention == "cudnn" and args.dtype == "float32":
        raise ConfigError("--attention cudnn: 16-bit dtypes only; leave it out, or --dtype bfloat16")
    if jax.default_backend() != "gpu":
        raise ConfigError(f"needs a GPU, but JAX runs on {jax.default_backend()}; see benchmarks.latency --profile")


def run(args: argparse.Namespace) -> None:
    """Measures what the flags describe, prints it and writes --out."""
    from fsmde_jax import identity
    from fsmde_jax.data.tfrecord import write_atomically
    from fsmde_jax.errors import DataError

    check(args)
    names = [("student", name) for name in args.students] + [("teacher", name) for name in args.teachers]
    rows = []
    for kind, name in names:
        rows.append(measure(latency.Side(kind, name, args.dtype), args))
        print(show(rows[-1], args.top), flush=True)
    if args.out:
        about: dict[str, Any] = identity.run_identity({}, {})
        about = {key: about[key] for key in ("date", "commit", "versions", "hardware")} | {"views": VIEWS}
        try:
            write_atomically(Path(args.out), (json.dumps(about | {"rows": rows}, indent=1) + "\n").encode())
        except OSError as error:
            raise DataError(f"{args.out}: cannot write ({error.strerror}); choose another place") from error


if __name__ == "__main__":
    main()
