"""Plots of an experiment's report as PNG bytes: improvement bars, one line plot per sweep, validation curves.

Drawn with matplotlib's Agg canvas directly, so that no display and no global state is needed.
"""

import io
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

COUNTS, DOES_NOT = "#1f6f8b", "#b8c4c9"
_LINES = ("#1f6f8b", "#d1603d", "#5b8c3a", "#8b5a9f", "#c79a1b", "#4d4d4d")
_MARKS = "os^Dv*"
_WIDE = 20.0  # axes whose numbers span more than this factor are logarithmic

Point = tuple[float, float | None] | None  # (value, half-width of its error bar); None = was not run


def improvement_bars(panels: Mapping[str, Sequence[tuple[str, float, float | None, bool]]], reference: str) -> bytes:
    """Horizontal bars of average improvement, one panel per ground truth.

    Args:
      panels: {ground truth: [(row, percent, standard error in percent or None, whether it counts)]}.
      reference: name of the row that is zero.
    """
    longest = max((len(bars) for bars in panels.values()), default=1)
    figure = Figure(figsize=(5.2 * max(len(panels), 1), 1.3 + 0.32 * longest), layout="constrained")
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for axis, (truth, bars) in zip(axes, panels.items(), strict=True):
        for place, (name, value, error, counts) in enumerate(bars):
            axis.barh(
                place, value, xerr=error, height=0.65, color=COUNTS if counts else DOES_NOT, capsize=3,
                error_kw={"elinewidth": 1.0, "ecolor": "#333333"}, label=name,
            )  # fmt: skip
        axis.set_yticks(range(len(bars)), [name for name, *_ in bars])
        axis.invert_yaxis()
        axis.axvline(0.0, color="#333333", linewidth=0.8)
        axis.set_xlabel(f"average improvement over {reference}, %")
        axis.set_title(f"{truth} ground truth", fontsize=10)
        _plain(axis, "x")
    figure.suptitle(
        "mean over seeds and its standard error; grey: within two standard errors, does not count", fontsize=8
    )
    return _png(figure)


def sweep_lines(
    title: str, labels: Sequence[str], numbers: Sequence[float] | None,
    panels: Mapping[str, Mapping[str, Sequence[Point]]], quantity: str,
) -> bytes:  # fmt: skip
    """One line per row over a sweep's values, one panel per ground truth.

    Args:
      title: what is varied.
      labels: of the values, in order.
      numbers: the labels as numbers, or None where they are names.
      panels: {ground truth: {row: points in the order of the labels}}; error bars are standard deviations.
      quantity: what the vertical axis shows.
    """
    figure = Figure(figsize=(4.6 * max(len(panels), 1), 3.6), layout="constrained")
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    places = list(range(len(labels))) if numbers is None else list(numbers)
    for axis, (truth, rows) in zip(axes, panels.items(), strict=True):
        for index, (name, points) in enumerate(rows.items()):
            known = [(place, *point) for place, point in zip(places, points, strict=True) if point is not None]
            if not known:
                continue
            x, y, error = zip(*sorted(known), strict=True)
            axis.errorbar(
                x, y, yerr=[each or 0.0 for each in error], capsize=3, linewidth=1.5, markersize=5, label=name,
                color=_LINES[index % len(_LINES)], marker=_MARKS[index % len(_MARKS)],
            )  # fmt: skip
        if numbers is not None and min(places) > 0 and max(places) > _WIDE * min(places):
            axis.set_xscale("log")
        axis.set_xticks(places, labels)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel(title)
        axis.set_ylabel(quantity)
        axis.set_title(f"{truth} ground truth", fontsize=10)
        _plain(axis, "y")
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=8)
    return _png(figure)


def validation_curves(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], quantity: str, title: str) -> bytes:
    """Curves {name: (steps, values)} of evaluations during training."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axis = figure.subplots()
    for index, (name, (steps, values)) in enumerate(curves.items()):
        axis.plot(
            steps, values, linewidth=1.2, marker=_MARKS[index % len(_MARKS)], markersize=4, label=name,
            color=_LINES[index % len(_LINES)],
        )  # fmt: skip
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("training step")
    axis.set_ylabel(quantity)
    axis.set_ylim(bottom=0.0)
    axis.set_title(title, fontsize=10)
    _plain(axis, "y")
    axis.legend(frameon=False, fontsize=8)
    return _png(figure)


def _plain(axis: Axes, grid: str) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="#e3e3e3", linewidth=0.7)  # type: ignore[arg-type]
    axis.set_axisbelow(True)


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return file.getvalue()
