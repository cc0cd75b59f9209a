"""How accurate a teacher is: protocol P0 (affine-aligned) on records, beside predictors without a network.

  python -m benchmarks.teacher_accuracy --teacher tiny --records records/teacher_world_val --truth dense \
      --fit records/teacher_world_train
  python -m benchmarks.teacher_accuracy --teacher teachers/small --records records/nuscenes/val --limit 200

The images are brought to the size that the teacher was trained at (--longer_side for another). Prints a Markdown table
per records folder; --out also writes it, with per-camera rows and pictures.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from fsmde_jax import evaluate, identity, trivial
from fsmde_jax.convert import add_teacher_flags
from fsmde_jax.data.records import open_records, require_dense_depth
from fsmde_jax.errors import exit_with_message
from fsmde_jax.eval_options import EvalOptions
from fsmde_jax.models.student import normalise_images
from fsmde_jax.models.teacher_images import LONGER_SIDE, teacher_size
from fsmde_jax.results import Results
from fsmde_jax.teacher import Teacher, open_teacher
from fsmde_jax.teacher_signal import run_teacher


def measure(
    teacher: Teacher,
    folder: str,
    *,
    truth: str,
    fit: str,
    longer_side: int,
    max_depth: float | None,
    limit: int,
    num_pictures: int,
) -> Results:
    """P0 of a teacher on one records folder.

    Args:
      teacher: the network, relative or metric.
      folder: records.
      truth: "lidar" or "dense".
      fit: records that the trivial predictors are fitted on; "" = the evaluated ones, which flatters them.
      longer_side: pixels of the longer side of the teacher's input.
      max_depth: metres, ground truth beyond is ignored; None = the records' own.
      limit: samples, spread evenly; 0 = all.
      num_pictures: panoramas.
    """
    records = open_records(folder)
    fitted = open_records(fit, records.cameras) if fit else records
    for each in (records, fitted) if truth == "dense" else ():
        require_dense_depth(each, "--truth dense")
    module = teacher.module(in_turn=jax.default_backend() == "cpu")
    size = teacher_size([int(side) for side in records[0].image_size[0]], longer_side, module.patch)
    params = jax.device_put(teacher.params)

    @jax.jit
    def run(params: Any, images: jax.Array) -> jax.Array:
        return run_teacher(module, params, normalise_images(images), size=size).rel_inv_depth

    manifest = records.manifest
    options = EvalOptions(
        image_size=size, protocol="affine", ground_truth=truth, min_depth=manifest.min_depth,  # type: ignore[arg-type]
        max_depth=max_depth or manifest.max_depth, limit=limit, num_pictures=num_pictures,
    )  # fmt: skip
    depths = trivial.fit(
        fitted, size, min_depth=options.min_depth, max_depth=options.max_depth, truth=options.ground_truth
    )
    baselines = {name: evaluate.inverse(predict) for name, predict in depths.items()}
    config = {"teacher": dataclasses.asdict(teacher.card), "fit": fit or folder}
    made_by = identity.run_identity(config, {"eval": records.fingerprint, "fit": fitted.fingerprint})
    made_by |= {"checkpoint": teacher.card.source or teacher.card.variant}
    return evaluate.evaluate(
        lambda batch: run(params, batch["images"]), records, options, run_identity=made_by, baselines=baselines
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.teacher_accuracy", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--teacher", default="tiny", metavar="T", help="as of fsmde_jax.predict (default tiny)")
    parser.add_argument("--records", required=True, nargs="+", metavar="R", help="records folders")
    parser.add_argument("--truth", choices=("lidar", "dense"), default="lidar", help="ground truth (default lidar)")
    parser.add_argument("--fit", default="", metavar="R", help="records for the trivial predictors (default: the same)")
    parser.add_argument("--longer_side", type=int, metavar="PIXELS", help="of the input (default: the card's, or 630)")
    parser.add_argument("--max_depth_of_truth", type=float, metavar="M", help="metres (default: the records' own)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="samples per folder (default all)")
    parser.add_argument("--out", metavar="O", help="folder for tables and pictures")
    add_teacher_flags(parser)
    args = parser.parse_args(argv)
    with exit_with_message():
        teacher = open_teacher(args.teacher, variant=args.variant, version=args.version, max_depth=args.max_depth)
        longer_side = args.longer_side or teacher.card.longer_side or LONGER_SIDE
        for folder in args.records:
            results = measure(
                teacher, folder, truth=args.truth, fit=args.fit, longer_side=longer_side,
                max_depth=args.max_depth_of_truth, limit=args.limit, num_pictures=4 if args.out else 0,
            )  # fmt: skip
            print(results.to_markdown())
            if not args.fit:
                print("The trivial predictors were fitted on these same records.")
            if args.out:
                stem = "_".join(Path(folder).parts[-2:]).replace("/", "")
                results.write(Path(args.out), f"{stem}_{args.truth}")


if __name__ == "__main__":
    main()
