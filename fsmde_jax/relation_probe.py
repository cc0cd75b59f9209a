"""What a relation of adjacent views knows: does a token find the token of the next view that shows the same point?

View-relational distillation (docs/method.md, section 5) hands on, per token of a view, a distribution over the tokens
of an adjacent view. LiDAR points that both cameras have say which token would be right; `consistency` finds them. Rows,
columns, masks, centering and temperature are those of `losses.relational`. NumPy on the host, but for the cosines.

In short::

    truth = truth_of(records[0], (6, 10))
    scores = relation_rows(tokens, truth, center="rig")  # tokens [N, T, C]
    tally.add(scores, softmax_rows(scores, truth, tau_r=0.1), truth)
    tally.means()  # {"top1": ..., "top5": ..., "probability": ...}
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fsmde_jax import consistency
from fsmde_jax.data.schema import RigSample
from fsmde_jax.data.transforms import decode_ego_mask
from fsmde_jax.errors import DataError
from fsmde_jax.losses import relational

Array = Any  # jax.Array or numpy.ndarray

MEASURES = ("top1", "top5", "probability")


@dataclasses.dataclass(frozen=True)
class Truth:
    """Which tokens of the adjacent views of one rig sample show the same points; T tokens of a view, row by row.

    Attributes:
      matches: [M, 4] int64 (view i, view j, token of i = the row, token of j = the true column), sorted, each once. A
        row may have several true columns, since its points may lie in several tokens of the other view.
      mask: [N, T] bool, tokens that count in a relation: camera present, at most half of the token is ego body.
    """

    matches: np.ndarray
    mask: np.ndarray

    @property
    def num_rows(self) -> int:
        """Number of different (view i, view j, row)."""
        return len(np.unique(self.matches[:, :3], axis=0))

    @property
    def columns(self) -> np.ndarray:
        """[M, T] bool: the columns of each match's row."""
        return self.mask[self.matches[:, 1]]


def tokens_at(uv: np.ndarray, size: Sequence[int], grid: tuple[int, int]) -> np.ndarray:
    """The tokens [P] that pixels uv [P, 2] lie in, on a grid (gh, gw) over an image of `size` (H, W).

    Pixel centres are at integers, so the image spans -.5 to W - .5. A point beyond its edge by rounding (points of the
    rule `truncate` reach up to W) counts to the border.
    """
    row = np.floor((uv[:, 1].astype(np.float64) + 0.5) / size[0] * grid[0]).astype(np.int64)
    column = np.floor((uv[:, 0].astype(np.float64) + 0.5) / size[1] * grid[1]).astype(np.int64)
    return np.clip(row, 0, grid[0] - 1) * grid[1] + np.clip(column, 0, grid[1] - 1)


def truth_of(sample: RigSample, grid: tuple[int, int], where: str = "record") -> Truth:
    """The matches of one sample: LiDAR points in the images of two adjacent cameras, on the ego body in neither.

    Occlusion is not looked at: the LiDAR sits above the cameras and may see what one of them does not.

    Args:
      sample: one record.
      grid: (gh, gw), tokens of a view.
      where: file and record, named in errors.

    Raises:
      DataError: an ego mask cannot be decoded.
    """
    mask = np.zeros((sample.num_cameras, grid[0] * grid[1]), bool)
    visible = []
    for i, name in enumerate(sample.camera_names):
        height, width = (int(side) for side in sample.native_size[i])
        seen = np.ones((height, width), bool)
        if sample.ego_masks[i]:
            try:
                seen = decode_ego_mask(sample.ego_masks[i], (height, width), (height, width)) == 255
            except DataError as error:
                raise DataError(f"{where}, camera {name}: {error}; convert this split again") from error
        if sample.images[i]:
            mask[i] = np.asarray(relational.token_mask(seen[None, None], grid)).ravel() if not seen.all() else True
        u, v = (np.floor(sample.points[i][:, axis] + 0.5).astype(np.int64) for axis in (0, 1))
        visible.append(seen[np.clip(v, 0, height - 1), np.clip(u, 0, width - 1)])
    found = [np.zeros((0, 4), np.int64)]
    for i, j in np.argwhere(consistency.neighbours(sample)).tolist():
        a, b = consistency.correspondences(sample, i, j)
        on_both = visible[i][a] & visible[j][b]
        rows, columns = (
            tokens_at(sample.points[k][index[on_both], :2], sample.native_size[k], grid)
            for k, index in ((i, a), (j, b))
        )
        counts = mask[i, rows] & mask[j, columns]
        pair = np.broadcast_to([i, j], (int(counts.sum()), 2))
        found.append(np.concatenate([pair, np.stack([rows, columns], 1)[counts]], 1))
    return Truth(np.unique(np.concatenate(found), axis=0), mask)


@functools.partial(jax.jit, static_argnames="center")
def _cosines(tokens: Array, mask: Array, *, center: str) -> Array:
    return relational.cosines(relational.normalise_tokens(tokens[None], mask[None], center=center))[0]


