"""Confidence as a picture: sparsification curves and a reliability diagram."""

import io
from typing import Any

_STYLE = {"uncertainty": ("tab:blue", "-"), "oracle": ("tab:green", "--"), "random": ("0.5", ":")}


def confidence_plot(found: dict[str, Any], title: str = "") -> bytes:
    """PNG of what all cameras together give: a sparsification panel per metric, over its value at 0, and coverage.

    Args:
      found: `confidence.Confidence.result`, not empty.
      title: one line above.
    """
    # Imported here: nothing else needs matplotlib, and a Figure with its own canvas touches no global backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    of = found["cameras"]["all"]
    figure = Figure(figsize=(4.2 * (len(of["curves"]) + 1), 4.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(of["curves"]) + 1, squeeze=False)[0]
    for axis, (metric, curves) in zip(axes, of["curves"].items(), strict=False):
        start = curves["random"][0]
        unit = " m" if metric == "rmse" else ""
        for name, (colour, line) in _STYLE.items():
            over = [value / start if start > 0 else 0.0 for value in curves[name]]
            axis.plot(found["removed"], over, line, color=colour, label=name)
        axis.set(title=f"{metric}, AUSE {of[f'ause_{metric}']:.3f}", xlabel="removed part of the pixels", xlim=(0, 1))
        axis.set(ylabel=f"{metric} of the rest / {start:.3f}{unit}", ylim=(0, None))
        axis.legend()
    axis = axes[-1]
    axis.plot([0, 1], [0, 1], ":", color="0.5", label="calibrated")
    if "coverage" in of:
        axis.plot([0, *found["levels"], 1], [0, *of["coverage"], 1], "o-", color="tab:blue", label="bin distribution")
        axis.set(title=f"central intervals, calibration error {of['ece']:.3f}")
    axis.set(xlabel="nominal probability", ylabel="part of the labels inside", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axis.legend(loc="lower right")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize="medium")
    picture = io.BytesIO()
    canvas.print_png(picture)
    return picture.getvalue()
