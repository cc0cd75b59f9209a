"""One picture of a whole rig: images, predicted depth, LiDAR and error, with the cameras where people expect them."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw

from fsmde_jax.viz import colour

BACKGROUND = 24
_GAP, _BLOCK_GAP, _MARGIN = 3, 16, 16
_WORST = 0.5  # relative error that is drawn in the darkest red


def arrange(yaw: np.ndarray) -> list[list[int]]:
    """Rows of camera indices, each from left to right, such that neighbouring pictures continue each other.

    Cameras are taken clockwise (seen from above). Up to four stand in one row around the most forward one; more stand
    in two rows: those that look forward (left - front - right), and below the others, going on clockwise (back right -
    back - back left).

    Args:
      yaw: [N] radians, optical axes, 0 = forward, positive to the left.
    """
    turn = np.arctan2(np.sin(yaw), np.cos(yaw))
    clockwise = [int(i) for i in np.argsort(-turn, kind="stable")]
    if len(clockwise) <= 4:
        return [clockwise]
    front = [i for i in clockwise if abs(turn[i]) < math.pi / 2 - 1e-6]
    if not front or len(front) == len(clockwise):
        half = (len(clockwise) + 1) // 2
        return [clockwise[:half], clockwise[half:]]
    rear = [i for i in clockwise if i not in front]
    return [front, sorted(rear, key=lambda i: -(turn[i] if turn[i] < 0 else turn[i] - 2 * math.pi))]


def panorama(
    images: np.ndarray,
    pred_depth: np.ndarray,
    depth: np.ndarray | None,
    names: Sequence[str],
    yaw: np.ndarray,
    *,
    min_depth: float = 0.1,
    max_depth: float = 80.0,
    title: str = "",
    cell_width: int = 320,
    dense: np.ndarray | None = None,
) -> np.ndarray:
    """Four blocks - images, predicted depth, true depth, relative error where it is known - on one depth scale.

    Without a truth the depth stands below the images; with one the pairs stand side by side, unless they are too wide.

    Args:
      images: [N, H, W, 3] uint8 RGB.
      pred_depth: [N, H, W] metres.
      depth: [N, H, W] metres, sparse, 0 = none; None leaves out the last two blocks.
      names: of the N cameras.
      yaw: [N] radians, optical axes in the ego frame (`geometry.optical_yaw`).
      min_depth: start of the depth scale, metres; at least 1 m is used, since nearly nothing is nearer.
      max_depth: end of the depth scale, metres.
      title: one line above.
      cell_width: pixels of one camera's picture.
      dense: [N, H, W] metres, exact, 0 = none; where given, it is the truth that is drawn, instead of `depth`.

    Returns:
      [H', W', 3] uint8.
    """
    count, height, width = pred_depth.shape
    if images.shape != (count, height, width, 3) or len(names) != count or len(yaw) != count:
        raise ValueError(
            f"panorama: images {images.shape}, {len(names)} names and pred_depth {pred_depth.shape} disagree"
        )
    for kind, truth in (("depth", depth), ("dense", dense)):
        if truth is not None and truth.shape != pred_depth.shape:
            raise ValueError(f"panorama: {kind} {truth.shape} and pred_depth {pred_depth.shape} disagree")
    low, _ = colour_scale(min_depth, max_depth)
    cell = (cell_width, max(1, round(cell_width * height / width)))
    rows = arrange(np.asarray(yaw))
    pictures = [cv2.resize(image, cell, interpolation=cv2.INTER_AREA) for image in images]
    predicted = [
        colour.colour_depth(cv2.resize(d, cell, interpolation=cv2.INTER_AREA), low, max_depth) for d in pred_depth
    ]
    bar = 30
    many = len(rows) > 1
    block_width = max(len(row) for row in rows) * (cell[0] + _GAP) - _GAP
    depth_bar = colour.depth_bar(block_width, bar, low, max_depth, background=BACKGROUND)
    blocks = [
        _block(
            "camera images" + (", clockwise: each row continues the one above" if many else ""),
            pictures,
            names,
            rows,
            None,
            bar,
        ),
        _block("predicted depth", predicted, names, rows, depth_bar, bar),
    ]
    truth = depth if dense is None else dense
    if truth is not None:
        drawn = _dots if dense is None else _surface
        measured = [drawn(p, d, colour.colour_depth(d, low, max_depth)) for p, d in zip(pictures, truth, strict=True)]
        clipped = np.clip(pred_depth, min_depth, max_depth)
        relative = np.abs(clipped - truth) / np.where(truth > 0, truth, 1.0)
        valid = (truth > min_depth) & (truth < max_depth)
        errors = [
            drawn(picture, np.where(inside, d, 0.0), colour.colour_error(error, _WORST))
            for picture, d, inside, error in zip(pictures, truth, valid, relative, strict=True)
        ]
        mean = f", mean {100 * float(np.mean(relative[valid])):.1f} %" if valid.any() else ""
        error_bar = colour.error_bar(block_width, bar, _WORST, background=BACKGROUND)
        names_of = ("LiDAR depth", "at LiDAR pixels") if dense is None else ("exact depth", "at every pixel")
        blocks += [
            _block(names_of[0], measured, names, rows, depth_bar, bar),
            _block(f"relative error {names_of[1]}{mean}", errors, names, rows, error_bar, bar),
        ]
    return _page(blocks, title, columns=2 if truth is not None and block_width <= 4 * cell_width else 1)


def colour_scale(min_depth: float, max_depth: float) -> tuple[float, float]:
    """Ends of the colour scale, metres: from 1 m on, since nearly nothing is nearer."""
    return min(max(min_depth, 1.0), 0.5 * max_depth), max_depth


def _dots(picture: np.ndarray, depth: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Sparse colours [H, W, 3] as dots over a dimmed, grey picture [h, w, 3]; near dots are drawn over far ones."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    canvas = np.repeat((40 + 0.35 * grey.astype(np.float32)).astype(np.uint8)[..., None], 3, 2)
    rows, cols = np.nonzero(depth > 0)
    order = np.argsort(-depth[rows, cols], kind="stable")
    rows, cols = rows[order], cols[order]
    height, width = canvas.shape[:2]
    y = (rows + 0.5) * (height / depth.shape[0]) - 0.5
    x = (cols + 0.5) * (width / depth.shape[1]) - 0.5
    values = colours[rows, cols]
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):  # 2x2 pixels: one is lost between the others
        yy = np.clip(np.floor(y).astype(int) + dy, 0, height - 1)
        xx = np.clip(np.floor(x).astype(int) + dx, 0, width - 1)
        canvas[yy, xx] = values
    return canvas


def _surface(picture: np.ndarray, depth: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Dense colours [H, W, 3] at the size of a picture [h, w, 3]; where there is no depth, the picture, dimmed."""
    size = picture.shape[1::-1]
    known = cv2.resize((depth > 0).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT)
    shown = cv2.resize(colours, size, interpolation=cv2.INTER_NEAREST_EXACT)
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    dimmed = np.repeat((0.35 * grey.astype(np.float32)).astype(np.uint8)[..., None], 3, 2)
    return np.where(known[..., None] > 0, shown, dimmed)


