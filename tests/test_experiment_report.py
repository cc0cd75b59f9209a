"""The report of an experiment, from results that no run made, against NumPy and SciPy."""

import json
import re

import numpy as np
import pytest
from scipy import stats

from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.experiment import report as experiment_report
from fsmde_jax.experiment.plan import TEST, Run, planned_tests, planned_tuning
from fsmde_jax.experiment.suite import Row
from fsmde_jax.viz import experiment_plots
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
    assert f"| `ckd` | lr 0.0003 | 3 | {mean:.4f} ± {std:.4f} |" in page
    assert "+10.22 ± 0.00 % * n = 3 |" in page and "reference |" in page
    # The made-up curves fall to their last step, the fourth.
    assert found["best_at"]["ckd"] == {"mean": 1.0, "std": 0.0, "count": 3}
    assert "lowest (mean over seeds): supervised 100 %, ckd 100 %." in page
    assert "a sweep over `train.steps` shows" in page
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
    assert re.search(r"\| `ckd` \| lr 0\.0003 \| 3 \| .* % ° n = 3 \|", text)
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


def test_two_standard_errors_and_students_t_have_marks_of_their_own(tmp_path):
    suite = made_up_runs.suite(sweeps={})
    base, better = np.array([0.20, 0.21, 0.22]), np.array([0.01, 0.02, 0.03])
    for row, values in (("supervised", base), ("ckd", base - better)):
        for seed, value in enumerate(values):
            run = Run(suite, "ring", row, seed, TEST)
            metrics = {**made_up_runs.metrics_of(np.random.default_rng(0)), "metric/abs_rel": float(value)}
            metrics["metric/rmse"] = 5.0 - (row == "ckd") * (0.1 + 0.001 * seed)
            made_up_runs.write(tmp_path, run, made_up_runs.result(run, {"lidar": metrics}))
    experiment_report.report(suite, tmp_path, ["ring"], tmp_path / "out")
    lines = (tmp_path / "out/small.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| `ckd` | 3 |"))
    leader = next(line for line in lines if line.startswith("`ckd` has the highest mean improvement."))
    relative = (better / base + [(0.1 + 0.001 * seed) / 5.0 for seed in range(3)]) / 5  # the other three are equal
    percent = f"+{100 * relative.mean():.2f} ± {100 * stats.sem(relative):.2f} %"
    assert leader.endswith(f"over each other row: `supervised` {percent} * n = 3.")  # 4.6 standard errors
    assert stats.ttest_1samp(better, 0).statistic == pytest.approx(3.4641, abs=1e-4)  # between 2 and 4.303
    assert "| -0.0200 ± 0.0058 |" in row and "| -0.101 ± 0.001 * |" in row


def _write_rows(root, suite, **changes):
    """One seed of each row and sweep value of `suite`; `changes` of results by group."""
    for run in planned_tests(suite, "ring", list(suite.rows), FREE, seeds=[0], sweeps=suite.sweeps):
        metrics = {"lidar": made_up_runs.metrics_of(np.random.default_rng(0))}
        made_up_runs.write(root, run, made_up_runs.result(run, metrics, **changes.get(run.group, {})))


def _config(suite, row, **overrides):
    return Run(suite, "ring", row, 0, TEST, overrides=overrides).config().to_dict()


@pytest.mark.parametrize(
    ("group", "overrides", "line"),
    [
        ("ckd", {"model.num_bins": 4}, "model.num_bins: 4 in ckd, 8 in supervised"),
        ("ckd", {"model.max_depth": 70.0}, None),  # of the rig's own config
        ("ckd", {"optim.lr": 1.0}, "optim.lr: 1.0 in ckd, 0.0003 in ckd-bins=4"),  # not the candidate of its sweep
        ("ckd-bins=4", {"model.num_bins": 4, "distill.w_ckd": 2.0}, "distill.w_ckd: 1.0 in ckd, 2.0 in ckd-bins=4"),
        ("supervised-bins=4", {"model.num_bins": 4, "train.steps": 3}, "train.steps: 2 in ckd ckd-bins=4 supervised,"),
    ],
)
def test_rows_that_differ_in_what_they_should_share_are_refused(tmp_path, group, overrides, line):
    suite = made_up_runs.suite()
    row, key = group.partition("-")[0], list(overrides)[-1]
    _write_rows(tmp_path, suite, **{group: {"config": _config(suite, row, **overrides)}})
    with pytest.raises(ConfigError, match=rf"small/ring: one table[\s\S]*{re.escape(line or key)}"):
        experiment_report.report(suite, tmp_path, ["ring"], tmp_path / "out")


