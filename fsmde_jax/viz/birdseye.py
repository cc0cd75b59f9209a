"""A fused point cloud from above, with the LiDAR's points over it."""

import numpy as np
from PIL import Image, ImageDraw

from fsmde_jax.viz import colour
from fsmde_jax.viz.pointcloud import Cloud

BACKGROUND = 24
_LIDAR = (255, 255, 255)
_FOOTPRINT = 0.4  # metres: side of the square that a point of the cloud is drawn as


def birdseye(
    cloud: Cloud, lidar: np.ndarray | None = None, *, reach: float = 40.0, size: int = 800,
    heights: tuple[float, float] = (-2.0, 4.0), title: str = "",
) -> np.ndarray:  # fmt: skip
    """The surroundings from above [size, size, 3] uint8, forward is up, left is left.

    Args:
      cloud: in the ego frame.
      lidar: [P, 3] metres in the ego frame, drawn white; None = none.
      reach: metres from the car to the picture's edge.
      size: pixels.
      heights: metres above the ego origin; what is lower or higher (sky, bridges) is left out.
      title: one line.
    """
    canvas = np.full((size, size, 3), BACKGROUND, np.uint8)
    scale = size / (2 * reach)

    def pixels(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = np.floor((reach - points[:, 0]) * scale).astype(np.int64)
        cols = np.floor((reach - points[:, 1]) * scale).astype(np.int64)
        inside = (rows >= 0) & (rows < size) & (cols >= 0) & (cols < size)
        return rows, cols, inside & (points[:, 2] >= heights[0]) & (points[:, 2] <= heights[1])

    order = np.argsort(cloud.points[:, 2], kind="stable")  # higher points over lower ones
    rows, cols, inside = pixels(cloud.points[order])
    rows, cols, colours = rows[inside], cols[inside], cloud.colours[order][inside]
    side = max(1, round(_FOOTPRINT * scale))
    for dy in range(side):
        for dx in range(side):
            y, x = (np.clip(at + offset - side // 2, 0, size - 1) for at, offset in ((rows, dy), (cols, dx)))
            canvas[y, x] = colours
    if lidar is not None and len(lidar):
        rows, cols, inside = pixels(lidar)
        canvas[rows[inside], cols[inside]] = _LIDAR
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    middle = size / 2
    for distance in range(10, int(reach) + 1, 10):
        r = distance * scale
        pen.ellipse((middle - r, middle - r, middle + r, middle + r), outline=(90, 90, 90))
        pen.text((middle + 3, middle - r + 2), f"{distance} m", font=colour.font(12), fill=(170, 170, 170))
    half, ahead, behind = 0.95 * scale, 3.7 * scale, 1.0 * scale  # about a car, from its rear axle
    pen.rectangle((middle - half, middle - ahead, middle + half, middle + behind), outline=(240, 200, 60), width=2)
    text = title + ("   white: LiDAR" if lidar is not None and len(lidar) else "")
    pen.text((10, 8), text.strip(), font=colour.font(16), fill=(235, 235, 235))
    return np.asarray(image)
