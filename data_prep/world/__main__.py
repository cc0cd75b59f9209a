"""Renders street scenes as a dataset: `python -m data_prep.world --rig nuscenes --scenes 8 --frames 10 --out D`.

The dataset has the format of nuScenes or DDAD (DGP), so the same converters read it; exact dense depth lies beside the
images. One version of this program gives the same files for the same seed on one kind of machine; train and val never
share a scene.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path

from data_prep import cli
from data_prep.world import dataset, output, rigs
from fsmde_jax.errors import ConfigError, exit_with_message

# Default image sizes of the built-in rigs.
_SIZES = {"nuscenes": (360, 640), "ddad": (400, 640), "surround": (360, 640)}
_WORKER_BYTES = 1.1e9  # memory of one worker process


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m data_prep.world",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--rig", default="nuscenes", metavar="RIG",
        help=f"{', '.join(rigs.BUILT_IN)}, or a YAML file (docs/custom_rig.md); default nuscenes",
    )  # fmt: skip
    made.add_argument("--out", required=True, metavar="D", help="dataroot to write")
    made.add_argument("--scenes", type=int, default=8, metavar="N", help="training scenes (default 8)")
    made.add_argument("--val_scenes", type=int, metavar="N", help="held-out scenes (default: a quarter of --scenes)")
    made.add_argument("--frames", type=int, default=10, metavar="M", help="keyframes per scene (default 10)")
    made.add_argument("--seed", type=int, default=0, help="of the whole dataset (default 0)")
    made.add_argument(
        "--vary_rig", action="store_true",
        help="render every scene with another calibration around the rig's: focal length, principal point, angles,"
        " height and place of all cameras (docs/world.md); for training a teacher on many cameras",
    )  # fmt: skip
    size = made.add_mutually_exclusive_group()
    size.add_argument(
        "--image_size", type=cli.parse_size, default=(), metavar="HxW",
        help="of all images; default 360x640 (nuscenes, surround), 400x640 (ddad), otherwise 'native', the rig's own",
    )  # fmt: skip
    size.add_argument("--scale", type=float, metavar="S", help="image sizes as a share of the rig's own, e.g. 0.5")
    made.add_argument(
        "--samples", type=int, choices=(1, 2), default=1,
        help="rays per pixel along each axis for the colours: 2 is smoother and slower (default 1)",
    )  # fmt: skip
    made.add_argument("--semantics", action="store_true", help="also write class ids as 8-bit PNG, semantic/CAMERA/")
    made.add_argument(
        "--sweeps_between", type=int, default=0, metavar="K",
        help="LiDAR sweeps between keyframes, nuScenes format only (default 0)",
    )  # fmt: skip
    made.add_argument("--jpeg_quality", type=int, default=95, help="default 95")
    made.add_argument(
        "--workers", type=int, default=max(1, int(min(cli.usable_cores(), cli.usable_memory() / _WORKER_BYTES))),
        help="processes (default %(default)s: all cores that this process may use, but no more than there is memory for"
        " at about 1.1 GB each; 1 suits a GPU); the files do not depend on it",
    )  # fmt: skip
    return made


def look_of(args: argparse.Namespace) -> dataset.Look:
    """Checked choices from the command line.

    Raises:
      ConfigError: a number is out of range. ConfigError, DataError: the rig cannot be read.
    """
    limits = {
        "scenes": (0, 10**6), "val_scenes": (0, 10**6), "frames": (1, 4000), "seed": (0, 2**28 - 1),
        "workers": (1, 1024), "jpeg_quality": (1, 100), "sweeps_between": (0, 1000), "scale": (0.01, 4.0),
    }  # fmt: skip
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"--{name}={value}: expected {low} to {high}")
    rig = rigs.read_rig(args.rig)
    if args.sweeps_between and rig.format != "nuscenes":
        raise ConfigError(f"--sweeps_between={args.sweeps_between}: only the nuScenes format has them")
    if args.sweeps_between >= rig.sweeps_per_keyframe:
        raise ConfigError(
            f"--sweeps_between={args.sweeps_between}: expected at most {rig.sweeps_per_keyframe - 1}, because the LiDAR"
            f" of {args.rig} makes {rig.sweeps_per_keyframe} revolution(s) per keyframe, the keyframe's own included"
        )
    if args.vary_rig:
        rigs.check_variable(rig)
    seconds = output.SCENE_US // 10**6
    if args.frames > (most := int(seconds * rig.keyframe_rate)):
        raise ConfigError(
            f"--frames={args.frames}: expected at most {most}, because a scene of {args.rig} lasts up to {seconds} s at"
            f" {rig.keyframe_rate:g} keyframes per second; more --scenes give more frames"
        )
    size = args.image_size
    if size == ():
        size = None if args.scale else _SIZES.get(args.rig)
    path = rigs.built_in(args.rig) if args.rig in rigs.BUILT_IN else Path(args.rig)
    return dataset.Look(
        rig=args.rig if args.rig in rigs.BUILT_IN else str(path.absolute()),
        rig_digest=hashlib.sha256(path.read_bytes()).hexdigest(),
        scale=args.scale,
        size=size,
        seed=args.seed,
        frames=args.frames,
        samples=args.samples,
        semantics=args.semantics,
        jpeg_quality=args.jpeg_quality,
        sweeps_between=args.sweeps_between,
        vary_rig=args.vary_rig,
    )


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = parser().parse_args(argv)
    with exit_with_message():
        look = look_of(args)
        val = args.val_scenes if args.val_scenes is not None else -(-args.scenes // 4)
        scenes = {"train": args.scenes, "val": val}
        if not sum(scenes.values()):
            raise ConfigError("--scenes=0 --val_scenes=0: nothing to render")
        started = time.perf_counter()
        try:
            with cli.terminate_as_interrupt():
                made, held = dataset.write_dataset(look, args.out, scenes, args.workers)
        except KeyboardInterrupt:
            print(f"\n{args.out}: interrupted; the same command goes on from the finished scenes", file=sys.stderr)
            sys.exit(130)
        seconds = time.perf_counter() - started
        counts = f"{held['train']} train and {held['val']} val scenes of {look.frames} keyframes"
        print(f"{made}: {counts}, {seconds:.0f} s")
        print(dataset.describe(look, Path(args.out), held))


if __name__ == "__main__":
    main()
