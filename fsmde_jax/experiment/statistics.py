"""Statistics over the seeds of an experiment: spread, paired differences, average improvement. Pure functions.

Runs of two rows with the same seed share the initialisation of what they have in common, and, where they read the
same records, shuffling and augmentation (a row without a teacher reads labelled samples only, in an order of its own);
so they are compared in pairs. All seeds share the records: errors are of the training's chance, not of the streets'.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

# What the average improvement is over, as the paper's headline number is.
AVERAGED = ("abs_rel", "sq_rel", "rmse", "rmse_log", "a1")
HIGHER_IS_BETTER = frozenset({"a1", "a2", "a3"})
BEYOND = 2.0  # standard errors that a difference must exceed to count
# 0.975 quantiles of Student's t for 1 ... 30 degrees of freedom: NIST/SEMATECH e-Handbook of Statistical Methods,
# 1.3.6.7.2, "Critical Values of the Student's t Distribution".
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL = 1.96  # beyond 30


@dataclasses.dataclass(frozen=True)
class Spread:
    """Values over seeds: their mean and standard deviation (n - 1 in the denominator; None for one seed)."""

    mean: float
    std: float | None
    count: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean of paired differences and its standard error (None for one pair).

    `counts`: it is beyond two of them. `beyond_t`: beyond as many as Student's t asks for (two-sided, 95 %), too.
    """

    mean: float
    standard_error: float | None
    count: int
    counts: bool
    beyond_t: bool


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of [n] values, n > 0."""
    array = _finite(values)
    return Spread(float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else None, array.size)


def t_quantile(freedom: int) -> float:
    """Standard errors that hold 95 % of cases around a mean of freedom + 1 values, freedom > 0: the 0.975 quantile of
    Student's t (to three digits, from the NIST/SEMATECH e-Handbook, 1.3.6.7.2), above 30 the normal distribution's."""
    return _T[freedom - 1] if freedom <= len(_T) else _NORMAL


def mean_with_error(values: Sequence[float]) -> Difference:
    """Mean of [n] values, n > 0, and its standard error std / sqrt(n); it counts if |mean| > 2 standard errors.

    With few values that is weaker than it sounds: the interval of two standard errors holds 95 % of cases for many
    values, but only 88 % for five and 82 % for three (Student's t). `beyond_t` is the 95 % for any number.
    """
    array = _finite(values)
    mean = float(array.mean())
    if array.size == 1:
        return Difference(mean, None, 1, False, False)
    error = float(array.std(ddof=1) / math.sqrt(array.size))
    needed = max(BEYOND, t_quantile(array.size - 1))
    return Difference(mean, error, array.size, abs(mean) > BEYOND * error, abs(mean) > needed * error)


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """value - reference over the seeds that both have, {seed: value}; None if they have none in common."""
    common = sorted(set(values) & set(reference))
    return mean_with_error([values[seed] - reference[seed] for seed in common]) if common else None


def relative_improvement(value: float, reference: float, name: str) -> float:
    """Change relative to the reference, positive where it is better: (r - x) / r, for a1, a2, a3 (x - r) / r."""
    if not reference > 0:
        raise ValueError(f"relative_improvement: the reference's {name} is {reference}, expected a positive number")
    change = (value - reference) / reference
    return change if name in HIGHER_IS_BETTER else -change


def average_improvement(values: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """Mean of the relative improvements of abs_rel, sq_rel, rmse, rmse_log and a1, as a fraction."""
    return float(np.mean([relative_improvement(values[name], reference[name], name) for name in AVERAGED]))


def improvement_over_seeds(
    values: Mapping[int, Mapping[str, float]], reference: Mapping[int, Mapping[str, float]]
) -> Difference | None:
    """`average_improvement` per common seed, {seed: {metric: value}}, then its mean and standard error; None if there
    is no common seed."""
    common = sorted(set(values) & set(reference))
    if not common:
        return None
    return mean_with_error([average_improvement(values[seed], reference[seed]) for seed in common])


def late_change(steps: Sequence[int], values: Sequence[float], since: float = 0.75) -> float | None:
    """Relative change of a curve over the last part of a training: (last - v) / v, v at the latest step that is at
    most `since` of the last one; None if there is no such step. Near 0: it has settled."""
    order = np.argsort(steps)
    ordered_steps, ordered = np.asarray(steps)[order], _finite(np.asarray(values, np.float64)[order])
    before = np.flatnonzero(ordered_steps <= since * ordered_steps[-1])
    if not before.size:
        return None
    return float(ordered[-1] / ordered[before[-1]] - 1.0)


def best_at(steps: Sequence[int], values: Sequence[float]) -> float:
    """Where a curve is lowest (first), as a share of its last step; values that are not finite are passed over. 1: it
    was still falling when the training ended."""
    measured = np.asarray(values, np.float64)
    lowest = measured == _finite(measured[np.isfinite(measured)]).min()
    return float(np.asarray(steps)[lowest].min() / max(steps))


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"expected one or more finite numbers, got {values!r}")
    return array
