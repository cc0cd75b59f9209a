"""Input pipeline: rigs per second from records, against loading raw frames and projecting LiDAR per sample.

    python -m benchmarks.input_pipeline --real_data D          # D holds nuscenes_keyframe/ (default: FSMDE_REAL_DATA)
    python -m benchmarks.input_pipeline --records records/x    # own records only, no comparison

Both sides deliver six 352x640 views with the same augmentation and LiDAR labels; one real keyframe is read again and
again, so files come from the page cache on both sides. The comparison loader does what PyTorch projects for this task
do in `__getitem__`: Pillow decodes and resizes the 1600x900 JPEGs, the devkit's `map_pointcloud_to_image` projects the
sweep into every camera. It is flattered: bilinear instead of Lanczos resize, tables loaded beforehand, and nothing is
sent back from its worker processes. The two are timed in turn. CPU time per rig says more than the rate on a busy host.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as a file: its folder holds data_prep.py, which would hide the package data_prep
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fsmde_jax import identity
from fsmde_jax.data import augment, pipeline, schema, transforms
from fsmde_jax.data.records import Records, open_records
from fsmde_jax.errors import ConfigError, exit_with_message

SIZE = (352, 640)
CAMERAS = ("CAM_FRONT", "CAM_FRONT_LEFT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT", "CAM_FRONT_RIGHT")
_tables: Any = None  # devkit tables of a worker process


def convert(real: Path, out: Path) -> None:
    """The real keyframe to records, by the product's own converter."""
    command = [
        sys.executable,
        "-m",
        "data_prep.nuscenes",
        "--dataroot",
        str((real / "nuscenes_keyframe").resolve()),
        "--out",
        str(out.resolve()),
    ]
    command += [
        "--version",
        "v1.0-mini",
        "--split",
        "mini_train",
        "--image_size",
        f"{SIZE[0]}x{SIZE[1]}",
        "--workers",
        "1",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).resolve().parents[1])


def measure_pipeline(records: Records, threads: int, batch_size: int, seconds: float) -> tuple[float, float]:
    """(rigs per second, CPU milliseconds per rig) of the training stream with augmentation."""
    options = augment.AugmentOptions()
    stream = pipeline.train_dataset(
        records, image_size=SIZE, batch_size=batch_size, seed=0, augment=options, num_threads=threads
    )
    iterator = iter(stream)
    for _ in range(threads + 4):  # past the buffer that was filled before the clock starts
        next(iterator)
    start, cpu, rigs = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        rigs += len(next(iterator)["record_index"])
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    iterator.close()
    return rigs / wall, 1e3 * cpu / rigs


def _start_worker(dataroot: str, ready: Any) -> None:
    """Loads the tables and waits until all workers have; an error here ends the benchmark (BrokenProcessPool)."""
    global _tables
    from data_prep.nuscenes import load_devkit

    tables, _ = load_devkit()
    _tables = tables(version="v1.0-mini", dataroot=dataroot, verbose=False)
    ready.wait(300)


def load_raw(seed: int) -> None:
    """One rig as the PyTorch projects load it: images [6, H, W, 3], depth [6, H, W], intrinsics [6, 3, 3]."""
    from PIL import Image, ImageEnhance

    rng = np.random.default_rng(seed)
    choice = augment.draw(augment.AugmentOptions(), len(CAMERAS), rng)
    sample = _tables.sample[0]
    images = np.empty((len(CAMERAS), *SIZE, 3), np.uint8)
    depth = np.zeros((len(CAMERAS), *SIZE), np.float32)
    intrinsics = np.empty((len(CAMERAS), 3, 3), np.float32)
    for i, camera in enumerate(CAMERAS):
        data = _tables.get("sample_data", sample["data"][camera])
        image = Image.open(os.path.join(_tables.dataroot, data["filename"])).convert("RGB")
        width, height = image.size
        y0, x0, box_height, box_width = transforms.crop_box((height, width), choice.scale, choice.offset)
        box = (x0, y0, x0 + box_width, y0 + box_height)
        image = image.resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR, box=box)
        if choice.colour is not None:
            brightness, contrast, saturation, _ = choice.colour[0]
            image = ImageEnhance.Brightness(image).enhance(brightness)
            image = ImageEnhance.Contrast(image).enhance(contrast)
            image = ImageEnhance.Color(image).enhance(saturation)
        points, z, _ = _tables.explorer.map_pointcloud_to_image(
            sample["data"]["LIDAR_TOP"], sample["data"][camera], min_dist=1.0
        )
        x = np.floor((points[0] + 0.5 - x0) * SIZE[1] / box_width).astype(int)
        y = np.floor((points[1] + 0.5 - y0) * SIZE[0] / box_height).astype(int)
        inside = (x >= 0) & (x < SIZE[1]) & (y >= 0) & (y < SIZE[0])
        depth[i, y[inside], x[inside]] = z[inside]
        images[i] = np.asarray(image)
        calibration = _tables.get("calibrated_sensor", data["calibrated_sensor_token"])
        native = np.array(calibration["camera_intrinsic"])
        intrinsics[i] = transforms.box_intrinsics(native, np.array([y0, x0, box_height, box_width]), SIZE)
    if choice.flip:
        images, depth = images[:, :, ::-1].copy(), depth[:, :, ::-1].copy()


