"""Efficiency of the students against their teachers: parameters, GFLOPs, time, rigs/s and peak memory.

    python -m benchmarks.latency                                   # all students, Small here and in PyTorch, float32
    python -m benchmarks.latency --students resnet18 --teachers small base --compile --onnx --out latency.json
    python -m benchmarks.latency --dtype bfloat16 --rigs 16        # on a GPU: so many rigs at once
    python -m benchmarks.latency --profile resnet18                # where a student's time goes, instead

A rig is six views; a call takes --rigs of them. Students are those of configs/base.py, from uint8 images to metres at
input resolution. Teachers are Depth Anything V2 on the largest size of that shape whose sides are multiples of 14
(350x630 for 352x640); they get normalised images and are spared the resizing. Small also runs in PyTorch, eager and
with --compile, from the same weights. With --onnx students run in onnxruntime, too, as `fsmde_jax.export` writes them,
and so does Small, as PyTorch writes it. Weights are random.

All sides are timed in turn in one process with the same cores and settings of malloc (`benchmarks.teacher`), without
compilation; on a GPU PyTorch runs there, too. Memory is measured in a process of its own for each network, above
weights and inputs (CPU only). A multiplication and an addition are two FLOPs, as XLA counts them before compilation;
products with padding are not counted. The last lines divide the time of a teacher's fastest side by each student's.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as a file: its folder holds data_prep.py, which would hide the package data_prep
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import memory, teacher
from benchmarks.student import VIEWS, Size, exported_call, profile, profile_table, student

WITH_TORCH = "small"  # the teacher that also runs in PyTorch and onnxruntime
# Packages; onnxscript is what PyTorch's export of the teacher needs.
NEEDED = {"torch": ("torch", "transformers"), "onnx": ("onnx", "onnxruntime"), "both": ("onnxscript",)}


@dataclasses.dataclass(frozen=True)
class Side:
    """One network, dtype and way of running it."""

    kind: str  # student | teacher
    name: str  # encoder or variant
    dtype: str
    way: str = "here"  # here | PyTorch eager | PyTorch compiled | onnxruntime

    @property
    def label(self) -> str:
        """What it is called in tables and JSON."""
        return f"{self.name}, {self.dtype}" + ("" if self.way == "here" else f", {self.way}")


def teacher_shape(size: Size, views: int = VIEWS) -> str:
    """Input of a teacher for images of `size`, as `benchmarks.teacher` writes it: views x height x width."""
    from fsmde_jax.models.teacher_images import PATCH, teacher_size

    height, width = teacher_size(size, max(size) // PATCH * PATCH)
    return f"{views}x{height}x{width}"


def built(side: Side, size: Size, views: int = VIEWS) -> tuple[Any, Any, tuple[Any, ...]]:
    """The module of a student (None for teachers), its jitted function and arguments; students take whole rigs."""
    import jax

    if side.kind == "student":
        return student(side.name, side.dtype, size, views // VIEWS)
    images = jax.device_put(teacher.images(teacher_shape(size, views)))
    return None, teacher.port(side.name, side.dtype), (teacher.random_parameters(side.name), images)


def program(side: Side, size: Size, views: int = VIEWS) -> tuple[Any, tuple[Any, ...]]:
    """The jitted function of a side of this project and its arguments."""
    return built(side, size, views)[1:]


def onnx_call(model: Any, array: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
    """onnxruntime on PyTorch's export of `model`: a call that gives inverse depth [M, H, W] of images `array`."""
    import onnxruntime
    import torch

    class Output(torch.nn.Module):
        """Inverse depth alone, as exporters want tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Any) -> Any:
            return self.inner(x).predicted_depth

    x = np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else it takes time from the next side
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "teacher.onnx")
        torch.onnx.export(Output().eval(), (torch.from_numpy(x),), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})[0]


def other_calls(model: Any, dtype: str, size: Size, args: argparse.Namespace) -> dict[Side, Callable[[], Any]]:
    """Calls of Small's sides outside this project, with the weights of `model`."""
    array = teacher.images(teacher_shape(size, args.rigs * VIEWS))
    calls = teacher.torch_calls(model, array, dtype, args.threads, args.compile)
    if args.onnx and dtype == "float32":
        calls["onnxruntime"] = onnx_call(model, array, args.threads)
    return {Side("teacher", WITH_TORCH, dtype, way): call for way, call in calls.items()}


def _peak(side: Side, size: Size, args: argparse.Namespace) -> float:
    views = args.rigs * VIEWS
    if side.way == "here":
        run, arguments = program(side, size, views)
        compiled = run.lower(*arguments).compile()
        return memory.raised_peak(lambda: np.asarray(compiled(*arguments)))
    if side.kind == "student":
        model, _, arguments = student(side.name, side.dtype, size)
        return memory.raised_peak(exported_call(model, arguments, size, args.threads))
    model = teacher.reference_model(side.name)
    only = argparse.Namespace(threads=args.threads, rigs=args.rigs, compile=False, onnx=side.way == "onnxruntime")
    return memory.raised_peak(other_calls(model, side.dtype, size, only)[side])


