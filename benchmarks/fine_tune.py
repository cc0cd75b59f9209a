"""What starting from the student in this package gives on real frames:
`FSMDE_REAL_DATA=<folder> python -m benchmarks.fine_tune [--out runs/fine_tune]`.

Two real rigs with hardly any labels: one nuScenes keyframe, trained on three of its cameras and measured on the other
three; and DDAD, trained on frames 1 and 3 of a clip and measured on frame 2 between them. Each is trained from random
parameters, from `--encoder` (ImageNet weights of EfficientNet-Lite0) if given, and from `lite0`; and `lite0` is
measured as it is. Protocol P1, 96x160. So few frames say how fast a student adapts, not how good it gets.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.real_frames import run
from fsmde_jax import identity
from fsmde_jax.errors import ConfigError, exit_with_message

TRAINED, HELD_OUT = ("CAM_FRONT", "CAM_BACK_LEFT", "CAM_BACK_RIGHT"), ("CAM_BACK", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT")
METRICS = ("abs_rel", "rmse", "a1")


def flags(steps: int, records: Path, measured: Path) -> list[str]:
    """Overrides of configs/student_world.py."""
    return [
        f"--config.data.train_records={records}", f"--config.data.eval_records={measured}",
        "--config.data.dense_depth=False", "--config.data.batch_size=1",
        f"--config.train.steps={steps}", "--config.optim.lr=5e-4", "--config.optim.warmup_steps=10",
        f"--config.train.checkpoint_every={steps}", "--config.train.eval_every=0", "--config.train.picture_every=0",
        "--config.eval.trivial=False", "--config.eval.checkpoint=latest",
    ]  # fmt: skip


def measure(workdir: Path, overrides: list[str], start: str = "") -> dict[str, float]:
    """P1, metric, of a run's student, or of the student `start`."""
    from_it = ["--init_from", start] if start else []
    run("fsmde_jax.main", "--config", "configs/student_world.py", "--workdir", str(workdir), "--mode", "evaluate",
        *from_it, *overrides)  # fmt: skip
    (path,) = (workdir / "evaluation").glob("*_surround.json")
    result = json.loads(path.read_text(encoding="utf-8"))["table"]
    return {name: result["metric"]["all"][name] for name in METRICS} | {
        "median-scaled abs_rel": result["median"]["all"]["abs_rel"]
    }


def compare(
    out: Path, steps: int, encoder: str, records: tuple[Path, Path], cameras: tuple[tuple[str, ...], ...]
) -> dict[str, dict[str, float]]:
    """Row by starting point -> metrics, for one rig."""
    overrides = flags(steps, *records)
    seen, unseen = ([f"--config.data.cameras={names!r}"] if names else [] for names in cameras)
    rows = {"lite0 as it is": measure(out / "as_it_is", [*overrides, *unseen], "lite0")}
    starts = {"random parameters": [], "lite0": ["--init_from", "lite0"]}
    if encoder:
        starts["ImageNet encoder"] = [f"--config.train.encoder_weights={encoder}"]
    for name, start in starts.items():
        workdir = out / name.replace(" ", "_")
        run("fsmde_jax.main", "--config", "configs/student_world.py", "--workdir", str(workdir), "--mode", "train",
            *start, *overrides, *seen)  # fmt: skip
        rows[f"{name}, {steps} steps"] = measure(workdir, [*overrides, *unseen])
    return rows


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    names = [*METRICS, "median-scaled abs_rel"]
    lines = ["| rig | start | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for rig in ("nuScenes", "DDAD"):
        for start, metrics in results[rig].items():
            lines.append(f"| {rig} | {start} | " + " | ".join(f"{metrics[n]:.4f}" for n in names) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fine_tune"), help="a new folder for all outputs")
    parser.add_argument("--steps", type=int, default=200, help="of every training (default 200)")
    parser.add_argument("--encoder", default="", metavar="W", help="ImageNet weights of EfficientNet-Lite0")
    args = parser.parse_args(argv)
    with exit_with_message():
        data = Path(os.environ.get("FSMDE_REAL_DATA", ""))
        keyframe, clip = data / "nuscenes_keyframe", data / "ddad_val_clip"
        if not keyframe.is_dir() or not clip.is_dir():
            raise ConfigError(
                f"FSMDE_REAL_DATA={str(data)!r}: expected a folder with nuscenes_keyframe/ and ddad_val_clip/"
            )
        if args.out.exists():
            raise ConfigError(f"{args.out}: exists; delete it or choose another --out, so that nothing is resumed")
        places = {name: args.out / "records" / name for name in ("keyframe", "frames_1_3", "frame_2")}
        run("data_prep.nuscenes", "--dataroot", str(keyframe), "--version", "v1.0-mini", "--split", "mini_train",
            "--out", str(places["keyframe"]))  # fmt: skip
        source = ["--json", str(clip / "ddad.json"), "--split", "val", "--masks", str(clip / "self_occlusion_masks")]
        run("data_prep.ddad", *source, "--samples", "0::2", "--out", str(places["frames_1_3"]))
        run("data_prep.ddad", *source, "--samples", "1::2", "--out", str(places["frame_2"]))
        options = (args.steps, args.encoder)
        results: dict[str, Any] = {
            "nuScenes": compare(args.out / "nuscenes", *options, (places["keyframe"],) * 2, (TRAINED, HELD_OUT)),
            "DDAD": compare(args.out / "ddad", *options, (places["frames_1_3"], places["frame_2"]), ((), ())),
        }
        text = table(results)
        results["identity"] = identity.run_identity({}, {})
        (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (args.out / "results.md").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}\n\nwritten: {args.out}/results.json, results.md; pictures in */evaluation/")


if __name__ == "__main__":
    main()
