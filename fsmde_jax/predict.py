"""Depth of your own images: of a whole rig by a trained student, in metres, or of single images by a teacher.

A rig, by a student:
  python -m fsmde_jax.predict --checkpoint lite0 --input records/my_rig --out depth/             # records
  python -m fsmde_jax.predict --checkpoint lite0 --input /data/nuscenes/v1.0-mini --out depth/ --limit 5  # or ddad.json
  python -m fsmde_jax.predict --checkpoint runs/nuscenes --input drive/images --rig drive/rig.yaml --out depth/
  python -m fsmde_jax.predict --checkpoint runs/nuscenes --input videos/ --rig rig.yaml --out depth/ --write npz ply

Folders of images and videos are named after the cameras of the rig file (docs/custom_data.md); no LiDAR is needed. Each
frame becomes a folder with 16-bit PNGs (metres * 256, as KITTI's; 0 = none, also beyond 255.99 m), colour PNGs,
rig.npz (depth and confidence), panorama.png, birdseye.png and cloud.ply (the surfaces that all cameras see, each once,
in the ego frame at the first camera's time). That is 180 MB for six images of 1600x900; --write chooses. Videos
end with the shortest of them. --rerun out.rrd records all frames for the Rerun viewer (pip install rerun-sdk; then:
rerun out.rrd).

Single images, by a teacher (Depth Anything):
  python -m fsmde_jax.predict --teacher tiny --images photos/ --out depth/            # the one in this package
  python -m fsmde_jax.predict --teacher teachers/small --images photos/ --out depth/
  python -m fsmde_jax.predict --teacher depth_anything_v2_vits.pth --images street.jpg --out depth/ --npy

Relative teachers know near from far, not metres: each picture is scaled by itself, red = near, blue = far. Metric ones
get a colour bar in metres. --npy also writes the numbers, at the image's own size.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fsmde_jax import heap, predict_rig, rig_frames
from fsmde_jax.convert import add_teacher_flags
from fsmde_jax.depth_model import load_model
from fsmde_jax.errors import ConfigError, DataError, exit_with_message
from fsmde_jax.models.student import STRIDE
from fsmde_jax.models.teacher_images import REFERENCE_SIZE
from fsmde_jax.names import parse_size
from fsmde_jax.predict_images import predict_folder
from fsmde_jax.teacher import open_teacher
from fsmde_jax.viz import rerun_recording
from fsmde_jax.viz.pointcloud import KEEP, MAX_RANGE

OPTIONS = {  # of one mode alone
    "--checkpoint": (
        "rig", "write", "rerun", "sample", "masks", "mask_set", "image_size", "keep", "max_range", "stride",
    ),
    "--teacher": ("size", "npy", "variant", "version", "max_depth"),
}  # fmt: skip


def _predict_rigs(args: argparse.Namespace) -> None:
    """The student's part of the command line."""
    if not args.max_range > 0 or not 0 < args.keep <= 1 or args.stride < 1:
        raise ConfigError("expected --max_range above 0, --keep above 0, at most 1, and --stride at least 1")
    rerun = rerun_recording.checked_path(args.rerun) if args.rerun else None
    size = parse_size(args.image_size, multiple=STRIDE) if args.image_size else None
    source = rig_frames.open_source(Path(args.input), args.rig, args.sample, args.masks, args.mask_set)
    model = load_model(args.checkpoint, image_size=size)
    print(f"{model.said}, at {model.image_size[0]}x{model.image_size[1]}; {source.what}")
    count = predict_rig.predict_source(
        model, source, Path(args.out), kinds=args.write, keep=args.keep, max_range=args.max_range,
        stride=args.stride, limit=args.limit, rerun=rerun,
    )  # fmt: skip
    print(f"{count} frames" + f" in {args.out}" * bool(args.write))
    if rerun:
        print(f"to look at them: rerun {rerun}")


