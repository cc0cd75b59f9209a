"""Statistics over the seeds of an experiment: spread, paired differences, average improvement. Pure functions.

Runs of two rows with the same seed share initialisation of what they have in common, shuffling and augmentation, so
they are compared in pairs.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

# What the average improvement is over, as the paper's headline number is.
AVERAGED = ("abs_rel", "sq_rel", "rmse", "rmse_log", "a1")
HIGHER_IS_BETTER = frozenset({"a1", "a2", "a3"})
BEYOND = 2.0  # standard errors that a difference must exceed to count


@dataclasses.dataclass(frozen=True)
class Spread:
    """Values over seeds: their mean and standard deviation (n - 1 in the denominator; None for one seed)."""

    mean: float
    std: float | None
    count: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean of paired differences and its standard error (None for one pair). `counts`: it is beyond two of them."""

    mean: float
    standard_error: float | None
    count: int
    counts: bool


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of [n] values, n > 0."""
    array = _finite(values)
    return Spread(float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else None, array.size)


def mean_with_error(values: Sequence[float]) -> Difference:
    """Mean of [n] values, n > 0, and its standard error std / sqrt(n); it counts if |mean| > 2 standard errors.

    With few values that is weaker than it sounds: the interval of two standard errors holds 95 % of cases for many
    values, but only 88 % for five and 82 % for three (Student's t).
    """
    array = _finite(values)
    mean = float(array.mean())
    if array.size == 1:
        return Difference(mean, None, 1, False)
    error = float(array.std(ddof=1) / math.sqrt(array.size))
    return Difference(mean, error, array.size, abs(mean) > BEYOND * error)


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


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"expected one or more finite numbers, got {values!r}")
    return array