def _of_views(side: Side, size: Size, views: int) -> float:
    run, arguments = program(side, size, views=1)
    return views * teacher.gflops(run, *arguments)


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Everything that is measured, one row for each side."""
    import jax

    calls: dict[Side, Callable[[], Any]] = {}
    known: dict[tuple[str, str], dict[str, Any]] = {}  # by name and dtype: what does not depend on the way of running
    views = args.rigs * VIEWS
    chosen = [("student", name) for name in args.students] + [("teacher", name) for name in args.teachers]
    model = teacher.reference_model(WITH_TORCH) if args.torch and WITH_TORCH in args.teachers else None
    for kind, name in chosen:
        for dtype in args.dtype:
            side = Side(kind, name, dtype)
            own, run, arguments = built(side, args.size, views)
            compiled = run.lower(*arguments).compile()
            if kind == "student":
                count, taken = teacher.gflops(run, *arguments), f"{views}x{args.size[0]}x{args.size[1]}"
            else:  # its views run one after the other, in a loop
                count, taken = _of_views(side, args.size, views), teacher_shape(args.size, views)
            if model is not None and name == WITH_TORCH:
                arguments = (teacher.our_program(model, name, dtype)[1], *arguments[1:])
            parameters = sum(leaf.size for leaf in jax.tree.leaves(arguments[0]))
            analysis = compiled.memory_analysis()
            temporary = {} if analysis is None else {"xla_temporary_mb": analysis.temp_size_in_bytes / 2**20}
            known[name, dtype] = {"parameters": parameters, "gflops": count, "input": taken} | temporary
            calls[side] = lambda run=compiled, given=arguments: jax.block_until_ready(run(*given))  # type: ignore[misc]
            if model is not None and name == WITH_TORCH:
                calls |= other_calls(model, dtype, args.size, args)
            if args.onnx and kind == "student" and dtype == "float32":
                exported = exported_call(own, arguments, args.size, args.threads)
                calls[dataclasses.replace(side, way="onnxruntime")] = exported
    seconds = teacher.time_sides({side.label: call for side, call in calls.items()}, args.repeats)
    rows = []
    for side, call in calls.items():
        row = {"side": side.label, **dataclasses.asdict(side), **known[side.name, side.dtype]}
        if side.way != "here":
            row.pop("xla_temporary_mb", None)
            here = np.asarray(calls[dataclasses.replace(side, way="here")]())
            row["relative_error"] = teacher.relative(teacher.as_array(call()), here)
        times = seconds[side.label]
        row |= {"seconds": times, "median": statistics.median(times), "min": min(times), "max": max(times)}
        row["rigs_per_s"] = args.rigs / row["median"]
        rows.append(row)
    if args.memory and jax.default_backend() == "cpu":
        for side, row in zip(calls, rows, strict=True):
            if side.way != "PyTorch compiled":  # its first call compiles
                row["peak_memory_mb"] = memory.in_own_process(_peak, side, args.size, args)
    return rows


def speedups(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Teacher -> its fastest side, that one's median and by how much each student is faster; the default one last."""
    found = {}
    names = {row["name"]: None for row in rows if row["kind"] == "teacher"}
    for name in sorted(names, key=lambda name: name == WITH_TORCH):
        fastest = min((row for row in rows if row["name"] == name), key=lambda row: row["median"])
        ratios = {row["side"]: fastest["median"] / row["median"] for row in rows if row["kind"] == "student"}
        found[name] = {"fastest": fastest["side"], "median": fastest["median"], "times_faster": ratios}
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| side | input | parameters | GFLOPs | median s | min | max | rigs/s | peak MB |", "|---" * 9 + "|"]
    for row in rows:
        peak = f"{row['peak_memory_mb']:.0f}" if "peak_memory_mb" in row else "-"
        times = " | ".join(f"{row[key]:.4g}" for key in ("median", "min", "max"))
        size = f"{row['parameters'] / 1e6:.2f} M | {row['gflops']:.1f}"
        lines.append(f"| {row['side']} | {row['input']} | {size} | {times} | {row['rigs_per_s']:.4g} | {peak} |")
    return "\n".join(lines)


