"""What a student's ONNX files cost in accuracy and take in time, beside the student in JAX.

    python -m data_prep.world --rig nuscenes --scenes 40 --val_scenes 60 --frames 1 --image_size 96x160 --seed 9 \\
        --out data/export_world
    python -m data_prep.nuscenes --dataroot data/export_world --version v1.0-trainval --split train \\
        --image_size native --out records/export_world_train
    python -m data_prep.nuscenes --dataroot data/export_world --version v1.0-trainval --split val \\
        --image_size native --out records/export_world_val
    python -m benchmarks.export_accuracy --out export_accuracy.json

float32, float16 and int8 as `fsmde_jax.export` writes them, in onnxruntime on the processor; int8 is calibrated on
--calibration. Accuracy: protocol P1, metric, of --eval_records at the size that the student was trained at, against
their LiDAR points and against their dense truth. `difference` is of |depth / depth in JAX - 1|: the median of the rigs'
medians, and the largest of all pixels. Time: six views of random pixels at that size and at --size, all sides in turn
in one process with the same cores (`benchmarks.teacher`); without compilation.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as a file: its folder holds data_prep.py, which would hide the package data_prep
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import teacher
from benchmarks.student import VIEWS, Size

HERE = "JAX, float32"
PRECISIONS = ("float32", "float16", "int8")
SHOWN = ("abs_rel", "rmse", "a1")
TRUTHS = ("lidar", "dense")
NEEDED = ("onnx", "onnxruntime")
Predict = Callable[[dict[str, Any]], np.ndarray]  # batch of data/pipeline -> depth [B, N, H, W] metres


def jax_call(where: str) -> Predict:
    """The student in JAX, compiled at the first call of each shape."""
    from fsmde_jax import compatible
    from fsmde_jax.models.registry import build_student
    from fsmde_jax.state import make_predict
    from fsmde_jax.students import read_student

    tree, meta, _ = read_student(where)
    model = build_student(**{**compatible.model_of(meta["identity"]["config"]), "dtype": "float32"})
    run = make_predict(model, lambda outputs: outputs["pred_depth"])
    names = ("images", "intrinsics", "cam_to_ego", "view_mask")
    return lambda batch: np.asarray(run(tree["params"], tree["batch_stats"], {name: batch[name] for name in names}))


def onnx_call(file: Path, threads: int) -> Predict:
    """An exported student in onnxruntime, a rig at a time; views that are not there are not computed and get 1 m."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else it takes time from the next side
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def call(batch: dict[str, Any]) -> np.ndarray:
        depth = np.ones(batch["images"].shape[:-1], np.float32)
        for row, there in enumerate(np.asarray(batch["view_mask"])):
            depth[row, there] = session.run(["depth"], {name: batch[name][row][there] for name in names})[0]
        return depth

    return call


def exported(args: argparse.Namespace, size: Size, folder: Path) -> dict[str, Path]:
    """The student's files at one size: precision -> file."""
    from fsmde_jax.export import export_onnx

    files = {}
    for precision in PRECISIONS:
        files[precision] = folder / f"{precision}_{size[0]}x{size[1]}.onnx"
        calibration = args.calibration if precision == "int8" else ""
        export_onnx(
            args.student, files[precision], f"{size[0]}x{size[1]}", precision=precision, calibration=calibration,
            calibration_samples=args.calibration_samples,
        )  # fmt: skip
    return files