def test_rows_may_differ_in_what_they_or_their_candidates_override(tmp_path):
    suite = made_up_runs.suite(sweeps={})
    rows = {**suite.rows, "ckd": Row({**suite.rows["ckd"].overrides, "train.steps": 9}, seeds=3)}
    suite = made_up_runs.suite(sweeps={}, rows=rows)
    _write_rows(tmp_path, suite, ckd={"config": _config(suite, "ckd", **{"optim.lr": 3e-3})})
    experiment_report.report(suite, tmp_path, ["ring"], tmp_path / "out")
    page = (tmp_path / "out/small.md").read_text()
    assert "| `supervised` | lr 0.0003 | 1 |" in page and "| `ckd` | lr 0.003 | 1 |" in page


def test_one_teacher_is_one_set_of_weights(tmp_path):
    suite = made_up_runs.suite()
    ours, theirs = ({"teacher": {"weights": "tiny", "sha256": letter * 64}} for letter in "ef")
    _write_rows(tmp_path, suite, **{"ckd": ours, "ckd-bins=4": theirs})
    with pytest.raises(ConfigError, match=r"teacher 'tiny': SHA-256 e{12} in ckd, SHA-256 f{12} in ckd-bins=4"):
        experiment_report.report(suite, tmp_path, ["ring"], tmp_path / "out")
    _write_rows(tmp_path, suite, **{"ckd": ours, "ckd-bins=4": ours})
    experiment_report.report(suite, tmp_path, ["ring"], tmp_path / "out")


@pytest.mark.parametrize("commits", [["5" * 40], None])
def test_the_commit_of_the_tuning_is_named(tmp_path, commits):
    """Files from before do not hold it."""
    suite = made_up_runs.suite(sweeps={})
    _write_rows(tmp_path, suite)
    candidate = {"overrides": {"optim.lr": 0.001}, "mean": 0.25}
    row = {"chosen": candidate["overrides"], "candidates": [candidate], **({"commits": commits} if commits else {})}
    (tmp_path / "small/ring/tuned.json").write_text(json.dumps({"rows": {"supervised": row}}))
    experiment_report.report(suite, tmp_path, ["ring"], tmp_path / "out")
    page = (tmp_path / "out/small.md").read_text()
    assert "their val metric/abs_rel" in page and "may lie beyond" not in page  # of one candidate
    assert "**lr 0.001: 0.2500**" in page and ("(commit 555555555555); the lowest" in page) == bool(commits)


def test_a_bound_is_shown_and_never_called_the_best_method(tmp_path):
    rows = {
        "supervised": Row({}), "ckd": Row({"teacher.weights": "tiny", "distill.w_ckd": 1.0}),
        "every_pixel": Row({"data.dense_depth": True}, bound=True),
    }  # fmt: skip
    suite = made_up_runs.suite(sweeps={}, rows=rows)
    scales = {"supervised": 1.0, "ckd": 0.8, "every_pixel": 0.5}
    for run in planned_tests(suite, "ring", list(suite.rows), {name: {} for name in rows}):
        rng = np.random.default_rng(run.seed)
        metrics = {truth: made_up_runs.metrics_of(rng, scales[run.row]) for truth in ("lidar", "dense")}
        made_up_runs.write(tmp_path, run, made_up_runs.result(run, metrics))
    experiment_report.report(suite, tmp_path, ["ring"], tmp_path / "out")
    page = (tmp_path / "out/small.md").read_text()
    assert page.count("| `every_pixel` (bound) |") == 2 and "(bound): trained on labels" in page
    assert page.count("`ckd` has the highest mean improvement. Its improvement over each other row: `supervised`") == 2


