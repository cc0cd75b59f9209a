"""Speed of the whole distillation step and of its parts, beside the same step in PyTorch and the machine's own peak.

    python -m benchmarks.train_step --compile                  # six 352x640 views, teacher Small, beside PyTorch
    python -m benchmarks.train_step --dtype bfloat16 --batch 8 # on a GPU

One step is: frozen teacher, student, losses, gradient, clipping, AdamW. For the comparison both sides have ResNet-18
(random), SILog and the KL of bin probabilities by `soft_assign`, and Depth Anything V2 Small with the same random
weights; PyTorch's is `benchmarks.torch_student` with the transformers teacher, eager, with a channels_last student, and
compiled with --compile; it is spared normalising and resizing the images. All sides are timed in turn in one process on
the same cores and with the same settings of malloc (`benchmarks.teacher`); compilation is timed apart, cold and from
JAX's persistent cache.

Parts here are programs of their own: the teacher; the student's forward with the loss; that and its gradient; clipping
and AdamW; and the input, a batch made in one thread from JPEGs in memory, which in training runs beside the step.
`teacher from a cache` is the whole step with `teacher.cache`: maps and tokens come with the batch. The backward pass is
a difference, and so is what the parts leave of the whole step. `share of peak` is of the rate at which this machine
multiplies float32 (or bfloat16) matrices of 4096 x 4096 (2048 on a CPU), measured in the same run, and `share of
bandwidth` of that at which it adds two large arrays. Operations are those that XLA counts before compilation,
a loop's body once (on a CPU the gradients for kernels are loops, so that their shares are larger than said); bytes
those of the compiled program, which may come from a cache, so that their share can be above 100 %. Memory is that of a
process of its own (on an accelerator, of the device), the step compiled and run once before; what compiling took there
is not given back under these settings of malloc, and counts as there before the step.
"""

import argparse
import functools
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as a file: its folder holds data_prep.py, which would hide the package data_prep
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import memory, teacher
from benchmarks.step import Ours, configured

EAGER = "PyTorch eager"
CACHED = "here, teacher from a cache"


def torch_sides(ours: Ours, reference: Any, args: argparse.Namespace) -> dict[str, Any]:
    """PyTorch's sides by name: `torch_student.Step` and the arguments of a call."""
    import copy

    import torch

    from benchmarks import torch_student
    from fsmde_jax.models.student import normalise_images
    from fsmde_jax.models.teacher_images import resize_for_teacher

    torch.set_num_threads(args.threads)
    device, m = teacher.torch_device(), ours.config.model
    x = normalise_images(ours.batch["images"])
    small = np.array(resize_for_teacher(x, *ours.distilled.loss.size))
    height, width = ours.config.data.image_size

    def tensor(array: Any) -> Any:
        return torch.from_numpy(np.array(array)).to(device)

    def images(array: Any) -> Any:
        return tensor(np.asarray(array).reshape(-1, *array.shape[2:])).permute(0, 3, 1, 2).contiguous()

    ratio = tensor(ours.batch["intrinsics"][..., 0, 0].reshape(-1) / (m.focal_canonical * width / 640))
    given = (images(x), images(small), ratio, tensor(ours.batch["depth"].reshape(-1, height, width)), args.batch)
    kinds: dict[str, dict[str, bool]] = {EAGER: {}, "PyTorch channels_last": {"channels_last": True}}
    kinds |= {"PyTorch compiled": {"compiled": True}} if args.compile else {}
    found = {}
    for name, options in kinds.items():
        student = torch_student_of(ours.config)
        torch_student.load_parameters(student, _numpy(ours.state.params))
        frozen = copy.deepcopy(reference).to(device).eval()
        autocast = args.dtype == "bfloat16"
        found[name] = torch_student.Step(student.to(device), frozen, lr=1e-4, autocast=autocast, **options), given
    return found


def torch_student_of(config: Any) -> Any:
    """The student of a config in PyTorch, with random parameters."""
    from benchmarks import torch_student
    from fsmde_jax.models import depth_bins

    m = config.model
    span = depth_bins.canonical_range(m.min_depth, m.max_depth, m.focal_canonical, tuple(m.focal_range))
    return torch_student.Student(tuple(m.decoder_channels), m.num_bins, span)


