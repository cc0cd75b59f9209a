"""Depth Anything weights (.pth or .safetensors, official or transformers layout) -> a folder that needs no PyTorch.

Also what was trained here: --weights takes the folder of a run. --out x.safetensors makes one file of it, with a card
beside it that says how it was trained: of a teacher in the official layout, for the official code; of a student for
--init_from, for evaluation, and to teach other students.

  python -m fsmde_jax.convert --weights depth_anything_v2_vits.pth --out teachers/small
  python -m fsmde_jax.convert --weights depth_anything_v2_metric_vkitti_vitl.pth --max_depth 80 --out teachers/outdoor
  python -m fsmde_jax.convert --weights runs/teacher_world --out teachers/mine.safetensors --half
  python -m fsmde_jax.convert --weights runs/nuscenes --out students/mine.safetensors --half

The size is told by the shapes. Whether a file is metric is not in it: give --max_depth for the metric checkpoints (20
for indoor, 80 for outdoor ones), and --version 1 for Depth Anything V1. Reading .pth files needs torch.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import jax

from fsmde_jax.errors import ConfigError, exit_with_message
from fsmde_jax.models.depth_anything import VARIANTS
from fsmde_jax.students import write_student
from fsmde_jax.teacher import Teacher, open_teacher, save_file, save_teacher, teacher_of_run


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
    parser.add_argument("--weights", required=True, metavar="W", help=".pth or .safetensors file, or a run")
    parser.add_argument("--out", required=True, metavar="O", help="new folder, or new .safetensors file")
    parser.add_argument("--half", action="store_true", help="store float16 in the .safetensors file")
    add_teacher_flags(parser)
    args = parser.parse_args(argv)
    with exit_with_message():
        if Path(args.out).exists():
            raise ConfigError(f"--out {args.out}: exists already; choose another folder or delete it")
        as_file = args.out.endswith(".safetensors")
        if args.half and not as_file:
            raise ConfigError("--half: only for --out x.safetensors")
        if _is_student(Path(args.weights)):
            _write_student(args, as_file)
            return
        teacher = _read(args)
        if teacher.card.student:
            raise ConfigError(f"--weights {args.weights}: a student's file already; nothing is to be converted")
        if as_file:
            save_file(teacher, args.out, half=args.half)
        else:
            save_teacher(teacher, args.out)
        numbers = sum(leaf.size for leaf in jax.tree.leaves(teacher.params))
        card = teacher.card
        kind = "relative inverse depth" if card.max_depth is None else f"metric depth up to {card.max_depth:g} m"
        print(f"{args.out}: Depth Anything V{card.version} {card.variant}, {numbers:,} parameters, {kind}")
        print(f"see it work: python -m fsmde_jax.predict --teacher {args.out} --images <folder> --out <folder>")


def _is_student(run: Path) -> bool:
    if not (run / "identity.json").is_file():
        return False
    made_by = json.loads((run / "identity.json").read_text(encoding="utf-8"))
    return made_by["config"].get("task", "student") == "student"


def _write_student(args: argparse.Namespace, as_file: bool) -> None:
    if not as_file:
        raise ConfigError(f"--out {args.out}: of a student's run a file is made; end the name in .safetensors")
    _refuse_said(args)
    card = write_student(args.weights, args.out, half=args.half)
    megabytes = Path(args.out).stat().st_size / 1e6
    print(f"{args.out}: student of {card['source']}, step {card['step']}, {megabytes:.1f} MB; its card is beside it")
    print(f"use it: python -m fsmde_jax.main --config <config> --init_from {args.out} (--mode evaluate)")


def _refuse_said(args: argparse.Namespace) -> None:
    for key in ("variant", "version", "max_depth"):
        if getattr(args, key) is not None:
            raise ConfigError(f"--{key}: a run says so itself; leave it out")


def _read(args: argparse.Namespace) -> Teacher:
    said = {key: getattr(args, key) for key in ("variant", "version", "max_depth")}
    if not Path(args.weights).is_dir() or (Path(args.weights) / "card.json").exists():
        return open_teacher(args.weights, **said)
    if not (Path(args.weights) / "identity.json").exists():
        raise ConfigError(f"--weights {args.weights}: neither a file nor a teacher's run; name the file in it")
    _refuse_said(args)
    return teacher_of_run(args.weights)


if __name__ == "__main__":
    main()