@pytest.mark.parametrize(("best", "at_the_end"), [(0, True), (1, False), (2, True)])
def test_the_page_names_rows_whose_best_candidate_is_an_end_of_those_tried(tmp_path, best, at_the_end):
    suite = made_up_runs.suite(sweeps={})
    _write_rows(tmp_path, suite)
    tried = [{"overrides": {"optim.lr": rate}, "mean": 0.25} for rate in (0.001, 0.002, 0.004)]
    row = {"chosen": tried[best]["overrides"], "candidates": tried}
    (tmp_path / "small/ring/tuned.json").write_text(json.dumps({"rows": {"supervised": row}}))
    experiment_report.report(suite, tmp_path, ["ring"], tmp_path / "out")
    assert ("may lie beyond: `supervised`." in (tmp_path / "out/small.md").read_text()) == at_the_end


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": {"ckd": 1}}', '{"rows": {"ckd": {"chosen": {}}}}', "{}"])
def test_a_damaged_tuned_json_is_named(tmp_path, content):
    suite = made_up_runs.suite(sweeps={})
    _write_rows(tmp_path, suite)
    (tmp_path / "small/ring/tuned.json").write_text(content)
    with pytest.raises(DataError, match=r"small/ring/tuned\.json: damaged .*--phase tune"):
        experiment_report.report(suite, tmp_path, ["ring"], tmp_path / "out")


def test_a_damaged_curve_is_named(tmp_path):
    suite = made_up_runs.suite(sweeps={})
    _write_rows(tmp_path, suite)
    (tmp_path / "small/ring/ckd/seed0/metrics.jsonl").write_text('{"step": 1, "eval/metric/abs_rel": 0.4}\n{"st')
    with pytest.raises(DataError, match=r"ckd/seed0/metrics\.jsonl: damaged"):
        experiment_report.report(suite, tmp_path, ["ring"], tmp_path / "out")


def test_pictures_show_the_numbers_of_the_content(tmp_path, monkeypatch):
    suite = made_up_runs.suite()
    values = _fill(tmp_path, suite)
    results = experiment_report.read_results(tmp_path / "small/ring")
    found = experiment_report.collect(suite, "ring", tmp_path, results)
    figures = []
    monkeypatch.setattr(experiment_plots, "_png", lambda figure: figures.append(figure) or PNG)
    pictures = experiment_report.plots(found, "supervised")
    drawn = dict(zip(pictures, figures, strict=True))
    assert set(drawn) == {"improvement", "bins", "curves"}

    (lidar, dense) = drawn["improvement"].axes
    assert [axis.get_title() for axis in (lidar, dense)] == ["lidar ground truth", "dense ground truth"]
    assert [label.get_text() for label in lidar.get_yticklabels()] == ["ckd"]
    (bar,) = lidar.patches
    assert bar.get_width() == pytest.approx(100 * (4 * 0.1 + (1 / 0.9 - 1)) / 5)
    assert experiment_plots.COUNTS.lower() == _hex(bar.get_facecolor())

    axis = drawn["bins"].axes[1]  # dense
    assert [axis.get_xlabel(), axis.get_ylabel()] == ["model.num_bins", "abs_rel"]
    lines = {container.get_label(): container.lines for container in axis.containers}
    assert list(lines) == ["supervised", "ckd"] == [text.get_text() for text in axis.get_legend().get_texts()]
    (points, _, (bars,)) = lines["ckd"]
    at_4 = [metrics["metric/abs_rel"] for metrics in values["ckd-bins=4", "dense"].values()]
    own = [metrics["metric/abs_rel"] for metrics in values["ckd", "dense"].values()]
    np.testing.assert_allclose(points.get_xydata(), [[4, np.mean(at_4)], [8, np.mean(own)]])
    spans = [(segment[1] - segment[0])[1] / 2 for segment in bars.get_segments()]
    np.testing.assert_allclose(spans, [np.std(at_4, ddof=1), np.std(own, ddof=1)])

    curves = drawn["curves"].axes[0].lines
    assert [line.get_label() for line in curves] == [f"seed {seed}" for seed in range(5)]
    for line in curves:
        np.testing.assert_allclose(line.get_xydata(), [[s, 0.4 / s] for s in (1, 2, 3, 4)])


def _hex(colour):
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour[:3])
