"""A small suite of experiments, results that no run made, and jobs that only pretend."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np

from fsmde_jax.errors import DataError
from fsmde_jax.experiment import report as experiment_report
from fsmde_jax.experiment.plan import TEST, Run
from fsmde_jax.experiment.suite import RigSetup, Row, Split, Suite, swept

DATA = {"train": "a" * 64, "val": "b" * 64, "test": "c" * 64}
HARDWARE = {"device": "cpu", "platform": "cpu", "device_count": 1, "processor": "x86_64", "cores": 2}
SETTINGS = {
    "data.image_size": (32, 64), "data.batch_size": 1, "model.decoder_channels": (4, 4, 8, 8, 8),
    "model.num_bins": 8, "model.focal_range": (100.0, 900.0), "train.steps": 2, "train.log_every": 1,
    "train.eval_every": 1, "train.eval_samples": 1, "train.picture_every": 0, "train.checkpoint_every": 1,
    "eval.num_pictures": 0, "teacher.weights": "", "distill.w_ckd": 0.0, "distill.w_vr": 0.0,
}  # fmt: skip


def splits(place="records") -> dict[str, Split]:
    return {
        role: Split(f"{place}/{role}", (f"python -m data_prep.world --out {place}", f"python -m make {role}"))
        for role in ("train", "val", "test")
    }


def suite(place="records", **changes) -> Suite:
    fields = {
        "name": "small",
        "title": "A small suite",
        "rigs": {"ring": RigSetup(config="nuscenes", **splits(place))},
        "rows": {
            "supervised": Row({}, seeds=5),
            "ckd": Row({"teacher.weights": "tiny", "teacher.dtype": "float32", "distill.w_ckd": 1.0}, seeds=3),
        },
        "candidates": ({"optim.lr": 1e-3}, {"optim.lr": 3e-3}),
        "overrides": SETTINGS,
        "sweeps": {"bins": swept("model.num_bins", (4, 8), ("supervised", "ckd"), seeds=2)},
    }
    return Suite(**{**fields, **changes})


def metrics_of(rng, scale=1.0) -> dict[str, float]:
    """Metrics of one run about typical values; errors are multiplied by `scale`."""
    typical = {"abs_rel": 0.2, "sq_rel": 1.5, "rmse": 5.0, "rmse_log": 0.3, "a1": 0.7, "a2": 0.85, "a3": 0.95}
    factor = {name: 1 / scale if name in ("a1", "a2", "a3") else scale for name in typical}
    found = {f"metric/{name}": float(v * rng.uniform(0.95, 1.05) * factor[name]) for name, v in typical.items()}
    return {**found, "median/abs_rel": 0.15 * scale, "consistency/overall": 0.1 * scale}


def result(run: Run, metrics: dict[str, dict[str, float]], **changes) -> dict:
    """Content of a result.json."""
    data = DATA if run.phase == TEST else {role: DATA[role] for role in ("train", "val")}
    content = {
        "suite": run.suite.name, "rig": run.rig, "row": run.row, "variant": run.variant, "seed": run.seed,
        "phase": run.phase, "config": run.config().to_dict(), "records": run.measured.records, "data": data,
        "commit": "1" * 40, "commit_of_evaluation": "1" * 40, "versions": {"python": "3.11", "jax": "1", "flax": "1"},
        "hardware": HARDWARE, "date": f"2026-01-0{run.seed % 9 + 1}T00:00:00+00:00", "teacher": None,
        "training": {"seconds": 10.0 + run.seed, "from_step": 0}, "step": 2,
        "titles": {truth: f"test 1 val, {truth}, subset, n = 4" for truth in metrics},
        "samples": dict.fromkeys(metrics, 4), "metrics": metrics,
    }  # fmt: skip
    return {**content, **changes}


def write(root: Path, run: Run, content: dict) -> Path:
    """Puts a result and a validation curve where its run would."""
    folder = root / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(content))
    lines = [{"step": s, f"eval/{experiment_report.MAIN}": 0.4 / s} for s in (1, 2, 3, 4)] + [
        {"step": 4, "train/loss": 1.0}
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


class Jobs:
    """Stands in for the two jobs: leaves the files that they leave, notes its calls, and stops where it is told to."""

    def __init__(self, value=lambda run_config: 0.2):
        self.calls: list[tuple[str, str]] = []
        self.value = value  # of metric/abs_rel, by the config
        self.stop_at: dict[str, BaseException] = {}  # "train" or "evaluate" -> what to raise, once

    def _enter(self, what: str, workdir: Path) -> None:
        self.calls.append((what, "/".join(Path(workdir).parts[-2:])))
        if what in self.stop_at:
            raise self.stop_at.pop(what)

    def train(self, config, workdir):
        workdir = Path(workdir)
        (workdir / "config.json").write_text(json.dumps(config.to_dict()))
        (workdir / "identity.json").write_text(json.dumps({"data": {"train": DATA["train"], "eval": DATA["val"]}}))
        (workdir / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
        (workdir / "best" / "1").mkdir(parents=True, exist_ok=True)
        self._enter("train", workdir)
        print("training output")

    def evaluate_run(self, config, workdir):
        self._enter("evaluate", workdir)
        flat = {**metrics_of(np.random.default_rng(config.seed)), "metric/abs_rel": self.value(config)}
        identity = {
            "trained_as": {"commit": "1" * 40}, "commit": "2" * 40, "versions": {"jax": "0.10"}, "hardware": HARDWARE,
            "date": "2026-01-01T00:00:00+00:00", "step": 2,
        }  # fmt: skip
        return _Results(f"{config.data.eval_records}, {config.eval.ground_truth}", flat, identity)


class _Results:
    samples = 4

    def __init__(self, title, flat, identity):
        self.title, self.identity, self._flat = title, identity, flat

    def flat(self):
        return self._flat


# In the place of `parallel._timed`, in processes of their own:


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def first_fails(run, *_):
    if run.seed == 0:
        raise DataError("the first")
    time.sleep(600)


def sleeps(run, root, data):
    (root / f"{os.getpid()}.pid").touch()
    time.sleep(600)
