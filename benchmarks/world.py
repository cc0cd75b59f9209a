"""How fast the world renders: `python benchmarks/world.py [--rig nuscenes] [--out results.json]`.

Whole keyframes: all images with exact depth, shadows and LiDAR sweep, different scenes, from `--threads` threads of one
process on a CPU, or `--batch` scenes at once on an accelerator. Prints rigs/s, compile time and peak memory.
"""

import argparse
import concurrent.futures
import datetime
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

if not __package__:  # run as a file: else this file would be found instead of the package data_prep
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_prep import cli
from data_prep.world import batches, drive, rigs, scene
from fsmde_jax import identity


def _peak_gb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def time_cpu(rig: rigs.Rig, threads: int, scenes: int, repeats: int) -> dict[str, float]:
    """Rigs/s (median over repeats) of rendering one keyframe of each of `scenes` scenes."""
    renderer = drive.Renderer(rig)
    started = time.perf_counter()
    drive.Drive(renderer, scene.scene_key(0, "test", 0)).keyframe(0)
    compiled = time.perf_counter() - started
    drives = [drive.Drive(renderer, scene.scene_key(0, "test", i)) for i in range(scenes)]
    rates = []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for repeat in tqdm(range(repeats), desc=f"{threads} thread(s)", leave=False):
            started = time.perf_counter()
            list(pool.map(lambda one, k=repeat: one.keyframe(k), drives))
            rates.append(scenes / (time.perf_counter() - started))
    return {"rigs_per_s": float(np.median(rates)), "first_frame_s": compiled}


def time_accelerator(rig: rigs.Rig, batch: int, repeats: int) -> dict[str, float]:
    """Rigs/s of `batch` scenes rendered by one call."""
    one = batches.sample_function(rig)
    render = jax.jit(jax.vmap(lambda key, time_us: one(scene.sample_scene(key), time_us)))
    keys = jnp.stack([scene.scene_key(0, "test", i) for i in range(batch)])
    times = jnp.zeros(batch, jnp.int32)
    started = time.perf_counter()
    jax.block_until_ready(render(keys, times))
    compiled = time.perf_counter() - started
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(render(keys, times))
        rates.append(batch / (time.perf_counter() - started))
    return {"rigs_per_s": float(np.median(rates)), "first_frame_s": compiled}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.world", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rig", default="nuscenes", help="nuscenes, ddad or a rig file (default nuscenes)")
    parser.add_argument(
        "--sizes", nargs="+", type=cli.parse_size, default=[(96, 160), (352, 640)], metavar="HxW",
        help="image sizes (default 96x160 352x640)",
    )  # fmt: skip
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="on a CPU (default 1 2)")
    parser.add_argument("--batch", type=int, default=32, help="scenes per call on an accelerator (default 32)")
    parser.add_argument("--scenes", type=int, default=8, help="different scenes per repeat on a CPU (default 8)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="also write the results as JSON")
    args = parser.parse_args(argv)
    device = jax.devices()[0]
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": f"{device.platform} {device.device_kind}, {identity.processor()}",
        "jax": jax.__version__,
        "rig": args.rig,
        "rates": {},
    }
    print(f"| {args.rig} rig | rigs/s | first frame with compilation (s) |\n|---|---|---|")
    for size in args.sizes:
        rig = rigs.scaled(rigs.read_rig(args.rig), size=size)
        ways = [("threads", n) for n in args.threads] if device.platform == "cpu" else [("batch", args.batch)]
        for way, count in ways:
            if way == "threads":
                measured = time_cpu(rig, count, args.scenes, args.repeats)
            else:
                measured = time_accelerator(rig, count, args.repeats)
            name = f"{size[0]}x{size[1]}, {way} {count}"
            result["rates"][name] = measured
            print(f"| {name} | {measured['rigs_per_s']:.2f} | {measured['first_frame_s']:.1f} |", flush=True)
    result["peak_gb"] = _peak_gb()
    print(f"\npeak memory {result['peak_gb']:.2f} GB; {result['device']}, jax {result['jax']}, {result['date']}")
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