def relation_rows(tokens: Array, truth: Truth, *, center: str) -> np.ndarray:
    """The cosines of the relation's rows that have a true column: tokens [N, T, C] -> [M, T] float32, a row per match.

    Raises:
      ValueError: the tokens do not fit the truth's grid, or an unknown centering (`relational.normalise_tokens`).
    """
    all_cosines = np.asarray(_cosines(tokens, truth.mask, center=center))
    i, j, row, _ = truth.matches.T
    return all_cosines[i, j, row]


def softmax_rows(scores: np.ndarray, truth: Truth, *, tau_r: float) -> np.ndarray:
    """The relation itself: softmax of [M, T] scores / tau_r over the columns that count, float64, 0 elsewhere."""
    logits = np.where(truth.columns, scores.astype(np.float64) / tau_r, -np.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True, initial=-np.finfo(np.float64).max))
    return weights / weights.sum(1, keepdims=True)


def hits(scores: np.ndarray, truth: Truth, k: int) -> np.ndarray:
    """Chance [M] that the true column is one of the k highest of its row's [M, T] scores; equal ones are drawn by lot.

    Raises:
      ValueError: scores that are not finite.
    """
    if not np.isfinite(scores).all():
        raise ValueError("hits: scores are not finite")
    at_true = np.take_along_axis(scores, truth.matches[:, 3:], 1)
    higher = ((scores > at_true) & truth.columns).sum(1)
    equal = ((scores == at_true) & truth.columns).sum(1)  # itself among them
    return np.clip((k - higher) / equal, 0.0, 1.0)


@dataclasses.dataclass
class Tally:
    """Means over the matches of all samples added: `top1`, `top5` (`hits`) and the true column's `probability`."""

    sums: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(MEASURES, 0.0))
    matches: int = 0

    def add(self, scores: np.ndarray, probabilities: np.ndarray, truth: Truth) -> None:
        """Adds one sample: what orders the columns and what is believed of them, both [M, T]."""
        at_true = np.take_along_axis(probabilities, truth.matches[:, 3:], 1)[:, 0]
        for name, values in zip(MEASURES, (hits(scores, truth, 1), hits(scores, truth, 5), at_true), strict=True):
            self.sums[name] += float(values.sum())
        self.matches += len(truth.matches)

    def means(self) -> dict[str, float]:
        """Per measure the mean over all matches; empty without any."""
        return {name: total / self.matches for name, total in self.sums.items()} if self.matches else {}


def chance(truth: Truth) -> tuple[np.ndarray, np.ndarray]:
    """(scores, probabilities) [M, T] of knowing nothing: every column that counts alike."""
    columns = truth.columns
    return np.zeros(columns.shape), columns / columns.sum(1, keepdims=True)


def best_possible(truth: Truth) -> tuple[np.ndarray, np.ndarray]:
    """(scores, probabilities) [M, T] of knowing it all: a row's true columns alike, whose number bounds every rate."""
    _, row = np.unique(truth.matches[:, :3], axis=0, return_inverse=True)
    row = row.reshape(-1)
    marked = np.zeros((truth.num_rows, truth.mask.shape[1]))
    marked[row, truth.matches[:, 3]] = 1.0
    scores = marked[row]
    return scores, scores / scores.sum(1, keepdims=True)


class ColumnPrior:
    """How often each column was the true one, per directed pair of cameras and row: needs no image."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int, int], np.ndarray] = {}

    def add(self, truth: Truth) -> None:
        """Counts the matches of one sample."""
        tokens = truth.mask.shape[1]
        for i, j, row, column in truth.matches.tolist():
            self._counts.setdefault((i, j), np.zeros((tokens, tokens)))[row, column] += 1

    def predict(self, truth: Truth) -> tuple[np.ndarray, np.ndarray]:
        """(scores, probabilities) [M, T]: the counts and their shares; rows never seen know nothing (`chance`)."""
        none = np.zeros(truth.mask.shape[1])
        counts = [
            self._counts[i, j][row] if (i, j) in self._counts else none for i, j, row, _ in truth.matches.tolist()
        ]
        scores = np.where(truth.columns, np.array(counts).reshape(truth.columns.shape), 0.0)
        total = scores.sum(1, keepdims=True)
        return scores, np.where(total > 0, scores / np.where(total > 0, total, 1.0), chance(truth)[1])


def cross_fitted_prior(truths: Sequence[Truth], scenes: Sequence[str]) -> tuple[Tally, str]:
    """`ColumnPrior` on samples that it has not seen: fitted on one half, measured on the other, and the reverse.

    Every match is measured once, as for a network. The halves are of scenes, every other one, where there are two or
    more; otherwise of samples, every other one, which flatters the prior as neighbours look alike.

    Returns:
      (tally, "scenes" or "samples"); the tally is empty for a single sample.
    """
    names = list(dict.fromkeys(scenes))
    by = "scenes" if len(names) > 1 else "samples"
    half = [names.index(scene) % 2 if by == "scenes" else k % 2 for k, scene in enumerate(scenes)]
    tally = Tally()
    for side in (0, 1) if len(truths) > 1 else ():
        prior = ColumnPrior()
        for truth, own in zip(truths, half, strict=True):
            if own != side:
                prior.add(truth)
        for truth, own in zip(truths, half, strict=True):
            if own == side:
                tally.add(*prior.predict(truth), truth)
    return tally, by