def timed(here: Predict, calls: dict[str, Predict], size: Size, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call for one rig of six views, the sides in turn."""
    focal, (height, width) = 500.0 * size[1] / 640, size
    intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float32)
    batch = {
        "images": np.random.default_rng(0).integers(0, 256, (1, VIEWS, *size, 3), np.uint8),
        "intrinsics": np.tile(intrinsics, (1, VIEWS, 1, 1)),
        "cam_to_ego": np.tile(np.eye(4, dtype=np.float32), (1, VIEWS, 1, 1)),
        "view_mask": np.ones((1, VIEWS), bool),
    }
    here(batch)  # compiles
    print(f"timing {height}x{width}", file=sys.stderr, flush=True)
    sides = {HERE: here, **calls}
    found = teacher.time_sides({name: functools.partial(call, batch) for name, call in sides.items()}, repeats)
    print("timed", file=sys.stderr, flush=True)
    return found


def measured(here: Predict, calls: dict[str, Predict], records: Any, size: Size) -> dict[str, dict[str, Any]]:
    """Side -> `lidar`, `dense` (P1's metrics of all cameras) and, of exported ones, `difference` (median, largest)."""
    from fsmde_jax import evaluate
    from fsmde_jax.eval_options import EvalOptions

    rows: dict[str, dict[str, Any]] = {name: {} for name in (HERE, *calls)}
    apart: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}

    def compared(name: str, call: Predict) -> Predict:
        def predict(batch: dict[str, Any]) -> np.ndarray:
            depth, there = call(batch), np.asarray(batch["view_mask"])
            error = np.abs(depth[there] / here(batch)[there] - 1)
            apart[name].append((float(np.median(error)), float(error.max())))
            return depth

        return predict

    for truth in TRUTHS:
        options = EvalOptions(size, ground_truth=truth)  # type: ignore[arg-type]
        sides = {name: compared(name, call) for name, call in calls.items()}
        found = evaluate.evaluate(here, records, options, baselines=sides)
        rows[HERE][truth] = found.table["metric"]["all"]
        for name in calls:
            rows[name][truth] = found.trivial[name]["all"]
    for name, pairs in apart.items():
        medians, largest = zip(*pairs, strict=True)
        rows[name]["difference"] = {"median_of_rigs": statistics.median(medians), "largest": max(largest)}
    return rows


def table(rows: Sequence[dict[str, Any]], sizes: Sequence[str]) -> str:
    """The rows in Markdown."""
    heads = [f"{name}, {truth}" for truth in ("LiDAR", "dense") for name in SHOWN]
    heads += ["difference, median", "largest", "MB", *(f"s, {VIEWS}x{size}" for size in sizes)]
    lines = [f"| side | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        cells = [f"{row[truth][name]:.4f}" for truth in TRUTHS for name in SHOWN]
        apart = row.get("difference")
        cells += [f"{apart[key]:.2g}" if apart else "-" for key in ("median_of_rigs", "largest")]
        cells += [f"{row['megabytes']:.1f}" if "megabytes" in row else "-"]
        cells += [f"{row['median_seconds'][size]:.4g}" for size in sizes]
        lines.append(f"| {row['side']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """The measurement that the flags describe: prints it and writes --out."""
    import jax

    from fsmde_jax import identity
    from fsmde_jax.data.records import open_records, require_dense_depth, shared_scenes
    from fsmde_jax.data.tfrecord import write_atomically
    from fsmde_jax.errors import ConfigError, DataError
    from fsmde_jax.models.student import STRIDE
    from fsmde_jax.names import parse_size
    from fsmde_jax.students import read_student

    for flag in ("repeats", "threads"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag} {getattr(args, flag)}: expected at least 1")
    if missing := [package for package in NEEDED if importlib.util.find_spec(package) is None]:
        raise ConfigError(f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}")
    if jax.default_backend() != "cpu":
        raise ConfigError(f"onnxruntime would run on the processor, JAX on {jax.default_backend()}: JAX_PLATFORMS=cpu")
    large = parse_size(args.size, "--size", STRIDE)
    calibration, records = open_records(args.calibration), open_records(args.eval_records)
    require_dense_depth(records, "--eval_records")
    if shared := shared_scenes(calibration, records):
        raise ConfigError(f"--calibration and --eval_records share {len(shared)} scenes, e.g. {shared[0]!r}")
    config = read_student(args.student)[1]["identity"]["config"]
    trained: Size = (int(config["data"]["image_size"][0]), int(config["data"]["image_size"][1]))
    load = os.getloadavg()[0]
    here = jax_call(args.student)
    seconds: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="fsmde_export_") as folder:
        for size in dict.fromkeys((large, trained)):
            files = exported(args, size, Path(folder))
            calls = {f"ONNX, {name}": onnx_call(file, args.threads) for name, file in files.items()}
            seconds[f"{size[0]}x{size[1]}"] = timed(here, calls, size, args.repeats)
        megabytes = {f"ONNX, {name}": file.stat().st_size / 1e6 for name, file in files.items()}
        found = measured(here, calls, records, trained)
    sizes = list(seconds)[::-1]
    rows: list[dict[str, Any]] = []
    for side, values in found.items():
        row = {"side": side, **values, "seconds": {size: seconds[size][side] for size in sizes}}
        row["median_seconds"] = {size: statistics.median(times) for size, times in row["seconds"].items()}
        rows.append(row | ({"megabytes": megabytes[side]} if side in megabytes else {}))
    print(f"{table(rows, sizes)}\n")
    made_by = identity.run_identity({}, {"calibration": calibration.fingerprint, "eval": records.fingerprint})
    made_by["versions"] |= {package: importlib.metadata.version(package) for package in NEEDED}
    made_by["hardware"] |= {"threads": args.threads, "load_average_before": load}
    hardware, samples = made_by["hardware"], f"{len(records)} rigs"
    print(f"{args.student}, {samples}, {hardware['device']}, {args.threads} of {hardware['cores']} cores")
    if args.out:
        content = {"command": args.command, "student": args.student, "samples": len(records), "rows": rows}
        try:
            write_atomically(Path(args.out), (json.dumps({**content, "identity": made_by}, indent=1) + "\n").encode())
        except OSError as error:
            raise DataError(f"{args.out}: cannot write ({error.strerror}); choose another place") from error


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, not yet checked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.export_accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--student", default="lite0", metavar="C", help="lite0 (default), a run, or its .safetensors")
    parser.add_argument("--calibration", default="records/export_world_train", metavar="R", help="records for int8")
    parser.add_argument("--calibration_samples", type=int, default=32, metavar="N", help="rigs of it (default 32)")
    parser.add_argument("--eval_records", default="records/export_world_val", metavar="R", help="with dense depth")
    parser.add_argument("--size", default="352x640", metavar="HxW", help="the second size that is timed")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of each side (default 9)")
    parser.add_argument("--threads", type=int, default=2, help="cores of all sides (default 2)")
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
        run(args)


if __name__ == "__main__":
    main()
