"""One picture of a relation: tokens of a view, and what each finds in the adjacent view."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

_ASKED, _TRUE, _BEST = "#ff2fd6", "#35ff4b", "#ffffff"


@dataclasses.dataclass(frozen=True)
class Query:
    """One row of a relation.

    Attributes:
      token: the token of the left view that asks.
      true: the tokens of the right view that show the same points.
      probabilities: [T] over the tokens of the right view; NaN = a token that does not count.
    """

    token: int
    true: Sequence[int]
    probabilities: np.ndarray


def _outline(axes: Any, token: int, grid: tuple[int, int], size: tuple[int, int], **style: Any) -> None:
    height, width = size[0] / grid[0], size[1] / grid[1]
    corner = (token % grid[1] * width - 0.5, token // grid[1] * height - 0.5)
    axes.add_patch(Rectangle(corner, width, height, fill=False, **style))


def relation_picture(
    left: np.ndarray,
    right: np.ndarray,
    queries: Sequence[Query],
    grid: tuple[int, int],
    names: tuple[str, str],
    *,
    title: str = "",
    cell_width: int = 480,
) -> np.ndarray:
    """Per query the left view with its token, and the right view under the query's row as a heat map.

    Tokens that do not count are hatched.

    Args:
      left: [H, W, 3] uint8 RGB; right: likewise.
      queries: at least one.
      grid: (gh, gw), tokens of both views.
      names: of the two cameras.
      title: one line above.
      cell_width: pixels of one view.

    Returns:
      [H', W', 3] uint8.
    """
    if not queries:
        raise ValueError("relation_picture: expected at least one query")
    inch = cell_width / 100
    figure = Figure(
        figsize=(2.25 * inch, inch * (len(queries) * (left.shape[0] / left.shape[1] + 0.09) + 0.25)), dpi=100
    )
    canvas = FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(queries), 2, squeeze=False)
    grey = np.repeat(right.mean(-1, keepdims=True).astype(np.uint8), 3, -1)
    for (asking, answering), query in zip(all_axes, queries, strict=True):
        asking.imshow(left)
        _outline(asking, query.token, grid, left.shape[:2], edgecolor=_ASKED, linewidth=2.5)
        asking.set_title(f"{names[0]}: token {query.token}", fontsize=9)
        answering.imshow(grey)
        row = np.asarray(query.probabilities, np.float64).reshape(grid)
        extent = (-0.5, right.shape[1] - 0.5, right.shape[0] - 0.5, -0.5)
        seen = np.isfinite(row)
        alpha = np.where(seen, 0.1 + 0.6 * np.nan_to_num(row) / np.nanmax(row), 0.0)  # little hides little
        heat = answering.imshow(row, cmap="inferno", alpha=alpha, extent=extent, vmin=0.0, interpolation="nearest")
        for token in np.flatnonzero(~seen).tolist():
            _outline(answering, token, grid, right.shape[:2], edgecolor="#808080", linewidth=0.0, hatch="///")
        figure.colorbar(heat, ax=answering, fraction=0.03, pad=0.01).ax.tick_params(labelsize=7)
        for token in query.true:
            _outline(answering, token, grid, right.shape[:2], edgecolor=_TRUE, linewidth=2.5)
        best = int(np.nanargmax(row))
        _outline(answering, best, grid, right.shape[:2], edgecolor=_BEST, linewidth=1.5, linestyle=":")
        shown = ", ".join(f"{query.probabilities[token]:.2f}" for token in query.true)
        answering.set_title(f"{names[1]}: true (green) {shown}; highest (dotted) {row.flat[best]:.2f}", fontsize=8)
        for axes in (asking, answering):
            axes.set_xticks([])
            axes.set_yticks([])
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
