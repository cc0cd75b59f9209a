"""LiDAR points drawn over the images of one record: all cameras in a grid, colour by depth, colour bar in metres."""

import io

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_prep.images import decode_image
from fsmde_jax import geometry
from fsmde_jax.data import dense
from fsmde_jax.data.schema import RigSample

_TILE_WIDTH = 640
_GAP, _MARGIN, _TITLE = 6, 18, 54
_BAR_HEIGHT, _BAR_SPACE = 14, 64
_BACKGROUND, _TEXT, _FAINT = (18, 20, 24), (235, 237, 240), (150, 155, 162)
_TICKS = (1, 2, 5, 10, 20, 40, 80, 120, 200)


def grid_rows(cam_to_ego: np.ndarray) -> list[list[int]]:
    """Camera indices by row: those that look forward, left to right, then those that look back, left to right."""
    yaw = np.rad2deg(np.asarray(geometry.optical_yaw(np.asarray(cam_to_ego, np.float64))))
    front = sorted((i for i in range(len(yaw)) if abs(yaw[i]) <= 90), key=lambda i: -yaw[i])
    back = sorted((i for i in range(len(yaw)) if abs(yaw[i]) > 90), key=lambda i: yaw[i] % 360)
    return [row for row in (front, back) if row]


def depth_colours(z: np.ndarray, near: float, far: float) -> np.ndarray:
    """RGB [P, 3] uint8 of depths [P]: turbo over log depth, near = red, far = blue."""
    place = np.log(np.clip(z, near, far) / near) / np.log(far / near)
    shade = np.round(235 - 215 * place).astype(np.uint8)  # without turbo's two nearly black ends
    return cv2.applyColorMap(shade[:, None], cv2.COLORMAP_TURBO)[:, 0, ::-1]


def draw_points(sample: RigSample, camera: int, near: float, far: float, width: int = _TILE_WIDTH) -> np.ndarray:
    """One camera's image [h, width, 3] uint8, darkened, with its points on it; the car's own body is tinted red."""
    pixels = decode_image(sample.images[camera], f"sample {sample.sample_id!r}, camera {sample.camera_names[camera]}")
    native_height, native_width = (int(x) for x in sample.native_size[camera])
    scale = width / native_width
    height = round(native_height * scale)
    shrinks = width <= pixels.shape[1]
    pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
    canvas = (0.65 * (0.6 * pixels + 0.4 * grey)).astype(np.uint8)
    if sample.ego_masks[camera]:
        mask = np.array(Image.open(io.BytesIO(sample.ego_masks[camera])).convert("L").resize((width, height)))
        canvas = np.where((mask < 128)[..., None], (0.6 * canvas + np.array([90, 10, 20])).astype(np.uint8), canvas)
    _mark(canvas, sample.points[camera], scale, near, far)
    return canvas


def _mark(canvas: np.ndarray, points: np.ndarray, scale: float, near: float, far: float) -> None:
    """Draws points [P, 3] = (u, v, z) at native size as discs into a picture at `scale` of it."""
    points = points[np.argsort(-points[:, 2], kind="stable")]  # near points on top
    colours = depth_colours(points[:, 2], near, far) if len(points) else np.zeros((0, 3), np.uint8)
    shift = 4  # OpenCV draws at 1/16 pixel
    centres = np.round(((points[:, :2] + 0.5) * scale - 0.5) * 2**shift).astype(int)
    for (u, v), colour in zip(centres.tolist(), colours.tolist(), strict=True):
        cv2.circle(canvas, (u, v), int(1.35 * 2**shift), colour, -1, cv2.LINE_AA, shift)


