"""How fast samples become records: `python benchmarks/data_prep.py [--out results.json] [--samples n]`.

One process, one core, 1600x900 to 352x640: the parts of a sample and the whole in rigs/s. Then a conversion of 2,000
repeated small samples by two workers shows that memory does not grow with the dataset. Uses the real nuScenes keyframe
where FSMDE_REAL_DATA is set, otherwise a rendered one.
"""

import argparse
import contextlib
import dataclasses
import datetime
import io
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

if not __package__:  # run as a file: else this file would be found instead of the package data_prep
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_prep import images, lidar_depth, nuscenes, pointfiles, record_writer
from data_prep.plan import BuildOptions, Source, build_sample
from data_prep.world import __main__ as world
from fsmde_jax import geometry, identity
from fsmde_jax.data import schema


def open_source(folder: Path) -> tuple[Source, str]:
    """The real keyframe, or a rendered one of the same size; and which of both."""
    real = os.environ.get("FSMDE_REAL_DATA", "")
    if real:
        return nuscenes.open_split(Path(real, "nuscenes_keyframe"), "v1.0-mini", "mini_train"), "real keyframe"
    flags = ["--scenes", "1", "--val_scenes", "0", "--frames", "1", "--image_size", "native", "--workers", "1"]
    world.main([*flags, "--out", str(folder / "world")])
    return nuscenes.open_split(folder / "world", "v1.0-trainval", "train", dense_depth="off"), "rendered keyframe"


def shrunk(source: Source, folder: Path, size: tuple[int, int] = (45, 80)) -> Source:
    """The first sample with tiny images and every tenth point, so that thousands of them take seconds."""
    plan = source.describe(0)
    folder.mkdir()
    cameras = []
    for camera in plan.cameras:
        path = folder / f"{camera.name}.jpg"
        pixels = images.decode_image(Path(camera.image).read_bytes(), camera.image)
        path.write_bytes(images.encode_jpeg(cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA), 95))
        scale = np.array(size) / camera.native_size
        k = geometry.resize_intrinsics(camera.intrinsics, *scale)
        small = dataclasses.replace(camera, image=str(path), native_size=size, intrinsics=k, mask=None, dense=None)
        cameras.append(small)
    points = np.fromfile(plan.sweep.path, "<f4").reshape(-1, plan.sweep.bin_columns)[::10]
    points.tofile(folder / "sweep.bin")
    sweep = dataclasses.replace(plan.sweep, path=str(folder / "sweep.bin"))
    made = dataclasses.replace(plan, cameras=tuple(cameras), sweep=sweep, extra_sweeps=())
    return dataclasses.replace(source, dense_depth=False, describe=lambda index: made)


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median CPU seconds of one call on this process."""
    work()
    taken = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return float(np.median(taken))


def time_parts(source: Source, repeats: int) -> dict[str, float]:
    """CPU milliseconds per rig of each part, and of the whole."""
    plan = source.describe(0)
    options = BuildOptions((352, 640), 95, source.point_rule)
    data = [Path(c.image).read_bytes() for c in plan.cameras]
    pixels = [images.decode_image(d, "image") for d in data]
    small = [cv2.resize(p, (640, 352), interpolation=cv2.INTER_AREA) for p in pixels]
    cloud = pointfiles.read_points(plan.sweep.path)
    sample = build_sample(plan, options)

    def project() -> None:
        for c in plan.cameras:
            to_camera = lidar_depth.lidar_to_camera(plan.sweep.sensor_to_global, c.ego_to_global, c.cam_to_ego)
            lidar_depth.project_sweep(cloud, to_camera, c.intrinsics, c.native_size, "round")

    parts: dict[str, Callable[[], Any]] = {
        "decode images": lambda: [images.decode_image(d, "image") for d in data],
        "(decode by Pillow instead)": lambda: [np.asarray(Image.open(io.BytesIO(d)).convert("RGB")) for d in data],
        "resize by area": lambda: [cv2.resize(p, (640, 352), interpolation=cv2.INTER_AREA) for p in pixels],
        "encode JPEG": lambda: [images.encode_jpeg(p, 95) for p in small],
        "read sweep": lambda: pointfiles.read_points(plan.sweep.path),
        "project sweep": project,
        "validate and serialise": lambda: schema.encode(sample),
        "whole sample": lambda: schema.encode(build_sample(plan, options)),
    }
    return {name: 1000 * seconds(work, repeats) for name, work in parts.items()}


def measure_memory(source: Source, folder: Path, counts: tuple[int, ...]) -> dict[str, float]:
    """Peak memory of the parent and of the largest worker, MB, for conversions of so many small samples."""
    source = shrunk(source, folder / "small")
    peaks: dict[str, float] = {}
    for count in counts:
        ids = [f"sample-{i:06d}" for i in range(count)]

        def describe(index: int, ids: list[str] = ids) -> Any:
            return dataclasses.replace(source.describe(0), sample_id=ids[index])

        scenes = source.sample_scenes[:1] * count
        repeated = dataclasses.replace(source, sample_ids=ids, sample_scenes=scenes, describe=describe)
        largest = {"parent": 0.0, "worker": 0.0}
        stop = threading.Event()
        watcher = threading.Thread(target=_watch, args=(largest, stop))
        watcher.start()
        with contextlib.redirect_stderr(io.StringIO()):
            record_writer.convert(repeated, folder / f"r{count}", BuildOptions((45, 80)), workers=2)
        stop.set()
        watcher.join()
        peaks |= {f"{name} at most, {count} samples, MB": value for name, value in largest.items()}
    return peaks


def _watch(largest: dict[str, float], stop: threading.Event) -> None:
    """Largest resident memory of this process and of its largest child, MB (Linux)."""

    def resident(pid: str) -> float:
        with contextlib.suppress(OSError, IndexError):
            return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
        return 0.0

    while not stop.wait(0.05):
        children = [
            pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
        ]
        largest["parent"] = max(largest["parent"], resident("self"))
        largest["worker"] = max([largest["worker"], *(resident(pid) for pid in children)])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_prep", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each part (default 15)")
    parser.add_argument("--samples", type=int, default=2000, help="samples of the memory run, 0 = leave it out")
    parser.add_argument("--out", metavar="results.json", help="write the numbers here, too")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as temporary:
        source, kind = open_source(Path(temporary, "data"))
        parts = time_parts(source, args.repeats)
        memory = measure_memory(source, Path(temporary), (args.samples // 10, args.samples)) if args.samples else {}
    rate = 1000 / parts["whole sample"]
    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{identity.processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "opencv": cv2.__version__,
        "input": kind,
        "cpu_ms_per_rig": {name: round(value, 2) for name, value in parts.items()},
        "rigs_per_second_per_core": round(rate, 2),
        "memory": {name: round(value, 1) for name, value in memory.items()},
    }
    print(f"six cameras 1600x900 to 352x640, {kind}, one core of: {result['hardware']}\n")
    print("| part | CPU ms per rig |\n|---|---|")
    for name, value in parts.items():
        print(f"| {name} | {value:.1f} |")
    print(f"\n{rate:.1f} rigs/s per core (aim: 8)")
    for name, value in memory.items():
        print(f"{name}: {value:.0f}")
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
