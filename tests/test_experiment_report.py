"""The report of an experiment, from results that no run made, against NumPy and SciPy."""

import json
import re

import numpy as np
import pytest
from scipy import stats

from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.experiment import report as experiment_report
from fsmde_jax.experiment.plan import TEST, Run, planned_tests, planned_tuning
from tests import made_up_runs
from tests.made_up_runs import DATA

FREE = {"supervised": {}, "ckd": {}}
PNG = b"\x89PNG"


def _fill(root, suite, scale=0.9):
    """Results of all rows and of the sweep; {(group, truth): {seed: metrics}}."""
    values = {}
    for run in planned_tests(suite, "ring", list(suite.rows), FREE, sweeps=["bins"]):
        metrics = {
            truth: made_up_runs.metrics_of(np.random.default_rng([run.seed, k]), scale if run.row == "ckd" else 1.0)
            for k, truth in enumerate(("lidar", "dense"))
        }
        made_up_runs.write(root, run, made_up_runs.result(run, metrics))
        for truth in metrics:
            values.setdefault((run.group, truth), {})[run.seed] = metrics[truth]
    return values


def test_report_against_numpy_and_scipy(tmp_path):
    suite = made_up_runs.suite()
    values = _fill(tmp_path / "runs", suite)
    noisy = tmp_path / "runs/small/ring/ckd-tune_lr=0.001/seed100"
    run = planned_tuning(suite, "ring", ["ckd"])[0]
    made_up_runs.write(tmp_path / "runs", run, made_up_runs.result(run, {"lidar": {"metric/abs_rel": 9.0}}))
    assert (noisy / "result.json").is_file()  # of the tuning phase: not in the report
    files = experiment_report.report(suite, tmp_path / "runs", ["ring"], tmp_path / "out")
    assert {f.name for f in files} == {
        "small.json", "small.md", "small_ring_improvement.png", "small_ring_bins.png", "small_ring_curves.png"
    }  # fmt: skip
    assert all(f.read_bytes()[:4] == PNG for f in files if f.suffix == ".png")
    found = json.loads((tmp_path / "out/small.json").read_text())["rigs"]["ring"]
    for truth in ("lidar", "dense"):
        ours, theirs = values["ckd", truth], values["supervised", truth]
        row = found["rows"][truth]["ckd"]
        assert row["seeds"] == [0, 1, 2] and found["rows"][truth]["supervised"]["seeds"] == [0, 1, 2, 3, 4]
        rmse = np.array([[v["metric/rmse"] for v in rows.values()][:3] for rows in (ours, theirs)])
        assert row["metrics"]["metric/rmse"]["std"] == pytest.approx(np.std(rmse[0], ddof=1))
        difference = row["difference"]["metric/rmse"]
        assert difference["mean"] == pytest.approx((rmse[0] - rmse[1]).mean())
        assert difference["standard_error"] == pytest.approx(stats.sem(rmse[0] - rmse[1]))
        # errors 0.9 times the reference's at every seed, a1 1 / 0.9 times
        assert row["improvement"]["mean"] == pytest.approx((4 * 0.1 + (1 / 0.9 - 1)) / 5)
        assert row["improvement"]["count"] == 3 and row["improvement"]["counts"]
    assert found["rows"]["lidar"]["supervised"]["improvement"] is None
    sweep = found["sweeps"]["bins"]
    assert (sweep["labels"], sweep["numbers"]) == (["4", "8"], [4.0, 8.0])
    at_4 = sweep["rows"]["lidar"]["ckd"]["4"]
    assert at_4["seeds"] == [0, 1] and at_4["improvement"]["count"] == 2
    assert sweep["rows"]["lidar"]["ckd"]["8"] == found["rows"]["lidar"]["ckd"]
    assert found["late_change"]["mean"] == pytest.approx(-0.25) and found["seconds"]["ckd"] == pytest.approx(11.0)
    assert found["missing"] == [] and len(found["runs"]) == 12
    swept_run = next(r for r in found["runs"] if r["variant"] == "bins=4" and r["row"] == "supervised")
    assert swept_run["config_differs"] == {"model.num_bins": 4}

    page = (tmp_path / "out/small.md").read_text()
    mean, std = (
        np.mean(abs_rel := [v["metric/abs_rel"] for v in values["ckd", "dense"].values()]),
        np.std(abs_rel, ddof=1),
    )
    assert f"| `ckd` | 3 | {mean:.4f} ± {std:.4f} |" in page
    assert "+10.22 ± 0.00 % |" in page and "reference |" in page
    shown = [
        "`records/test` (fingerprint cccccccccccc)", "commit: 111111111111", "cpu (cpu) x 1, 2 cores",
        "2 steps of 1 rig(s)", "python -m make test", "### Sweep: model.num_bins", "![small_ring_bins.png]", "-25.0",
    ]  # fmt: skip
    for words in shown:
        assert words in page, words
    assert str(tmp_path) not in page + (tmp_path / "out/small.json").read_text()


def test_a_difference_within_two_standard_errors_is_marked(tmp_path):
    suite = made_up_runs.suite(sweeps={})
    for row, values in (("supervised", (0.20, 0.21, 0.22)), ("ckd", (0.21, 0.20, 0.218))):
        for seed, value in enumerate(values):
            run = Run(suite, "ring", row, seed, TEST)
            metrics = {**made_up_runs.metrics_of(np.random.default_rng(0)), "metric/abs_rel": value}
            made_up_runs.write(tmp_path, run, made_up_runs.result(run, {"lidar": metrics}))
    page = experiment_report.report(suite, tmp_path, ["ring"], tmp_path / "out")
    text = next(path for path in page if path.suffix == ".md").read_text()
    error = stats.sem([0.01, -0.01, -0.002])
    assert f"| `ckd` | 3 | -0.0007 ± {error:.4f} ° |" in text
    assert re.search(r"\| `ckd` \| 3 \| .* % ° \|", text)
    assert "+0.000 ± 0.000 °" in text  # equal at every seed: no difference


def test_reports_of_unlike_or_missing_results_are_refused(tmp_path):
    suite = made_up_runs.suite()
    with pytest.raises(ConfigError, match=r"no results of the test phase for ring[\s\S]*--rig ring"):
        experiment_report.report(suite, tmp_path, ["ring"], tmp_path / "out")
    _fill(tmp_path, suite)
    run = Run(suite, "ring", "ckd", 1, TEST)
    metrics = {truth: made_up_runs.metrics_of(np.random.default_rng(0)) for truth in ("lidar", "dense")}
    made_up_runs.write(tmp_path, run, made_up_runs.result(run, metrics, data={**DATA, "test": "d" * 64}))
    with pytest.raises(ConfigError, match="small/ring/ckd/seed1: was trained or measured on other records"):
        experiment_report.report(suite, tmp_path, ["ring"], tmp_path / "out")
    content = made_up_runs.result(run, metrics)
    content["config"]["optim"]["lr"] = 5.0
    folder = made_up_runs.write(tmp_path, run, content)
    with pytest.raises(ConfigError, match=r"another config than seed 0[\s\S]*optim\.lr: 0\.0003 there, 5\.0 now"):
        experiment_report.report(suite, tmp_path, ["ring"], tmp_path / "out")
    (folder / "result.json").write_text('{"seed": 1}')
    with pytest.raises(DataError, match=r"seed1/result\.json: damaged result \(without row"):
        experiment_report.report(suite, tmp_path, ["ring"], tmp_path / "out")
