"""One HTML page of tables, curves, pictures and point clouds that needs no network and no other file."""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from fsmde_jax.viz.pointcloud import Cloud

_HERE = Path(__file__).parent
_COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444")
MAX_POINTS = 80_000  # of a cloud, 16 bytes each


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table; numbers with four digits."""

    def cell(value: object) -> str:
        return html.escape(f"{value:.4f}" if isinstance(value, float) else str(value))

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def facts(pairs: Mapping[str, object]) -> str:
    """A list of names and values."""
    items = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in pairs.items())
    return f"<dl>{''.join(items)}</dl>"


def chart(title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Curves of (step, value) as an SVG with axes; values that are not finite are left out."""
    finite = {name: [(x, y) for x, y in curve if math.isfinite(y)] for name, curve in curves.items()}
    points = [point for curve in finite.values() for point in curve]
    if not points:
        return ""
    width, height, left, bottom = 360, 210, 52, 24
    low, high = min(y for _, y in points), max(y for _, y in points)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    low, high = low - margin, high + margin
    first, last = min(x for x, _ in points), max(x for x, _ in points)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (width - left - 8) * ((x - first) / (last - first) if last > first else 0.5),
            8 + (height - bottom - 8) * (1 - (y - low) / (high - low)),
        )

    parts = []
    for k in range(5):
        value = low + (high - low) * k / 4
        y = place(first, value)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    parts.append(f'<text x="{left}" y="{height - 6}">{first:g}</text>')
    parts.append(f'<text x="{width - 8}" y="{height - 6}" text-anchor="end">step {last:g}</text>')
    for number, (name, curve) in enumerate(finite.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        last_value = f"{name}: {curve[-1][1]:.4g} at step {curve[-1][0]:g}" if curve else name
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{line}">'
            f"<title>{html.escape(last_value)}</title></polyline>"
        )
    key = "".join(
        f' <span style="color:{_COLOURS[n % len(_COLOURS)]}">&#9644;</span> {html.escape(name)}'
        for n, name in enumerate(finite)
    )
    caption = html.escape(title) + (key if len(finite) > 1 else "")
    drawn = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def folded(summary: str, text: str) -> str:
    """Text that opens with a click."""
    return f'<details><summary>{html.escape(summary)}</summary><pre class="wide">{html.escape(text)}</pre></details>'


def picture(image: np.ndarray, caption: str, max_width: int = 1800) -> str:
    """An image [H, W, 3] uint8 RGB as JPEG inside the page."""
    if image.shape[1] > max_width:
        scale = max_width / image.shape[1]
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    done, content = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])
    assert done
    data = base64.b64encode(content.tobytes()).decode()
    text = html.escape(caption)
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" width="{image.shape[1]}" height="{image.shape[0]}"'
        f' alt="{text}" loading="lazy"><figcaption>{text}</figcaption></figure>'
    )


def cloud(points: Cloud, name: str, caption: str) -> str:
    """A point cloud to turn; of more than `MAX_POINTS` one in so many, which the caption then says.

    `caption` is a sentence without its full stop.
    """
    step = max(1, math.ceil(len(points.points) / MAX_POINTS))
    caption += f"; one in {step} is shown." if step > 1 else "."
    rows = np.empty(len(points.points[::step]), np.dtype([("xyz", "<f4", (3,)), ("rgba", "u1", (4,))]))
    rows["xyz"], rows["rgba"][:, :3], rows["rgba"][:, 3] = points.points[::step], points.colours[::step], 255
    data = base64.b64encode(rows.tobytes()).decode()
    return (
        f'<figure><canvas data-cloud="{name}" aria-label="{html.escape(caption)}"></canvas>'
        f'<script type="application/octet-stream" id="{name}">{data}</script>'
        f"<figcaption>{html.escape(caption)} Drag to turn, scroll or pinch to zoom.</figcaption></figure>"
    )


def page(title: str, sections: Mapping[str, str]) -> str:
    """The whole page; sections without content are left out."""
    style = (_HERE / "report.css").read_text(encoding="utf-8")
    script = (_HERE / "cloud_viewer.js").read_text(encoding="utf-8")
    body = "".join(
        f"<section><h2>{html.escape(name)}</h2>{content}</section>" for name, content in sections.items() if content
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{body}<script>{script}</script></body></html>\n"
    )