def check(args: argparse.Namespace) -> None:
    """Checks the flags before any work, makes names unique and turns --size into numbers.

    Raises:
      ConfigError: unknown name, a number that cannot be used, or a package that is needed and not installed.
    """
    from fsmde_jax.errors import ConfigError
    from fsmde_jax.models import registry
    from fsmde_jax.models.depth_anything import VARIANTS
    from fsmde_jax.models.student import STRIDE
    from fsmde_jax.names import check_name, parse_size

    known: dict[str, Iterable[str]] = {"teachers": VARIANTS, "dtype": registry.DTYPES}
    for flag, names in (known | dict.fromkeys(("students", "profile"), registry.ENCODERS)).items():
        setattr(args, flag, list(dict.fromkeys(getattr(args, flag))))
        for name in getattr(args, flag):
            check_name(f"--{flag}", name, names)
    args.size = parse_size(args.size, "--size", STRIDE)
    for flag in ("repeats", "threads", "rigs"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag} {getattr(args, flag)}: expected at least 1")
    if args.profile:
        if args.rigs > 1:
            raise ConfigError("--profile: of one rig; leave out --rigs")
        return
    with_torch = args.torch and WITH_TORCH in args.teachers
    if args.compile and not with_torch:
        raise ConfigError(f"--compile: of teacher {WITH_TORCH}; put that in --teachers, without --no-torch")
    if args.onnx and args.rigs > 1:
        raise ConfigError("--onnx: the exported students are timed on one rig; leave out --rigs")
    if args.onnx and "float32" not in args.dtype:
        raise ConfigError("--onnx: onnxruntime's processor kernels want float32; add it to --dtype")
    chosen = {"torch": with_torch, "onnx": args.onnx, "both": with_torch and args.onnx}
    args.needed = [package for key, packages in NEEDED.items() if chosen[key] for package in packages]
    missing = [package for package in args.needed if importlib.util.find_spec(package) is None]
    if missing:
        flag = "pass --no-torch" if set(missing) & set(NEEDED["torch"]) else "leave out --onnx"
        raise ConfigError(f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}, or {flag}")


def run(args: argparse.Namespace) -> None:
    """The measurement that the checked flags describe: prints it and writes --out."""
    import jax

    from fsmde_jax import identity
    from fsmde_jax.data.tfrecord import write_atomically
    from fsmde_jax.errors import ConfigError, DataError

    if jax.default_backend() != "cpu" and not args.profile:
        if args.torch and WITH_TORCH in args.teachers:
            teacher.torch_device()
        if args.onnx:
            raise ConfigError(f"onnxruntime would run on the processor, JAX on {jax.default_backend()}: no --onnx")
    load = os.getloadavg()[0]
    result: dict[str, Any] = identity.run_identity({}, {})
    result = {key: result[key] for key in ("date", "commit", "versions", "hardware")}
    if not args.profile:
        result["versions"] |= {package: importlib.metadata.version(package) for package in args.needed}
    result["hardware"] |= {"threads": args.threads, "load_average_before": load}
    result |= {"command": args.command, "views": VIEWS, "rigs": args.rigs, "repeats": args.repeats}
    if args.profile:
        result["profiles"] = []
        for encoder in args.profile:
            for dtype in args.dtype:
                result["profiles"].append(profile(encoder, dtype, args.size, args.repeats))
                print(profile_table(result["profiles"][-1]), flush=True)
    else:
        result["rows"] = compare(args)
        result["speedups"] = speedups(result["rows"])
        print(f"{table(result['rows'])}\n")
    device, cores = result["hardware"]["device"], result["hardware"]["cores"]
    print(f"{device}, {args.threads} of {cores} cores, jax {jax.__version__}, load average before {load:.1f}")
    for name, found in result.get("speedups", {}).items():
        print(f"\nFastest side of {name} that was run: {found['fastest']}, {found['median']:.4g} s")
        for side, ratio in found["times_faster"].items():
            print(f"  {side} is {ratio:.2f} times as fast")
    if args.out:
        try:
            write_atomically(Path(args.out), (json.dumps(result, indent=1) + "\n").encode())
        except OSError as error:
            raise DataError(f"{args.out}: cannot write ({error.strerror}); choose another place") from error


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, not yet checked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    encoders = ("resnet18", "resnet34", "resnet50", "efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
    parser.add_argument("--students", nargs="+", default=encoders, metavar="ENCODER", help="default: all encoders")
    parser.add_argument("--teachers", nargs="+", default=[WITH_TORCH], metavar="VARIANT", help="default: small")
    parser.add_argument("--size", default="352x640", metavar="HxW", help="of the images, pixels (default 352x640)")
    parser.add_argument("--rigs", type=int, default=1, metavar="N", help="rigs of six views in a call (default 1)")
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="float32, bfloat16 or both (default float32)")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each side (default 7)")
    parser.add_argument("--threads", type=int, default=2, help="cores of all sides (default 2)")
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="time this project only")
    parser.add_argument("--compile", action="store_true", help="time torch.compile, too")
    parser.add_argument("--onnx", action="store_true", help="time onnxruntime, too, students and Small; float32")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the memory runs")
    parser.add_argument("--profile", nargs="+", default=[], metavar="ENCODER", help="time these students' pieces only")
    parser.add_argument("--out", metavar="FILE.json", help="write the numbers here, too")
    args = parser.parse_args(argv)
    args.command = shlex.join([*parser.prog.split(), *(sys.argv[1:] if argv is None else argv)])
    return args


def main() -> None:
    """Command line."""
    args = parse()
    teacher.same_conditions(max(args.threads, 1))
    from fsmde_jax.errors import exit_with_message

    with exit_with_message():
        check(args)
        run(args)


if __name__ == "__main__":
    main()
