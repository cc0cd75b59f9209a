"""What a training remembers of its last steps: losses, to tell a spike by, and means for the log."""

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from fsmde_jax.losses.total import OF_LABELS

SPIKE = 5.0  # times the median of the losses before it
_WINDOW, _ENOUGH = 100, 20  # steps
_OF_NOW = ("lr", "param_norm", "skipped")  # logged as they are, not as means


class Losses:
    """The last losses, to tell a spike by: one above `SPIKE` times their median. Begins with what a checkpoint `kept`.

    Steps with labels and steps without are told apart: what only labels teach is no spike beside the others.
    """

    def __init__(self, kept: Mapping[str, Sequence[float]] | None = None) -> None:
        known = kept if isinstance(kept, Mapping) else {}  # older runs kept a list of both kinds
        self._last = {kind: deque(known.get(kind, ()), maxlen=_WINDOW) for kind in ("labelled", "unlabelled")}

    @property
    def kept(self) -> dict[str, list[float]]:
        return {kind: list(last) for kind, last in self._last.items()}

    def spike(self, loss: float, *, labelled: bool = True) -> float:
        """How many times the median `loss` is, if that is a spike, otherwise 0; then it is one of the last losses."""
        last = self._last["labelled" if labelled else "unlabelled"]
        median = statistics.median(last) if len(last) >= _ENOUGH else 0.0
        last.append(loss)
        return loss / median if median > 0 and loss > SPIKE * median else 0.0


class Means:
    """Means of the steps' numbers since the last line of the log; begins with what a checkpoint `kept`.

    A step that was left out counts in none, one without labels not in terms that need some (`OF_LABELS`).
    """

    def __init__(self, kept: Mapping[str, Any] | None = None) -> None:
        self._step: int = kept["step"] if kept else 0
        self._sums: dict[str, tuple[float, int]] = {k: (v[0], v[1]) for k, v in kept["sums"].items()} if kept else {}

    @property
    def kept(self) -> dict[str, Any]:
        return {"step": self._step, "sums": {name: list(each) for name, each in self._sums.items()}}

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Counts a step, once however often it is given."""
        if step <= self._step:
            return
        self._step = step
        if values["skipped"]:
            return
        for name, value in values.items():
            if not (name in OF_LABELS and values.get("valid_pixels") == 0):
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = total + value, count + 1

    def take(self, now: Mapping[str, float]) -> dict[str, float]:
        """A line's numbers, in the order of `now`, the last step's, and begins the next; as `now` says `_OF_NOW`, and
        all if each step was left out. Terms for which there were no labels are missing."""
        sums, self._sums = self._sums, {}
        means = {name: total / count for name, (total, count) in sums.items()}
        if not means:
            return dict(now)
        return {name: now[name] if name in _OF_NOW else means[name] for name in now if name in {*means, *_OF_NOW}}