def _block(
    caption: str,
    cells: Sequence[np.ndarray],
    names: Sequence[str],
    rows: list[list[int]],
    bar: np.ndarray | None,
    bar_height: int,
) -> np.ndarray:
    height, width = cells[0].shape[:2]
    head = 24
    total_width = max(len(row) for row in rows) * (width + _GAP) - _GAP
    body = len(rows) * (height + _GAP)
    canvas = np.full((head + body + bar_height + 4, total_width, 3), BACKGROUND, np.uint8)
    if bar is not None:
        canvas[head + body + 4 :] = bar
    places = []
    for r, row in enumerate(rows):
        left = (total_width - (len(row) * (width + _GAP) - _GAP)) // 2
        for c, index in enumerate(row):
            y, x = head + r * (height + _GAP), left + c * (width + _GAP)
            canvas[y : y + height, x : x + width] = cells[index]
            places.append((x, y, names[index]))
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    pen.text((0, head - 6), caption, font=colour.font(16), fill=(235, 235, 235), anchor="ls")
    for x, y, name in places:
        text = name.removeprefix("CAM_").replace("_", " ")
        box = pen.textbbox((x + 8, y + 5), text, font=colour.font(12))
        corner = (x, y, math.ceil(box[2]) + 8, math.ceil(box[3]) + 5)
        image.paste(Image.blend(image.crop(corner), Image.new("RGB", (corner[2] - x, corner[3] - y)), 0.6), corner[:2])
        pen.text((x + 8, y + 5), text, font=colour.font(12), fill=(255, 255, 255))
    return np.asarray(image)


def _page(blocks: list[np.ndarray], title: str, columns: int) -> np.ndarray:
    height, width = blocks[0].shape[:2]
    lines = math.ceil(len(blocks) / columns)
    head = 34 if title else 0
    page_width = 2 * _MARGIN + columns * width + (columns - 1) * _BLOCK_GAP
    page = np.full((_MARGIN + head + lines * (height + _BLOCK_GAP), page_width, 3), BACKGROUND, np.uint8)
    for k, block in enumerate(blocks):
        y, x = _MARGIN + head + (k // columns) * (height + _BLOCK_GAP), _MARGIN + (k % columns) * (width + _BLOCK_GAP)
        page[y : y + height, x : x + width] = block
    if not title:
        return page
    image = Image.fromarray(page)
    ImageDraw.Draw(image).text((_MARGIN, _MARGIN), title, font=colour.font(20), fill=(255, 255, 255))
    return np.asarray(image)
