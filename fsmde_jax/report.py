"""One HTML file of a run: what it was, its curves, its evaluations, pictures, and a point cloud to turn.

  python -m fsmde_jax.report --workdir runs/world --out world.html
  python -m fsmde_jax.report --workdir runs/world --records records/world_val --frame 3 --out world.html

The file needs no network and nothing beside it. The cloud is predicted by the run's best (else latest) student from a
frame of the records that it was evaluated on, or of --records; without records there is none.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2

from fsmde_jax import depth_model, rig_frames
from fsmde_jax.data.tfrecord import write_atomically
from fsmde_jax.errors import ConfigError, DataError, exit_with_message
from fsmde_jax.metrics import NAMES
from fsmde_jax.viz import report_page
from fsmde_jax.viz.birdseye import birdseye
from fsmde_jax.viz.pointcloud import fuse, surest

_LEFT_OUT = ("rigs_per_second", "valid_pixels", "skipped", "skipped_steps", "param_norm", "input_share")


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _curves(path: Path) -> str:
    """Charts of what metrics.jsonl holds: losses, each term, and evaluations."""
    if not path.is_file():
        return ""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # a line that a kill cut short
        for name, value in values.items():
            if name != "step":
                curves.setdefault(name, []).append((values["step"], value))
    train = [name for name in curves if name.startswith("train/") and name.split("/")[1] not in _LEFT_OUT]
    evaluated = [f"eval/metric/{name}" for name in NAMES] + ["eval/affine/abs_rel", "eval/consistency/overall"]
    charts = [report_page.chart(name, {name: curves[name]}) for name in [*train, *evaluated] if name in curves]
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _evaluations(folder: Path) -> tuple[str, str]:
    """(tables, pictures) of a run's evaluations."""
    tables, pictures = [], []
    for file in sorted(folder.glob("*.json")):
        found = _json(file)
        tables.append(
            f'<p>{found["title"]}<br><span class="small">{file.stem}, protocol {found["protocol"]}</span></p>'
        )
        rows = [
            [f"{part}, {camera}" if camera != "all" else part, *(row[name] for name in NAMES)]
            for part, of in found["table"].items()
            for camera, row in of.items()
            if camera == "all" or part in ("metric", "affine")
        ]
        rows += [[f"trivial: {name}", *(of["all"][m] for m in NAMES)] for name, of in found.get("trivial", {}).items()]
        tables.append(report_page.table(["", *NAMES], rows))
        if "overall" in found.get("consistency", {}):
            tables.append(f"<p>Cross-view consistency: {found['consistency']['overall']:.4f}</p>")
        for image in sorted(folder.glob("*.png")):
            if image.stem.rpartition("_")[0] != file.stem:
                continue  # of another evaluation, whose name may begin with this one's
            shown = cv2.imread(str(image))
            if shown is not None:
                pictures.append(report_page.picture(shown[..., ::-1], image.stem))
    return "".join(tables), "".join(pictures)


def _cloud(workdir: Path, records: str, frame: int) -> str:
    """Point cloud and bird's-eye view of one frame."""
    source = rig_frames.open_source(Path(records))
    if not 0 <= frame < source.count:
        raise ConfigError(f"--frame {frame}: {records} has frames 0 to {source.count - 1}")
    model = depth_model.load_model(str(workdir))
    each = next(itertools.islice(source.frames(), frame, None))
    found = model(each.images, each.intrinsics, each.cam_to_ego)
    fused = fuse(
        each.images, list(found.depth), list(found.confidence), each.intrinsics, each.cam_to_ego, visible=each.visible,
        min_confidence=surest(list(found.confidence), 0.6),
    )  # fmt: skip
    caption = f"{each.name}: the surest {len(fused.points):,} points of {len(each.cameras)} cameras by {model.said}."
    above = report_page.picture(birdseye(fused, each.lidar, title=each.name), "From above; white: LiDAR")
    return report_page.cloud(fused, "cloud", caption) + above


def write_report(workdir: Path, out: Path, *, records: str | None = None, frame: int = 0) -> None:
    """Writes the report of a run.

    Args:
      workdir: the run's folder.
      out: new .html file; an old one is replaced.
      records: folder for the point cloud; None = what the run was evaluated on, if it is there.
      frame: which of its records.

    Raises:
      DataError: `workdir` is no run, or the file cannot be written. FsmdeError: of reading records or the checkpoint.
    """
    if not (workdir / "identity.json").is_file():
        raise DataError(f"--workdir {workdir}: no run (no identity.json in it)")
    made = _json(workdir / "identity.json")
    config = made["config"]
    hardware, versions = made["hardware"], made["versions"]
    known = {
        "date": made["date"], "commit": made["commit"],
        "hardware": f"{hardware['device']} x {hardware['device_count']}, {hardware['cores']} cores",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "records": f"train {config['data']['train_records']}, eval {config['data']['eval_records']}",
        "network": f"{config['model']['encoder']}, {config['model']['num_bins']} bins, images"
        f" {'x'.join(map(str, config['data']['image_size']))}" if config.get("task", "student") == "student"
        else f"teacher {config['teacher']['variant']}",
        "training": f"{config['train']['steps']} steps of {config['data']['batch_size']} rig(s),"
        f" learning rate {config['optim']['lr']}",
    }  # fmt: skip
    if "teacher" in made:
        known["teacher"] = f"{config['teacher']['weights']} ({made['teacher']['sha256'][:12]})"
    tables, pictures = _evaluations(workdir / "evaluation")
    shown, cloud = records, ""
    if shown is None and (Path(config["data"]["eval_records"]) / "manifest.json").is_file():
        shown = config["data"]["eval_records"]
    if shown and config.get("task", "student") == "student":
        cloud = _cloud(workdir, shown, frame)
    sections = {
        "Evaluation": tables, "Point cloud": cloud, "Pictures": pictures, "Curves": _curves(workdir / "metrics.jsonl"),
        "What it was": report_page.facts(known),
        "Config": report_page.folded("all keys", json.dumps(config, indent=1)),
    }  # fmt: skip
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, report_page.page(f"{config.get('name', workdir.name)}: {workdir}", sections).encode())
    except OSError as error:
        raise DataError(f"--out {out}: cannot write ({error.strerror}); free space or choose another place") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fsmde_jax.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, metavar="D", help="folder of the run")
    parser.add_argument("--out", required=True, metavar="FILE.html", help="file to write")
    parser.add_argument("--records", metavar="R", help="records for the point cloud (default: the run's eval_records)")
    parser.add_argument("--frame", type=int, default=0, metavar="K", help="which of them (default 0)")
    args = parser.parse_args(argv)
    with exit_with_message():
        write_report(Path(args.workdir), Path(args.out), records=args.records, frame=args.frame)
        size = Path(args.out).stat().st_size / 1e6
        print(f"{args.out}: {size:.1f} MB, opens in any browser")


if __name__ == "__main__":
    main()
