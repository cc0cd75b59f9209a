"""The proof on real frames: `FSMDE_REAL_DATA=<folder> python -m benchmarks.real_frames [--out runs/real_frames]`.

Two small experiments through the product's own commands, which it prints: convert, train, checkpoint, restore, evaluate
(protocol P1). (1) nuScenes: ResNet-18 on ONE keyframe, evaluated on the same keyframe: the whole path can fit data. (2)
DDAD: trained on frames 1 and 3 of a clip, evaluated on frame 2 between them (about 1.3 m from each), beside the per-row
median depth of those frames, a predictor without a network. Neither says anything about unseen streets. There is no
teacher; with one: --config.teacher.weights=tiny --config.distill.w_ckd=1 --config.distill.w_vr=0.1.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fsmde_jax import evaluate, identity, trivial
from fsmde_jax.data.records import open_records
from fsmde_jax.errors import ConfigError, exit_with_message

SUPERVISED = ["--config.model.encoder=resnet18", "--config.distill.w_ckd=0", "--config.distill.w_vr=0"]
KEYFRAME = [
    *SUPERVISED,
    "--config.data.image_size=(192,320)", "--config.data.batch_size=1", "--config.augment.flip=0.0",
    "--config.augment.scale=(1.0,1.0)", "--config.augment.jitter_probability=0.0",
    "--config.model.decoder_channels=(16,32,64,96,128)", "--config.optim.lr=1e-3", "--config.optim.warmup_steps=20",
    "--config.train.steps=300", "--config.train.log_every=20", "--config.train.picture_every=0",
    "--config.train.checkpoint_every=200", "--config.train.eval_every=0",
]  # fmt: skip
CLIP = [
    *SUPERVISED,
    "--config.data.image_size=(192,320)", "--config.data.batch_size=2", "--config.optim.lr=1e-3",
    "--config.optim.warmup_steps=20", "--config.train.steps=300", "--config.train.log_every=25",
    "--config.train.eval_every=0", "--config.train.picture_every=0",
]  # fmt: skip


def run(*arguments: str) -> float:
    """Runs one of the product's commands, shown as a user would type it; returns its seconds."""
    print("\n$ python -m " + shlex.join(arguments), flush=True)
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", *arguments], check=True)
    return time.monotonic() - started


def train(config: str, records: tuple[Path, Path], workdir: Path, overrides: list[str]) -> dict[str, Any]:
    """Trains and evaluates; returns the result's numbers."""
    paths = [f"--config.data.train_records={records[0]}", f"--config.data.eval_records={records[1]}"]
    flags = [*overrides, "--config.eval.checkpoint=latest"]
    seconds = run("fsmde_jax.main", "--config", config, "--workdir", str(workdir), *paths, *flags)
    (path,) = (workdir / "evaluation").glob("*_surround.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    return {"seconds": seconds, "metric": result["table"]["metric"]["all"], "cameras": result["table"]["metric"]}


def keyframe(data: Path, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Experiment 1."""
    records = out / "nuscenes_keyframe"
    source = ["--dataroot", str(data / "nuscenes_keyframe"), "--version", "v1.0-mini", "--split", "mini_train"]
    run("data_prep.nuscenes", *source, "--out", str(records))
    return train("configs/nuscenes.py", (records, records), out / "run_keyframe", [*KEYFRAME, *overrides])


def clip(data: Path, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Experiment 2, with its baselines."""
    folder = data / "ddad_val_clip"
    source = ["--json", str(folder / "ddad.json"), "--split", "val", "--masks", str(folder / "self_occlusion_masks")]
    outer, middle = out / "ddad_frames_1_3", out / "ddad_frame_2"
    run("data_prep.ddad", *source, "--samples", "0::2", "--out", str(outer))
    run("data_prep.ddad", *source, "--samples", "1::2", "--out", str(middle))
    student = train("configs/ddad.py", (outer, middle), out / "run_clip", [*CLIP, *overrides])
    size, low, high = (192, 320), 0.1, 200.0
    options = evaluate.EvalOptions(size, min_depth=low, max_depth=high)
    student["row_median"] = {}
    for name, indices in (("frame 1", [0]), ("frame 3", [1]), ("frames 1 and 3", [0, 1])):
        predict = trivial.row_median_predictor(
            open_records(outer), size, min_depth=low, max_depth=high, indices=indices
        )
        student["row_median"][name] = evaluate.evaluate(predict, open_records(middle), options).table["metric"]["all"]
    return student


def table(results: dict[str, Any]) -> str:
    """Markdown, one row per predictor."""
    rows = [("nuScenes keyframe, student trained on it", results["keyframe"]["metric"], results["keyframe"]["seconds"])]
    rows += [("DDAD frame 2, student trained on frames 1 and 3", results["clip"]["metric"], results["clip"]["seconds"])]
    rows += [(f"DDAD frame 2, row median of {name}", m, None) for name, m in results["clip"]["row_median"].items()]
    names = ("abs_rel", "sq_rel", "rmse", "rmse_log", "a1")
    lines = ["| P1, metric | " + " | ".join(names) + " | train + evaluate |", "|---|" + "---|" * (len(names) + 1)]
    for label, metrics, seconds in rows:
        took = f"{seconds / 60:.1f} min" if seconds else "-"
        lines.append(f"| {label} | " + " | ".join(f"{metrics[n]:.4f}" for n in names) + f" | {took} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/real_frames"), help="a new folder for all outputs")
    args, overrides = parser.parse_known_args(argv)
    with exit_with_message():
        folder = os.environ.get("FSMDE_REAL_DATA", "")
        if not Path(folder, "nuscenes_keyframe").is_dir() or not Path(folder, "ddad_val_clip").is_dir():
            raise ConfigError(
                f"FSMDE_REAL_DATA={folder!r}: expected a folder with nuscenes_keyframe/ and ddad_val_clip/"
            )
        if args.out.exists():
            raise ConfigError(f"{args.out}: exists; delete it or choose another --out, so that nothing is resumed")
        if unknown := [o for o in overrides if not o.startswith("--config.")]:
            raise ConfigError(f"unknown argument {unknown[0]!r}; overrides are written --config.<key>=<value>")
        results = {
            "keyframe": keyframe(Path(folder), args.out, overrides),
            "clip": clip(Path(folder), args.out, overrides),
        }
        results["identity"] = {**identity.run_identity({}, {}), "processor": platform.processor()}
        text = table(results)
        (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (args.out / "results.md").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}\n\nwritten: {args.out}/results.json, results.md; pictures in run_*/evaluation/")


if __name__ == "__main__":
    main()