def memory_of(side: str, args: argparse.Namespace) -> dict[str, float]:
    """MB of this process before a step (libraries, weights, batch) and at its peak in one; call it in a fresh process.

    Resident memory of the process, or, on an accelerator, what the library has taken there.
    """
    if side == "here":
        import jax

        ours = Ours(args)
        call = ours.whole(ours.step.lower(ours.state, ours.on_device, np.float32(1e-4), ours.frozen).compile())
        call()
        if jax.default_backend() != "cpu":
            found = jax.local_devices()[0].memory_stats()
            return {"peak": found["peak_bytes_in_use"] / 2**20}
    else:
        import torch

        from benchmarks import torch_student

        torch.set_num_threads(args.threads)
        device, config = "cuda" if torch.cuda.is_available() else "cpu", configured(args)
        frozen, student = teacher.reference_model("small").to(device).eval(), torch_student_of(config).to(device)
        run = torch_student.Step(student, frozen, lr=1e-4, autocast=args.dtype == "bfloat16")
        (height, width), views = config.data.image_size, args.batch * args.cameras
        scale = config.teacher.longer_side / max(height, width)
        small = [max(14, round(side * scale / 14) * 14) for side in (height, width)]
        given = (
            torch.rand(views, 3, height, width, device=device), torch.rand(views, 3, *small, device=device),
            torch.ones(views, device=device), torch.rand(views, height, width, device=device) + 1.0, args.batch,
        )  # fmt: skip
        call = functools.partial(run, *given)
        call()
        if device == "cuda":
            return {"peak": torch.cuda.max_memory_allocated() / 2**20}
    before = memory.resident()
    return {"before": before, "peak": before + memory.raised_peak(call)}


def _numpy(tree: Any) -> Any:
    import jax

    return jax.tree.map(np.asarray, tree)


def machine(dtype: str, repeats: int) -> dict[str, float]:
    """This machine's peak: GFLOP/s of square matrix products, GB/s of adding two arrays of 256 MB into a third."""
    import jax
    import jax.numpy as jnp

    side = 2048 if jax.default_backend() == "cpu" else 4096
    a = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.DEFAULT))
    x = jnp.ones(64 * 2**20, jnp.float32)
    add = jax.jit(lambda x, y: x + y)
    y = x + 1
    calls = {"product": lambda: product(a, a).block_until_ready(), "add": lambda: add(x, y).block_until_ready()}
    best = {name: min(times) for name, times in teacher.time_sides(calls, max(repeats, 5)).items()}
    return {"gflops": 2 * side**3 / best["product"] / 1e9, "gb_per_s": 3 * x.nbytes / best["add"] / 1e9}


def operations(ours: Ours, parts: dict[str, Any]) -> dict[str, float]:
    """GFLOPs of the parts; of the teacher as its views times one view, since the body of a loop counts once."""
    counts = {name: teacher.gflops(run, *given) for name, (run, given) in parts.items() if name != "teacher"}
    views, program, one = _one_view(ours)
    return {"teacher": views * teacher.gflops(program, ours.frozen, one), **counts}


def traffic(ours: Ours, programs: dict[str, Any]) -> dict[str, float]:
    """GB that the compiled parts read and write, as XLA counts it: every operand of every fused operation once."""
    views, program, one = _one_view(ours)
    programs = {**programs, "teacher": program.lower(ours.frozen, one).compile()}
    found = {name: (each.cost_analysis() or {}).get("bytes accessed", 0.0) / 1e9 for name, each in programs.items()}
    found["teacher"] *= views
    return {name: value for name, value in found.items() if value > 0}


