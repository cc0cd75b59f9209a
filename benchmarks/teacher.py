"""Depth Anything here against transformers' PyTorch model: time, agreement, bfloat16 and memory.

    python -m benchmarks.teacher                                   # Small, 1 x 518 x 518 and 6 x 350 x 630, float32
    python -m benchmarks.teacher --variant base --repeats 5 --compile
    python -m benchmarks.teacher --dtype bfloat16 --attention cudnn   # on a GPU: share of its peak as well

Both sides get the same random weights and images, the same cores (`--threads`) and the same settings of glibc's malloc,
those of `fsmde_jax.heap` (without them page faults cost either side up to 2.5 times its time on large tensors). They
are timed in turn in one process; compilation is not counted. Memory is measured in a process of its own for each side.
On a GPU both sides run on it, images and results stay there, and a call's time is from its start until the device is
done.
"""

import argparse
import copy
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as a file: its folder holds data_prep.py, which would hide the package data_prep
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import memory

SIZES = ("1x518x518", "6x350x630")
MALLOC = {  # what fsmde_jax.heap sets, for PyTorch as well
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
# Attention of the program whose operations are counted: no loop, and, unlike cuDNN's, with a form for the CPU.
COUNTED = "xla"
# Dense 16-bit peaks in FLOP/s as NVIDIA's data sheets say; the longest name that a device's name holds counts.
PEAKS = {
    "A100": 312e12, "A10G": 70e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "L4": 121e12, "L40S": 362e12,
    "T4": 65e12, "V100": 125e12, "RTX 4090": 165e12,
}  # fmt: skip


def reference_model(variant: str) -> Any:
    """transformers' Depth Anything with seeded random weights, none of them trivial."""
    import torch
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    from fsmde_jax.models.depth_anything import VARIANTS
    from fsmde_jax.models.dpt import HEAD_WIDTH

    sizes = VARIANTS[variant]
    backbone_kind: Any = Dinov2Config
    backbone = backbone_kind(
        hidden_size=sizes.embed_dim, num_hidden_layers=sizes.depth, num_attention_heads=sizes.heads, image_size=518,
        use_swiglu_ffn=sizes.ffn == "swiglu", out_indices=[i + 1 for i in sizes.taps], reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=sizes.embed_dim, neck_hidden_sizes=list(sizes.widths),
        fusion_hidden_size=sizes.fusion, head_hidden_size=HEAD_WIDTH,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DepthAnythingForDepthEstimation(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim < 2 or "embeddings" in name:
                value.normal_(0.5 if "norm" in name or "lambda" in name else 0.1, 0.1)
            else:
                value.normal_(0, value[0].numel() ** -0.5)
        model.head.conv3.weight.mul_(3)  # a wide range of values, most of them above the last ReLU
        model.head.conv3.bias.fill_(3.0)
    return model


def our_program(model: Any, variant: str, dtype: str, attention: str | None = None) -> tuple[Any, Any]:
    """The jitted port and its parameters, those of `model`; inverse depth only, as the reference returns."""
    import jax

    from fsmde_jax import teacher_weights

    state = {name: value.numpy() for name, value in model.state_dict().items()}
    params, _ = teacher_weights.convert_teacher(state, variant, source="the reference model")
    return port(variant, dtype, attention), jax.device_put(params)


def port(variant: str, dtype: str, attention: str | None = None) -> Any:
    """The jitted port: (parameters, images [M, H, W, 3]) -> inverse depth [M, H, W]."""
    import jax
    import jax.numpy as jnp

    from fsmde_jax.models.depth_anything import DepthAnything

    # transformers leaves out the official offset of the position embedding; the cost is the same.
    on_cpu = jax.default_backend() == "cpu"
    kind = jnp.dtype(dtype)
    module: Any = DepthAnything(variant, dtype=kind, position_offset=0.0, attention=attention, in_turn=on_cpu)
    return jax.jit(lambda p, x: module.apply({"params": p}, x)["rel_inv_depth"])


def random_parameters(variant: str) -> Any:
    """Parameters of the port that need no PyTorch: small random numbers, for time and memory only."""
    import jax

    from fsmde_jax.teacher_weights import template

    keys = iter(jax.random.split(jax.random.key(0), 1000))
    return jax.tree.map(lambda leaf: 0.02 * jax.random.normal(next(keys), leaf.shape), template(variant))


def torch_device() -> str:
    """Where PyTorch runs beside JAX.

    Raises:
      ConfigError: JAX is on an accelerator that PyTorch cannot use.
    """
    import jax
    import torch

    from fsmde_jax.errors import ConfigError

    backend = jax.default_backend()
    if backend != "cpu" and not (backend == "gpu" and torch.cuda.is_available()):
        raise ConfigError(f"PyTorch would run on the processor, JAX on {backend}: pass --no-torch")
    return "cpu" if backend == "cpu" else "cuda"


def as_array(result: Any) -> np.ndarray:
    """What a side's call returns, as NumPy."""
    return np.asarray(result.cpu() if hasattr(result, "cpu") else result)


def torch_calls(
    model: Any, array: np.ndarray, dtype: str, threads: int, compiled: bool
) -> dict[str, Callable[[], Any]]:
    """PyTorch's sides by name: each a call without arguments that gives inverse depth [M, H, W] of images `array`, a
    tensor on `torch_device()`."""
    import torch

    torch.set_num_threads(threads)
    kind, device = getattr(torch, dtype), torch_device()
    same = copy.deepcopy(model).to(device, kind)
    t = torch.from_numpy(array).permute(0, 3, 1, 2).contiguous().to(device, kind)

    def call_of(function: Any) -> Callable[[], Any]:
        def call() -> Any:
            with torch.inference_mode():
                result = function(t).predicted_depth.float()
            if device == "cuda":
                torch.cuda.synchronize()
            return result

        return call

    calls = {"PyTorch eager": call_of(same)}
    return calls | ({"PyTorch compiled": call_of(torch.compile(same))} if compiled else {})


def images(size: str) -> np.ndarray:
    """Smooth random pictures [M, H, W, 3] float32, normalised."""
    m, height, width = map(int, size.split("x"))
    coarse = np.random.default_rng(0).normal(size=(m, height // 14, width // 14, 3)).astype(np.float32)
    return np.kron(coarse, np.ones((1, 14, 14, 1), np.float32))


def time_sides(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, the sides in turn, after one call of each that is not counted; on accelerators after ten,
    and without the pauses, in which their clocks fall."""
    import jax

    pause, uncounted = (0.2, 1) if jax.default_backend() == "cpu" else (0.0, 10)
    for call in sides.values():
        for _ in range(uncounted):
            call()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            time.sleep(pause)  # until the other side's threads have stopped spinning
            started = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - started)
    return taken


def compare(model: Any, size: str, args: argparse.Namespace) -> dict[str, Any]:
    """Times, agreement with the reference and the deviation of bfloat16 at one size."""
    import jax

    program, params = our_program(model, args.variant, args.dtype, args.attention)
    array = images(size)
    x = jax.device_put(array)
    compiled = program.lower(params, x).compile()
    sides: dict[str, Callable[[], Any]] = {"here": lambda: jax.block_until_ready(compiled(params, x))}
    analysis = compiled.memory_analysis()
    row: dict[str, Any] = {"size": size, "device": jax.devices()[0].device_kind}
    if analysis is not None:
        row["xla_temporary_mb"] = analysis.temp_size_in_bytes / 2**20
    if args.torch:
        sides |= torch_calls(model, array, args.dtype, args.threads, args.compile)
    row["seconds"] = time_sides(sides, args.repeats)
    row["median"] = {name: statistics.median(values) for name, values in row["seconds"].items()}
    row["ratio"] = {name: value / row["median"]["here"] for name, value in row["median"].items() if name != "here"}
    here = np.asarray(sides["here"]())
    if args.torch:
        row["relative_error"] = relative(here, as_array(sides["PyTorch eager"]()))
    if row["device"] != "cpu":
        counted = port(args.variant, args.dtype, COUNTED)
        row |= share_of_peak(1e9 * gflops(counted, params, x), row["device"], row["median"]["here"])
    return row


def relative(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def gflops(run: Any, *arguments: Any) -> float:
    """10^9 floating-point operations of one call of a jitted function, as XLA counts them before compilation.

    They are counted for the CPU, since no other backend counts what is lowered for it, and a GPU's compiled program
    hides most of them in calls of libraries. The body of a loop counts once.
    """
    import jax

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    with jax.default_device(jax.devices("cpu")[0]):
        return float(run.lower(*shapes).cost_analysis()["flops"]) / 1e9


def share_of_peak(operations: float, kind: str, seconds: float) -> dict[str, float]:
    """Operations per second, and their share of the device's 16-bit peak where that is known."""
    rate = operations / seconds
    known = [name for name in PEAKS if name in kind]
    peak = {"share_of_16_bit_peak": rate / PEAKS[max(known, key=len)]} if known else {}
    return {"tflops": rate / 1e12, **peak}


def bfloat16_deviation(model: Any, size: str, variant: str) -> dict[str, float]:
    """How far bfloat16 is from float32 here: mean difference over the mean, also after the best scale and shift, and
    largest difference over the largest value."""
    x = images(size)
    outputs = []
    for dtype in ("float32", "bfloat16"):
        program, params = our_program(model, variant, dtype)
        outputs.append(np.asarray(program(params, x), np.float64))
    full, half = outputs
    a, b = np.polyfit(half.ravel(), full.ravel(), 1)
    return {
        "mean": float(np.abs(half - full).mean() / full.mean()),
        "largest": relative(half, full),
        "mean_after_alignment": float(np.abs(a * half + b - full).mean() / full.mean()),
    }


def _high_water(side: str, variant: str, size: str, dtype: str, threads: int) -> float:
    """MB that a first call of a side takes above its weights and inputs."""
    model = reference_model(variant)
    x = images(size)
    if side != "here":
        return memory.raised_peak(torch_calls(model, x, dtype, threads, compiled=False)[side])
    program, params = our_program(model, variant, dtype)
    compiled = program.lower(params, x).compile()
    return memory.raised_peak(lambda: np.asarray(compiled(params, x)))


def peak_memory(args: argparse.Namespace, size: str) -> dict[str, float]:
    """MB above the weights and inputs, for each side in a fresh process."""
    sides = ("here", "PyTorch eager") if args.torch else ("here",)
    return {
        side: memory.in_own_process(_high_water, side, args.variant, size, args.dtype, args.threads) for side in sides
    }


def same_conditions(threads: int) -> None:
    """Starts this program again with malloc's settings and on so many cores, unless it runs like that already."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, cores)  # XLA takes as many threads as there are cores
    if any(os.environ.get(key) != value for key, value in MALLOC.items()):
        os.environ.update(MALLOC)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="small", help="tiny, small, base, large or giant (default small)")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="images x height x width (default: both)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of both sides")
    parser.add_argument("--attention", help="implementation of jax.nn.dot_product_attention, e.g. cudnn")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each side (default 7)")
    parser.add_argument("--threads", type=int, default=2, help="cores of both sides (default 2)")
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="time this project only")
    parser.add_argument("--compile", action="store_true", help="time torch.compile, too")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the memory runs")
    parser.add_argument("--no-bfloat16", dest="bfloat16", action="store_false", help="leave out bfloat16's deviation")
    parser.add_argument("--out", metavar="results.json", help="write the numbers here, too")
    args = parser.parse_args()
    same_conditions(args.threads)
    import jax

    from fsmde_jax.errors import exit_with_message

    rows = []
    with exit_with_message():
        model = reference_model(args.variant)
        for size in args.sizes:
            row = compare(model, size, args)
            if args.bfloat16:
                row["bfloat16_deviation"] = bfloat16_deviation(model, size, args.variant)
            if args.memory and row["device"] == "cpu":
                row["peak_memory_mb"] = peak_memory(args, size)
            rows.append(row)
            print_row(row)
    from fsmde_jax import identity

    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{identity.processor()}, {args.threads} of {os.cpu_count()} cores",
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
        "variant": args.variant,
        "dtype": args.dtype,
        "rows": rows,
    }
    print(f"load average {result['load_average']:.1f} on {os.cpu_count()} cores; {result['hardware']}")
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


def print_row(row: dict[str, Any]) -> None:
    """A few lines for one size."""
    print(f"\n{row['size']} on {row['device']}\n| side | median s | fastest s | of the time here |\n|---|---|---|---|")
    for name, median in row["median"].items():
        ratio = f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "1"
        print(f"| {name} | {median:.4g} | {min(row['seconds'][name]):.4g} | {ratio} |")
    for key in ("relative_error", "tflops", "share_of_16_bit_peak", "xla_temporary_mb"):
        if key in row:
            print(f"{key.replace('_', ' ')}: {row[key]:.3g}")
    for key in ("bfloat16_deviation", "peak_memory_mb"):
        for name, value in row.get(key, {}).items():
            print(f"{key.replace('_', ' ')}, {name.replace('_', ' ')}: {value:.3g}")


if __name__ == "__main__":
    main()
