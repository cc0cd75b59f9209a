"""Depth Anything weights (.pth or .safetensors, official or transformers layout) -> a folder that needs no PyTorch.

  python -m fsmde_jax.convert --weights depth_anything_v2_vits.pth --out teachers/small
  python -m fsmde_jax.convert --weights depth_anything_v2_metric_vkitti_vitl.pth --max_depth 80 --out teachers/outdoor

The size is told by the shapes. Whether a file is metric is not in it: give --max_depth for the metric checkpoints (20
for indoor, 80 for outdoor ones), and --version 1 for Depth Anything V1. Reading .pth files needs torch.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax

from fsmde_jax.errors import ConfigError, exit_with_message
from fsmde_jax.models.depth_anything import VARIANTS
from fsmde_jax.teacher import open_teacher, save_teacher


def add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say what a weight file holds."""
    parser.add_argument("--variant", choices=list(VARIANTS), help="size of the network (default: by its shapes)")
    parser.add_argument("--version", type=int, choices=(1, 2), help="Depth Anything V1 or V2 (default 2)")
    parser.add_argument("--max_depth", type=float, metavar="M", help="metric checkpoints: their largest depth, metres")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fsmde_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, metavar="FILE", help=".pth or .safetensors file")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder")
    add_teacher_flags(parser)
    args = parser.parse_args(argv)
    with exit_with_message():
        if Path(args.out).exists():
            raise ConfigError(f"--out {args.out}: exists already; choose another folder or delete it")
        if Path(args.weights).is_dir():
            raise ConfigError(f"--weights {args.weights}: is a folder; name the .pth or .safetensors file in it")
        teacher = open_teacher(args.weights, variant=args.variant, version=args.version, max_depth=args.max_depth)
        save_teacher(teacher, args.out)
        numbers = sum(leaf.size for leaf in jax.tree.leaves(teacher.params))
        kind = "relative inverse depth" if args.max_depth is None else f"metric depth up to {args.max_depth:g} m"
        card = teacher.card
        print(f"{args.out}: Depth Anything V{card.version} {card.variant}, {numbers:,} parameters, {kind}")
        print(f"see it work: python -m fsmde_jax.predict --teacher {args.out} --images <folder> --out <folder>")


if __name__ == "__main__":
    main()