def _check_mode(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The mode, a key of `OPTIONS`, that the flags choose, with none of the other one's (`ConfigError`)."""
    mode = "--teacher"
    if (args.checkpoint, args.input) != (None, None):
        mode = "--checkpoint"
        if args.teacher or args.images or args.checkpoint is None or args.input is None:
            raise ConfigError("--checkpoint and --input belong together, and not with --teacher and --images")
    elif args.teacher is None or args.images is None:
        raise ConfigError("give --checkpoint and --input for a rig, or --teacher and --images for single images")
    for other, names in OPTIONS.items():
        for name in names if other != mode else ():
            if getattr(args, name) != parser.get_default(name):
                raise ConfigError(f"--{name}: of {other} only, not of {mode}; leave it out")
    if args.limit < 0:
        raise ConfigError(f"--limit {args.limit}: expected at least 0")
    return mode


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fsmde_jax.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, metavar="O", help="folder for what is written")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="the first N frames or images (default all)")
    rigs = parser.add_argument_group("a rig, by a student")
    rigs.add_argument("--checkpoint", metavar="C", help="lite0 (in this package), the folder of a run, or its file")
    rigs.add_argument(
        "--input",
        metavar="X",
        help="records folder; nuScenes dataroot or its v1.0-... folder; ddad.json; or, with --rig, a folder with images"
        " or a video for each camera",
    )
    rigs.add_argument("--rig", default="", metavar="rig.yaml", help="calibration of images or videos")
    rigs.add_argument(
        "--write", nargs="*", choices=predict_rig.KINDS, default=list(predict_rig.KINDS), metavar="KIND",
        help=f"what to write: {' '.join(predict_rig.KINDS)} (default all; nothing = none of them)",
    )  # fmt: skip
    rigs.add_argument(
        "--rerun",
        default="",
        metavar="out.rrd",
        help="also a recording for the Rerun viewer, about 3 MB a frame (9 at 1600x900)",
    )
    rigs.add_argument(
        "--sample", default="", metavar="NAME", help="only this one of records, nuScenes (its token) or DDAD"
    )
    rigs.add_argument(
        "--masks", default="", metavar="DIR", help="of ddad.json: self-occlusion masks, as data_prep.ddad's"
    )
    rigs.add_argument("--mask_set", metavar="SET", help="of ddad.json: one set of the masks for all scenes")
    rigs.add_argument(
        "--image_size", default="", metavar="HxW", help="inside the network, multiples of 32 (default: the training's)"
    )
    rigs.add_argument(
        "--keep", type=float, default=KEEP, metavar="SHARE",
        help=f"share of the pixels, the surest ones, that clouds show (default {KEEP:g})",
    )  # fmt: skip
    rigs.add_argument(
        "--max_range", type=float, default=MAX_RANGE, metavar="M", help=f"of clouds, metres (default {MAX_RANGE:g})"
    )
    rigs.add_argument(
        "--stride", type=int, default=1, metavar="N", help="clouds take every N-th row and column (default 1)"
    )
    single = parser.add_argument_group("single images, by a teacher")
    single.add_argument(
        "--teacher",
        metavar="T",
        help="tiny (in this package), a folder of fsmde_jax.convert, a .pth or .safetensors file; or a student:"
        " lite0 (in this package), its run or file",
    )
    single.add_argument("--images", metavar="I", help="image file, or folder with images (also below)")
    single.add_argument(
        "--size", type=int, metavar="PIXELS",
        help=f"shorter side inside the network (default {REFERENCE_SIZE}, or what the teacher's card says); smaller is"
        " faster and coarser",
    )  # fmt: skip
    single.add_argument("--npy", action="store_true", help="also write the numbers as .npy, float32 [H, W]")
    add_teacher_flags(parser)
    args = parser.parse_args(argv)
    with exit_with_message():
        if _check_mode(parser, args) == "--checkpoint":
            _predict_rigs(args)
            return
        if not Path(args.images).exists():
            raise DataError(f"--images {args.images}: no such file or folder")
        teacher = open_teacher(args.teacher, variant=args.variant, version=args.version, max_depth=args.max_depth)
        if args.size is not None and args.size < (least := teacher.module().patch):
            raise ConfigError(f"--size {args.size}: expected at least {least} pixels")
        count = predict_folder(
            teacher, Path(args.images), Path(args.out), size=args.size, npy=args.npy, limit=args.limit
        )
        print(f"{count} pictures in {args.out}")


if __name__ == "__main__":
    heap.keep_freed_memory()
    main()