def _raw_job(job: tuple[int, float]) -> tuple[int, float]:
    """(rigs loaded, CPU seconds) of one worker process in a given time."""
    seed, seconds = job
    start, cpu, rigs = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        load_raw(seed + rigs)
        rigs += 1
    return rigs, time.process_time() - cpu


def measure_raw(pool: Any, workers: int, seconds: float) -> tuple[float, float]:
    """(rigs per second, CPU milliseconds per rig) of the comparison loader in `workers` processes."""
    start = time.perf_counter()
    results = list(pool.map(_raw_job, [(1000 * k, seconds) for k in range(workers)]))
    wall = time.perf_counter() - start
    rigs = sum(r for r, _ in results)
    return rigs / wall, 1e3 * sum(c for _, c in results) / rigs


def stages(records: Records, repeats: int = 40) -> dict[str, float]:
    """Least CPU milliseconds of each stage of one rig, on one thread."""
    sample = records[0]
    sizes = [(int(h), int(w)) for h, w in sample.image_size]
    steps = [transforms.decode_step(d, s, 1.0, SIZE) for d, s in zip(sample.images, sizes, strict=True)]
    images = [transforms.decode_image(d, s, "", k) for d, s, k in zip(sample.images, sizes, steps, strict=True)]
    boxes = [transforms.crop_box((im.shape[0], im.shape[1]), 1.1, (0.5, 0.5)) for im in images]
    count = sample.num_cameras
    batch = transforms.empty_batch(1, count, SIZE)
    row = {name: array[0] for name, array in batch.items() if name != "record_index"}
    scale = np.array(SIZE[::-1]) / sample.native_size[:, ::-1]
    colour = np.array([[1.1, 0.9, 1.1, 0.03]])

    def decode() -> None:
        for data, size, step in zip(sample.images, sizes, steps, strict=True):
            transforms.decode_image(data, size, "", step)

    def resize() -> None:
        for image, box, out in zip(images, boxes, row["images"], strict=True):
            transforms.resize_box(image, box, out)

    def label() -> None:
        row["depth"][:] = 0
        transforms.rasterize(sample.points, scale, 0.5 * scale - 0.5, row["depth"])

    def whole() -> None:
        row["depth"][:] = 0
        choice = augment.Draw(flip=True, scale=1.1, offset=(0.5, 0.5), colour=colour)
        transforms.load_rig(records[0], row, choice=choice)

    raw = schema.encode(sample)
    work: dict[str, Callable[[], Any]] = {
        "read record, check CRC, parse": lambda: records[0],
        "parse alone": lambda: schema.decode(raw),
        "decode JPEGs": decode,
        "zoom and crop": resize,
        "rasterize labels": label,
        "colour jitter": lambda: augment.jitter(row["images"], colour),
        "flip": lambda: augment.flip_rig(row),
        "new batch arrays": lambda: transforms.empty_batch(1, count, SIZE),
        "all of a fully augmented rig": whole,
    }
    result = {}
    for name, function in work.items():
        times = []
        for _ in range(repeats + 1):
            start = time.thread_time()
            function()
            times.append(time.thread_time() - start)
        result[name] = 1e3 * min(times[1:])
    return result


