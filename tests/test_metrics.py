"""Depth metrics against plain float64 loops and closed forms."""

import math

import numpy as np
import pytest

from fsmde_jax import distributed, metrics


def _reference(pred, gt):
    n = len(gt)
    rel = sq = square = logs = log10 = 0.0
    hits = [0, 0, 0]
    errors = []
    for d, g in zip(pred.tolist(), gt.tolist(), strict=True):
        rel += abs(d - g) / g
        sq += (d - g) ** 2 / g
        square += (d - g) ** 2
        e = math.log(d) - math.log(g)
        errors.append(e)
        logs += e * e
        log10 += abs(math.log10(d) - math.log10(g))
        for k in range(3):
            hits[k] += max(d / g, g / d) < 1.25 ** (k + 1)
    mean = sum(errors) / n
    variance = sum((e - mean) ** 2 for e in errors) / n
    return {
        "abs_rel": rel / n, "sq_rel": sq / n, "rmse": math.sqrt(square / n), "rmse_log": math.sqrt(logs / n),
        "a1": hits[0] / n, "a2": hits[1] / n, "a3": hits[2] / n,
        "silog": 100 * math.sqrt(variance), "log10": log10 / n,
    }  # fmt: skip


def test_all_metrics_against_loops():
    rng = np.random.default_rng(0)
    gt = np.exp(rng.uniform(-2, 5, 500))
    pred = gt * np.exp(rng.normal(0.1, 0.4, 500))
    found = metrics.depth_metrics(pred, gt)
    assert tuple(found) == metrics.NAMES
    for name, value in _reference(pred, gt).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, err_msg=name)


def test_closed_forms():
    gt = np.array([1.0, 2.0, 4.0, 8.0])
    found = metrics.depth_metrics(2 * gt, gt)
    np.testing.assert_allclose(found["abs_rel"], 1.0)
    np.testing.assert_allclose(found["sq_rel"], 15 / 4)
    np.testing.assert_allclose(found["rmse"], math.sqrt((1 + 4 + 16 + 64) / 4))
    np.testing.assert_allclose(found["rmse_log"], math.log(2))
    np.testing.assert_allclose(found["log10"], math.log10(2))
    np.testing.assert_allclose(found["silog"], 0.0, atol=1e-12)
    assert (found["a1"], found["a2"], found["a3"]) == (0.0, 0.0, 0.0)
    assert metrics.depth_metrics(gt, gt)["a1"] == 1.0


def test_thresholds_are_strict_and_symmetric():
    gt = np.array([4.0, 5.0, 4.0, 4.0])
    pred = np.array([5.0, 4.0, 4.9, 6.3])  # 1.25 exactly (twice), below it, 1.575 = between 1.25^2 and 1.25^3
    found = metrics.depth_metrics(pred, gt)
    assert (found["a1"], found["a2"], found["a3"]) == (0.25, 0.75, 1.0)


@pytest.mark.parametrize(
    ("pred", "gt"),
    [
        ([], []),
        ([1.0], [1.0, 2.0]),
        ([0.0], [1.0]),
        ([np.nan], [1.0]),
        ([1.0], [np.inf]),
        ([-1.0], [1.0]),
        ([[1.0]], [[1.0]]),
    ],
)
def test_unusable_input_is_refused(pred, gt):
    with pytest.raises(ValueError, match="depth_metrics"):
        metrics.depth_metrics(np.array(pred), np.array(gt))


def test_mean_keeps_sum_and_count_per_name():
    mean = metrics.Mean()
    mean.add({"x": 1.0, "y": 10.0})
    mean.add({"x": 4.0}, weight=2)
    other = metrics.Mean()
    other.add({"x": 3.0, "z": 7.0})
    other.add({"none": 1.0}, weight=0)
    mean = metrics.Mean(**distributed.added(mean.totals(), other.totals()))
    assert mean.result() == {"x": (1 + 8 + 3) / 4, "y": 10.0, "z": 7.0}
    assert mean.counts["x"] == 4


def test_unweighted_mean_counts_every_row_once():
    rows = [{"x": 1.0, "y": 2.0}, {"x": 3.0}, {"x": 8.0, "y": 4.0}]
    assert metrics.unweighted_mean(rows) == {"x": 4.0, "y": 3.0}
    assert metrics.unweighted_mean([]) == {}
