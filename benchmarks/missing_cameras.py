"""What missing cameras cost the cameras that are left: `python -m benchmarks.missing_cameras --encoder <weights>`.

Students whose cameras look at each other (`model.cross_view_blocks=1`) are trained on complete rigs and with camera
dropout, beside one whose cameras do not, on rendered records; then cameras are hidden from the network: every single
one, every second one, and all but one. What is measured is always the cameras that are left (protocol P1, metric),
beside the same cameras of the complete rig; dense truth. One seed each. Records: those of
`python -m fsmde_jax.experiment --suite ablation --rig nuscenes --prepare`.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from configs import student_world
from fsmde_jax import build, evaluate, identity
from fsmde_jax.data.records import open_records
from fsmde_jax.data.tfrecord import write_atomically
from fsmde_jax.errors import ConfigError, DataError, exit_with_message
from fsmde_jax.eval_data import check_records
from fsmde_jax.eval_options import EvalOptions, options_from
from fsmde_jax.state import make_predict
from fsmde_jax.students import read_student
from fsmde_jax.train import train

STUDENTS = {
    "cameras by themselves": (0, 0.0),
    "cross-view, trained on complete rigs": (1, 0.0),
    "cross-view, camera dropout 0.3": (1, 0.3),
}  # name -> (model.cross_view_blocks, augment.camera_dropout)
METRIC = "abs_rel"


def hidden_sets(cameras: Sequence[str]) -> dict[str, list[tuple[str, ...]]]:
    """Kind of gap -> the sets of cameras that are hidden, for cameras in ring order."""
    return {
        "one of them": [(name,) for name in cameras],
        "every second": [tuple(cameras[start::2]) for start in (0, 1)],
        "all but one": [tuple(other for other in cameras if other != name) for name in cameras],
    }


def config_of(args: argparse.Namespace, blocks: int, dropout: float) -> ml_collections.ConfigDict:
    """configs/student_world.py on sparse LiDAR, one rig a step."""
    config = student_world.get_config()
    config.update_from_flattened_dict({
        "data.train_records": args.train_records, "data.eval_records": args.eval_records,
        "data.image_size": tuple(args.image_size), "data.dense_depth": False, "data.batch_size": 1,
        "data.num_threads": 1, "train.encoder_weights": args.encoder, "model.cross_view_blocks": blocks,
        "augment.camera_dropout": dropout, "train.steps": args.steps, "optim.warmup_steps": min(30, args.steps - 1),
        "train.checkpoint_every": args.steps, "train.eval_every": 0, "train.picture_every": 0,
    })  # fmt: skip
    return config


def options_of(config: ml_collections.ConfigDict) -> EvalOptions:
    """Against dense truth."""
    return dataclasses.replace(options_from(config), ground_truth="dense")


def trained(config: ml_collections.ConfigDict, workdir: Path) -> Callable[[tuple[str, ...]], dict[str, float]]:
    """Trains a student; what it returns measures it: hidden cameras -> {camera: metric} of those that are left."""
    train(config, workdir)
    tree, _, _ = read_student(workdir, "latest")
    predict = make_predict(build.build_model(config), build.read_fn(config))
    records = open_records(config.data.eval_records)

    def measure(hidden: tuple[str, ...]) -> dict[str, float]:
        options = dataclasses.replace(options_of(config), drop_cameras=hidden)
        found = evaluate.evaluate(lambda batch: predict(tree["params"], tree["batch_stats"], batch), records, options)
        return {name: metrics[METRIC] for name, metrics in found.table["metric"].items() if name != "all"}

    return measure


def costs(complete: Mapping[str, float], found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean over gaps and over the cameras left: with the gap, on the complete rig, and the change in percent."""
    left = statistics.fmean(statistics.fmean(one.values()) for one in found)
    before = statistics.fmean(statistics.fmean(complete[name] for name in one) for one in found)
    return {"with the gap": left, "complete": before, "change_percent": 100 * (left / before - 1)}


def table(results: Mapping[str, Any]) -> str:
    """Markdown."""
    kinds = list(next(iter(results.values()))["gaps"])
    lines = ["| student | complete rig | " + " | ".join(f"without {kind}" for kind in kinds) + " |"]
    lines.append("|---" * (2 + len(kinds)) + "|")
    for name, row in results.items():
        cells = [f"{gap['with the gap']:.4f} ({gap['change_percent']:+.1f} %)" for gap in row["gaps"].values()]
        lines.append(f"| {name} | {statistics.fmean(row['complete'].values()):.4f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_records", default="records/ablation_nuscenes_train", metavar="R")
    parser.add_argument("--eval_records", default="records/ablation_nuscenes_val", metavar="R")
    parser.add_argument("--encoder", default="", metavar="W", help="ImageNet weights of EfficientNet-Lite0")
    parser.add_argument("--image_size", type=int, nargs=2, default=(64, 128), metavar=("H", "W"), help="pixels")
    parser.add_argument("--steps", type=int, default=1200, help="of every training (default 1200)")
    parser.add_argument("--out", type=Path, default=Path("runs/missing_cameras"), help="a new folder for all outputs")
    args = parser.parse_args(argv)
    with exit_with_message():
        if args.out.exists():
            raise ConfigError(f"{args.out}: exists; delete it or choose another --out, so that nothing is resumed")
        records = open_records(args.eval_records)
        if len(records.cameras) < 2:
            raise ConfigError(f"--eval_records {args.eval_records}: one camera; expected at least 2, some to be hidden")
        configs = {name: config_of(args, *options) for name, options in STUDENTS.items()}
        check_records(records, options_of(next(iter(configs.values()))))
        gaps = hidden_sets(records.cameras)
        results: dict[str, Any] = {}
        for i, (name, config) in enumerate(configs.items()):
            print(f"\n{name}", flush=True)
            measure = trained(config, args.out / f"student_{i}")
            complete = measure(())
            row = {kind: costs(complete, [measure(hidden) for hidden in sets]) for kind, sets in gaps.items()}
            results[name] = {"complete": complete, "gaps": row}
            text = table(results)
            made_by = identity.run_identity(config.to_dict(), {"eval": records.fingerprint})
            content = {"metric": METRIC, "students": results, "identity": made_by}
            try:
                write_atomically(args.out / "results.json", (json.dumps(content, indent=1) + "\n").encode())
                write_atomically(args.out / "results.md", (text + "\n").encode())
            except OSError as error:
                raise DataError(f"{args.out}: cannot write ({error.strerror}); free space") from error
        print(f"\n{text}\n\nwritten: {args.out}/results.json, results.md")


if __name__ == "__main__":
    main()