def summary(values: list[tuple[float, float]]) -> dict[str, float]:
    """Median and range of the rates, median CPU time."""
    rates = [rate for rate, _ in values]
    return {
        "rigs_per_s": statistics.median(rates),
        "rigs_per_s_min": min(rates),
        "rigs_per_s_max": max(rates),
        "cpu_ms_per_rig": statistics.median(cpu for _, cpu in values),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures everything that the flags allow; returns what the JSON file holds."""
    real = Path(args.real_data) if args.real_data else None
    if real is not None and not (real / "nuscenes_keyframe").is_dir():
        raise ConfigError(f"--real_data {real}: holds no nuscenes_keyframe/")
    if real is None and not args.records:
        raise ConfigError("give --records, or --real_data (or FSMDE_REAL_DATA) with nuscenes_keyframe/")
    with tempfile.TemporaryDirectory() as scratch:
        if not args.records:
            assert real is not None
            convert(real, Path(scratch, "records"))
        records = open_records(args.records or Path(scratch, "records"))
        rates: dict[str, list[tuple[float, float]]] = {}
        pool = None
        if real is not None:
            context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
            pool = concurrent.futures.ProcessPoolExecutor(  # unlike Pool, it raises when a worker dies
                args.threads, context, _start_worker, (str(real / "nuscenes_keyframe"), context.Barrier(args.threads))
            )
            measure_raw(pool, args.threads, min(1.0, args.seconds))
        for _ in range(args.repeats):
            for threads in sorted({1, args.threads}):
                figures = measure_pipeline(records, threads, args.batch_size, args.seconds)
                rates.setdefault(f"records, {threads} thread(s)", []).append(figures)
            if pool is not None:
                figures = measure_raw(pool, args.threads, args.seconds)
                rates.setdefault(f"raw frames + projection, {args.threads} processes", []).append(figures)
        if pool is not None:
            pool.shutdown()
        result: dict[str, Any] = {"loaders": {name: summary(values) for name, values in rates.items()}}
        result["stages_cpu_ms"] = stages(records)
        result["settings"] = {
            **{name: getattr(args, name) for name in ("threads", "batch_size", "seconds", "repeats")},
            "image_size": SIZE,
            "cameras": records.cameras,
            "stored_size": records[0].image_size[0].tolist(),
            "bytes_per_record": sum(s["num_bytes"] for s in records.manifest.shards) // len(records),
            "load_average_at_the_end": os.getloadavg(),
        }
        if pool is not None:
            ours, raw = (result["loaders"][name] for name in (f"records, {args.threads} thread(s)", list(rates)[-1]))
            result["ratio_of_rates"] = ours["rigs_per_s"] / raw["rigs_per_s"]
            result["ratio_of_cpu_time"] = raw["cpu_ms_per_rig"] / ours["cpu_ms_per_rig"]
        return result | {"identity": identity.run_identity({}, {"records": records.fingerprint})}


def report(result: dict[str, Any]) -> str:
    """The tables that are printed."""
    lines = ["| loader | rigs/s (median) | min-max | CPU ms per rig |", "|---|---|---|---|"]
    for name, row in result["loaders"].items():
        span = f"{row['rigs_per_s_min']:.1f}-{row['rigs_per_s_max']:.1f}"
        lines.append(f"| {name} | {row['rigs_per_s']:.1f} | {span} | {row['cpu_ms_per_rig']:.1f} |")
    if "ratio_of_rates" in result:
        rates, cpu = result["ratio_of_rates"], result["ratio_of_cpu_time"]
        lines += ["", f"records / raw frames: {rates:.1f}x the rate, {cpu:.1f}x less CPU time per rig"]
    lines += ["", "| stage of one rig, one thread | CPU ms (least) |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in result["stages_cpu_ms"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", default="", help="records folder; default: the real keyframe, converted")
    parser.add_argument(
        "--real_data", default=os.environ.get("FSMDE_REAL_DATA", ""), help="folder with nuscenes_keyframe/"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of our loader, processes of the other")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3, help="turns; medians are reported")
    parser.add_argument("--out", default="runs/benchmarks/input_pipeline.json")
    args = parser.parse_args()
    with exit_with_message():
        result = run(args)
        print(report(result))
        out = Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(out.name + ".tmp")
        temporary.write_text(json.dumps(result, indent=1))
        temporary.replace(out)
        print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
