"""One HTML file of a run: what it was, its curves, its evaluations, pictures, and a point cloud to turn.

  python -m fsmde_jax.report --workdir runs/world --out world.html
  python -m fsmde_jax.report --workdir runs/world --records records/world_val --frame 3 --out world.html

--workdir is a run, or a folder of --mode evaluate --init_from ..., which holds evaluations alone. The file needs no
network and nothing beside it. The cloud is predicted by the run's best (else latest) student, or by the one that was
evaluated, from a frame of the records that it was evaluated on, or of --records. Where these are not there, or the
training has no checkpoint yet, the page says so instead.
"""

import argparse
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2

from fsmde_jax import checkpoint, depth_model, rig_frames, rig_samples
from fsmde_jax.data.records import open_records
from fsmde_jax.data.tfrecord import write_atomically
from fsmde_jax.errors import ConfigError, DataError, TrainingError, exit_with_message
from fsmde_jax.metrics import NAMES
from fsmde_jax.predict_rig import fuse_frame
from fsmde_jax.viz import report_page
from fsmde_jax.viz.birdseye import birdseye

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


def _made_by(workdir: Path) -> dict[str, Any]:
    """Identity of a run; of a folder that holds evaluations alone, that of the newest (it has `trained_as`)."""
    if (workdir / "identity.json").is_file():
        return _json(workdir / "identity.json")
    found = [_json(file).get("identity", {}) for file in sorted((workdir / "evaluation").glob("*.json"))]
    found = [each for each in found if "config" in each and "trained_as" in each]
    if not found:
        raise DataError(f"--workdir {workdir}: no run (no identity.json in it), and no evaluation either")
    return max(found, key=lambda each: each["date"])


def _facts(made: dict[str, Any]) -> dict[str, str]:
    """What is told of a run or an evaluation."""
    config, hardware, is_run = made["config"], made["hardware"], "trained_as" not in made
    trained = made if is_run else made["trained_as"]
    was = trained["config"]
    known = {} if is_run else {"evaluated": f"{made['checkpoint']}, of commit {trained.get('commit', 'unknown')}"}
    known |= {
        "date": made["date"], "commit": made["commit"],
        "hardware": f"{hardware['device']} x {hardware['device_count']}, {hardware['cores']} cores",
        "versions": ", ".join(f"{name} {version}" for name, version in made["versions"].items()),
        "records": f"train {was['data']['train_records']}, eval {config['data']['eval_records']}",
        "network": f"{config['model']['encoder']}, {config['model']['num_bins']} bins, images"
        f" {'x'.join(map(str, config['data']['image_size']))}" if config.get("task", "student") == "student"
        else f"teacher {config['teacher']['variant']}",
        "training": f"{was['train']['steps']} steps of {was['data']['batch_size']} rig(s),"
        f" learning rate {was['optim']['lr']}",
    }  # fmt: skip
    if "teacher" in trained:
        known["teacher"] = f"{was['teacher']['weights']} ({trained['teacher']['sha256'][:12]})"
    return known


def _model(workdir: Path, made: dict[str, Any]) -> depth_model.DepthModel | str:
    """The student of a run, or the one that was evaluated; else why there is none, in words."""
    config, size = made["config"], tuple(made["config"]["data"]["image_size"])
    if "trained_as" not in made:
        if not checkpoint.has_checkpoint(workdir):
            return "the run has no checkpoint yet"
        return depth_model.load_model(str(workdir), image_size=size)
    if not (where := made.get("init_from")):
        return f"where to find what was evaluated ({made['checkpoint']}) is not written down"
    try:
        model = depth_model.load_model(where, image_size=size, dtype=config["model"]["dtype"])
    except (DataError, TrainingError) as error:
        return f"what was evaluated cannot be opened any more ({error})"
    if (model.meta["step"], model.meta["identity"]) != (made["step"], made["trained_as"]):
        return f"{where} holds other parameters now than those that were evaluated"
    return model


def _source(records: str | None, data: dict[str, Any]) -> rig_samples.Source | str:
    """The frames of `records`, else of the config's; else why there are none, in words."""
    own = records is None
    names = data["eval_records"] if records is None else records
    folders = [Path(name.strip()) for name in names.split(",") if name.strip()]
    if own and not (folders and all((folder / "manifest.json").is_file() for folder in folders)):
        return f"the records {names or '(none)'} are not here; --records names others"
    if own or (len(folders) > 1 and not Path(names).exists()):
        return rig_samples.of_records(open_records(names, data["cameras"]))
    return rig_frames.open_source(Path(names))


def _frame(source: rig_samples.Source, number: int) -> rig_samples.RigFrame:
    """Frame `number` of those that have a picture (`ConfigError`: there is none)."""
    if number < 0 or (source.count and number >= source.count):
        raise ConfigError(f"--frame {number}: expected 0 to {source.count - 1}, there are {source.what}")
    walked = 0
    for each in source.frames():
        if walked == number:
            return each
        walked += 1
    raise ConfigError(f"--frame {number}: {walked} of {source.what} have a picture, and the first is frame 0")


def _cloud(workdir: Path, made: dict[str, Any], records: str | None, number: int) -> str:
    """Point cloud and bird's-eye view of one frame, or a note why there is none."""
    source = _source(records, made["config"]["data"])
    each = source if isinstance(source, str) else _frame(source, number)
    model = each if isinstance(each, str) else _model(workdir, made)
    if isinstance(each, str) or isinstance(model, str):
        return f"<p>No point cloud: {html.escape(str(model))}.</p>"
    found = model(each.images, each.intrinsics, each.cam_to_ego)
    fused = fuse_frame(each, found)
    caption = f"{each.name}: the surest {len(fused.points):,} points of {len(each.cameras)} cameras by {model.said}"
    above = report_page.picture(birdseye(fused, each.lidar, title=each.name), "From above; white: LiDAR")
    return report_page.cloud(fused, "cloud", caption) + above


def write_report(workdir: Path, out: Path, *, records: str | None = None, frame: int = 0) -> None:
    """Writes the report of a run, or of a folder with evaluations alone.

    Args:
      workdir: the folder.
      out: new .html file; an old one is replaced.
      records: for the point cloud; several folders: separated by commas; None = what was evaluated on, if it is there.
      frame: which of their frames that have a picture.

    Raises:
      DataError: `workdir` is neither, or the file cannot be written. ConfigError: there is no such frame. FsmdeError:
        of reading records or the checkpoint.
    """
    made = _made_by(workdir)
    config = made["config"]
    tables, pictures = _evaluations(workdir / "evaluation")
    cloud = _cloud(workdir, made, records, frame) if config.get("task", "student") == "student" else ""
    sections = {
        "Evaluation": tables, "Point cloud": cloud, "Pictures": pictures, "Curves": _curves(workdir / "metrics.jsonl"),
        "What it was": report_page.facts(_facts(made)),
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
    parser.add_argument("--workdir", required=True, metavar="D", help="folder of the run, or of evaluations")
    parser.add_argument("--out", required=True, metavar="FILE.html", help="file to write")
    parser.add_argument("--records", metavar="R", help="records for the point cloud (default: eval_records)")
    parser.add_argument("--frame", type=int, default=0, metavar="K", help="which of them (default 0)")
    args = parser.parse_args(argv)
    with exit_with_message():
        write_report(Path(args.workdir), Path(args.out), records=args.records, frame=args.frame)
        size = Path(args.out).stat().st_size / 1e6
        print(f"{args.out}: {size:.1f} MB, opens in any browser")


if __name__ == "__main__":
    main()
