"""Statistics over seeds against SciPy and closed forms."""

import numpy as np
import pytest
from scipy import stats

from fsmde_jax.experiment import statistics


@pytest.mark.parametrize("count", [2, 3, 5])
def test_spread_and_paired_difference_against_scipy(count):
    rng = np.random.default_rng(count)
    ours, theirs = rng.normal(0.2, 0.02, count), rng.normal(0.25, 0.02, count)
    spread = statistics.spread(ours)
    assert spread.std == pytest.approx(stats.tstd(ours)) and spread.mean == pytest.approx(stats.tmean(ours))
    difference = statistics.paired_difference(dict(enumerate(ours)), {**dict(enumerate(theirs)), 99: 7.0})
    assert difference.count == count
    assert difference.standard_error == pytest.approx(stats.sem(ours - theirs))
    t = stats.ttest_rel(ours, theirs).statistic
    assert difference.mean / difference.standard_error == pytest.approx(t)
    assert difference.counts == (abs(t) > 2)
    assert difference.beyond_t == (stats.ttest_rel(ours, theirs).pvalue < 0.05)


def test_quantiles_of_students_t_against_scipy():
    for freedom in range(1, 31):
        assert statistics.t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=5.1e-4)
    assert statistics.t_quantile(31) == statistics.t_quantile(10**6) == pytest.approx(stats.norm.ppf(0.975), abs=5e-5)


@pytest.mark.parametrize(
    ("errors", "count", "marks"),
    [(1.9, 3, (False, False)), (2.5, 3, (True, False)), (4.5, 3, (True, True)), (2.5, 5, (True, False)),
     (3.0, 5, (True, True)), (1.98, 100, (False, False)), (2.01, 100, (True, True))],
)  # fmt: skip
def test_marks_of_a_mean_so_many_standard_errors_from_zero(errors, count, marks):
    values = np.arange(count, dtype=float)
    found = statistics.mean_with_error(values - values.mean() + errors * stats.sem(values))
    assert (found.counts, found.beyond_t) == marks


def test_one_seed_says_nothing_and_no_common_seed_is_no_difference():
    assert statistics.spread([3.0]) == statistics.Spread(3.0, None, 1)
    assert statistics.paired_difference({0: 1.0}, {0: 3.0}) == statistics.Difference(-2.0, None, 1, False, False)
    assert statistics.paired_difference({0: 1.0}, {1: 3.0}) is None
    assert statistics.improvement_over_seeds({0: {}}, {1: {}}) is None
    for bad in ([], [1.0, np.nan], [[1.0]]):
        with pytest.raises(ValueError, match="finite numbers"):
            statistics.spread(bad)


def test_average_improvement_is_the_mean_relative_change_in_the_better_direction():
    base_ = {"abs_rel": 0.2, "sq_rel": 2.0, "rmse": 5.0, "rmse_log": 0.5, "a1": 0.8}
    ours = {"abs_rel": 0.1, "sq_rel": 2.2, "rmse": 5.0, "rmse_log": 0.4, "a1": 0.88}
    assert statistics.average_improvement(ours, base_) == pytest.approx((0.5 - 0.1 + 0.0 + 0.2 + 0.1) / 5)
    worse = {**base_, "a1": 0.4}
    found = statistics.improvement_over_seeds({0: ours, 1: worse, 2: ours}, {0: base_, 1: base_})
    values = [0.14, -0.5 / 5]
    assert found.mean == pytest.approx(np.mean(values)) and found.standard_error == pytest.approx(stats.sem(values))
    with pytest.raises(ValueError, match="rmse is 0"):
        statistics.average_improvement(ours, {**base_, "rmse": 0.0})


def test_late_change_of_a_curve():
    assert statistics.late_change([100, 400, 200, 300], [8.0, 3.0, 5.0, 4.0]) == pytest.approx(-0.25)
    assert statistics.late_change([90, 100], [1.0, 2.0]) is None


def test_where_a_curve_is_lowest():
    assert statistics.best_at([100, 400, 200, 300], [8.0, 3.0, 2.0, 4.0]) == 0.5
    assert statistics.best_at([30, 10, 20], [1.0, 5.0, 1.0]) == pytest.approx(2 / 3)  # the first of equals
    assert statistics.best_at([10, 20], [2.0, 1.0]) == 1.0
    assert statistics.best_at([10, 20, 40], [np.nan, 1.0, np.inf]) == 0.5