def draw_dense(sample: RigSample, camera: int, near: float, far: float, width: int = _TILE_WIDTH) -> np.ndarray:
    """One camera's dense depth [h, width, 3] uint8 with its LiDAR points on it: where both agree, points vanish.

    Black: no depth (sky).
    """
    size = int(sample.image_size[camera, 0]), int(sample.image_size[camera, 1])
    native_height, native_width = (int(x) for x in sample.native_size[camera])
    scale = width / native_width
    where = f"sample {sample.sample_id!r}, camera {sample.camera_names[camera]}"
    depth = dense.resized(sample.dense_depth[camera], size, (round(native_height * scale), width), where)
    colours = depth_colours(np.maximum(depth.ravel(), near), near, far).reshape(*depth.shape, 3)
    canvas = np.where(depth[..., None] > 0, colours, 0).astype(np.uint8)
    _mark(canvas, sample.points[camera], scale, near, far)
    return canvas


def draw_overlay(sample: RigSample, max_depth: float, title: str) -> Image.Image:
    """The whole picture of a record."""
    nonempty = [p[:, 2] for p in sample.points if len(p)]
    nearest = float(np.percentile(np.concatenate(nonempty), 1)) if nonempty else 1.0
    near, far = float(np.clip(nearest, 0.5, max_depth / 4)), max_depth
    rows = grid_rows(sample.cam_to_ego)
    tiles = {i: draw_points(sample, i, near, far) for row in rows for i in row}
    for i, data in enumerate(sample.dense_depth):
        if data:
            tiles[i] = np.concatenate([tiles[i], draw_dense(sample, i, near, far)])
    row_heights = [max(tiles[i].shape[0] for i in row) for row in rows]
    columns = max(len(row) for row in rows)
    width = 2 * _MARGIN + columns * _TILE_WIDTH + (columns - 1) * _GAP
    height = _TITLE + sum(row_heights) + (len(rows) - 1) * _GAP + _BAR_SPACE
    picture = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(picture, "RGBA")
    large, small = ImageFont.load_default(20), ImageFont.load_default(16)
    draw.text((_MARGIN, _TITLE / 2), title, _TEXT, large, anchor="lm")
    total = f"{sum(len(p) for p in sample.points):,} LiDAR points"
    draw.text((width - _MARGIN, _TITLE / 2), total, _FAINT, small, anchor="rm")
    y = _TITLE
    for row, row_height in zip(rows, row_heights, strict=True):
        indent = (columns - len(row)) * (_TILE_WIDTH + _GAP) // 2
        for place, i in enumerate(row):
            x = _MARGIN + indent + place * (_TILE_WIDTH + _GAP)
            picture.paste(Image.fromarray(tiles[i]), (x, y))
            label = f"{sample.camera_names[i]}   {len(sample.points[i]):,}"
            box = draw.textbbox((x + 12, y + 10), label, small)
            draw.rounded_rectangle((box[0] - 6, box[1] - 5, box[2] + 6, box[3] + 5), 5, (0, 0, 0, 150))
            draw.text((x + 12, y + 10), label, _TEXT, small)
        y += row_height + _GAP
    _draw_bar(picture, draw, small, height - _BAR_SPACE + 14, near, far)
    return picture


def _draw_bar(picture: Image.Image, draw: ImageDraw.ImageDraw, font, top: int, near: float, far: float) -> None:
    """Colour bar with ticks in metres."""
    left, right = _MARGIN, picture.width - _MARGIN - 70
    depths = near * (far / near) ** np.linspace(0, 1, right - left)
    strip = np.repeat(depth_colours(depths, near, far)[None], _BAR_HEIGHT, 0)
    picture.paste(Image.fromarray(np.ascontiguousarray(strip)), (left, top))
    for tick in (t for t in _TICKS if near <= t <= far):
        x = left + (right - left) * np.log(tick / near) / np.log(far / near)
        draw.line((x, top + _BAR_HEIGHT, x, top + _BAR_HEIGHT + 5), _FAINT)
        draw.text((x, top + _BAR_HEIGHT + 8), f"{tick}", _TEXT, font, anchor="mt")
    draw.text((picture.width - _MARGIN, top + _BAR_HEIGHT / 2), "metres", _FAINT, font, anchor="rm")