def _one_view(ours: Ours) -> tuple[int, Any, np.ndarray]:
    """(number of views, the teacher as a program, a view)."""
    height, width = ours.distilled.loss.size
    views = int(np.prod(ours.batch["view_mask"].shape))
    return views, teacher.port("small", ours.config.teacher.dtype), np.zeros((1, height, width, 3), np.float32)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything of one setting."""
    import jax

    reference = teacher.reference_model("small") if args.torch else None
    ours = Ours(args, reference)
    compiled, compilation = ours.compile()
    parts = ours.parts() if args.split else {}
    call = ours.whole(compiled)
    calls: dict[str, Callable[[], Any]] = {"here": call}
    programs = {name: run.lower(*given).compile() for name, (run, given) in parts.items()}
    for name, (_, given) in parts.items():
        calls[name] = functools.partial(lambda run, given: jax.block_until_ready(run(*given)), programs[name], given)
    if parts:
        calls[CACHED] = ours.cached()
        calls["input"] = ours.input()
    others = torch_sides(ours, reference, args) if args.torch else {}
    for name, (step, arguments) in others.items():
        calls[name] = functools.partial(step, *arguments)
    first = {name: float(calls[name]()["loss"]) for name in ("here", CACHED) if name in calls}
    first |= {name: float(calls[name]()) for name in others}
    seconds = teacher.time_sides(calls, args.repeats)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    analysis = compiled.memory_analysis()
    result: dict[str, Any] = {
        "seconds": seconds, "median": median, "rigs_per_s": args.batch / median["here"], "compile_s": compilation,
        "first_loss": first, "device": jax.devices()[0].device_kind, "devices": jax.device_count(),
    }  # fmt: skip
    if analysis is not None:
        result["xla_temporary_mb"] = analysis.temp_size_in_bytes / 2**20
    for name, (step, _) in others.items():
        result.setdefault("torch_parts", {})[name] = {
            part: statistics.median(times[-args.repeats :]) for part, times in step.parts.items()
        }
    if parts:
        peak = machine(args.dtype, args.repeats)
        counts = operations(ours, parts)
        result["machine"], result["gflops"] = peak, counts
        result["share_of_peak"] = {name: counts[name] / median[name] / peak["gflops"] for name in counts}
        whole = counts["teacher"] + counts["forward and backward"]
        result["share_of_peak"]["here"] = whole / median["here"] / peak["gflops"]
        result["gbytes"] = traffic(ours, programs)
        result["share_of_bandwidth"] = {
            name: value / median[name] / peak["gb_per_s"] for name, value in result["gbytes"].items()
        }
        result["differences"] = {
            "backward": median["forward and backward"] - median["student forward"],
            "rest": median["here"] - median["teacher"] - median["forward and backward"] - median["update"],
        }
    ours.context.__exit__(None, None, None)
    if args.split and args.memory:
        sides = ("here", EAGER) if args.torch else ("here",)
        result["memory_mb"] = {side: memory.in_own_process(memory_of, side, args) for side in sides}
    return result


def table(result: dict[str, Any]) -> str:
    """One setting in Markdown."""
    lines = [
        "| | median s | of ours | GFLOPs | share of peak | GB | share of bandwidth |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, value in result["median"].items():
        ratio = value / result["median"]["here"]
        counts = f"{result['gflops'][name]:.0f}" if name in result.get("gflops", {}) else "-"
        shares = [result.get(kind, {}).get(name) for kind in ("share_of_peak", "share_of_bandwidth")]
        peak, bandwidth = (f"{100 * share:.0f} %" if share else "-" for share in shares)
        moved = f"{result['gbytes'][name]:.2f}" if name in result.get("gbytes", {}) else "-"
        lines.append(f"| {name} | {value:.3f} | {ratio:.2f} | {counts} | {peak} | {moved} | {bandwidth} |")
    lines.append("")
    if "differences" in result:
        found = result["differences"]
        lines.append(
            f"by difference: backward {found['backward']:.3f} s (forward and backward - student forward); left of the"
            f" whole step to teacher, forward and backward, and update: {found['rest']:.3f} s"
        )
    for name, parts in result.get("torch_parts", {}).items():
        lines.append(f"{name}: " + ", ".join(f"{part} {value:.3f} s" for part, value in parts.items()))
    if "machine" in result:
        peak = result["machine"]
        lines.append(f"matrix products here: {peak['gflops']:.0f} GFLOP/s; bandwidth: {peak['gb_per_s']:.1f} GB/s")
    for name, found in result.get("memory_mb", {}).items():
        before = f", {found['before']:.0f} MB before it" if "before" in found else ""
        lines.append(f"memory of {name}, in a process of its own: {found['peak']:.0f} MB at the peak of a step{before}")
    compilation = ", ".join(f"{name} {value:.0f} s" for name, value in result["compile_s"].items())
    lines.append(
        f"{result['rigs_per_s']:.3g} rigs/s on {result['devices']} x {result['device']}; compilation {compilation};"
        f" temporary memory {result.get('xla_temporary_mb', float('nan')):.0f} MB"
    )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, default=1, help="rigs in a step (default 1)")
    parser.add_argument("--cameras", type=int, default=6, help="of a rig (default 6)")
    parser.add_argument("--size", default="352x640", metavar="HxW", help="of the images, pixels (default 352x640)")
    parser.add_argument("--bins", type=int, default=64, help="of the student's head (default 64)")
    parser.add_argument("--encoder", default="resnet18", help="of the student (default resnet18)")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="compute dtype; PyTorch: autocast"
    )
    parser.add_argument("--parts", type=int, default=1, help="train.batch_parts (default 1)")
    parser.add_argument("--fsdp", type=int, default=1, help="train.fsdp (default 1)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each side (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="cores of all sides (default 2)")
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="time this project only")
    parser.add_argument("--no-split", dest="split", action="store_false", help="the whole step only")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the memory runs")
    parser.add_argument("--compile", action="store_true", help="time torch.compile, too")
    parser.add_argument("--out", metavar="FILE.json", help="write the numbers here, too")
    args = parser.parse_args(argv)
    args.command = shlex.join([*parser.prog.split(), *(sys.argv[1:] if argv is None else argv)])
    args.compare = args.torch  # the terms that both sides have; otherwise all of configs/nuscenes.py
    return args


def main() -> None:
    """Command line."""
    args = parse()
    teacher.same_conditions(max(args.threads, 1))
    from fsmde_jax import identity
    from fsmde_jax.data.tfrecord import write_atomically
    from fsmde_jax.errors import ConfigError, exit_with_message

    with exit_with_message():
        if args.torch and args.encoder != "resnet18":
            raise ConfigError(f"--encoder {args.encoder}: PyTorch's side has resnet18; pass --no-torch")
        load = os.getloadavg()[0]
        result = measure(args)
        print(table(result))
        known = identity.run_identity({}, {})
        made = {key: known[key] for key in ("date", "commit", "versions", "hardware")} | {"result": result}
        made["hardware"] |= {"threads": args.threads, "load_average_before": load}
        made["command"] = args.command
        if args.out:
            write_atomically(Path(args.out), (json.dumps(made, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
