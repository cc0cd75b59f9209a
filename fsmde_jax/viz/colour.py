"""Numbers to colours: depth (turbo, near = warm) and errors, the colour bars that explain them, and pictures as PNG."""

import functools

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_ERROR_STOPS = ((0.0, (49, 104, 190)), (0.35, (250, 245, 190)), (0.65, (247, 140, 60)), (1.0, (178, 10, 30)))
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 80, 100, 200, 500)


@functools.cache
def _turbo() -> np.ndarray:
    """Turbo [256, 3] uint8 RGB, index 0 = blue; without its darkest ends, which would not show on a dark picture."""
    ramp = np.linspace(18, 247, 256).round().astype(np.uint8)[:, None]
    return np.ascontiguousarray(cv2.applyColorMap(ramp, cv2.COLORMAP_TURBO)[:, 0, ::-1])


@functools.cache
def _error_map() -> np.ndarray:
    """Blue - pale - orange - red [256, 3] uint8 RGB; also tells apart without red-green vision."""
    positions = [place for place, _ in _ERROR_STOPS]
    channels = np.array([colour for _, colour in _ERROR_STOPS], np.float64).T
    ramp = np.linspace(0, 1, 256)
    return np.stack([np.interp(ramp, positions, channel) for channel in channels], -1).round().astype(np.uint8)


def position(depth: np.ndarray, low: float, high: float, *, log: bool = True) -> np.ndarray:
    """Place of depths [...] on the scale from `low` to `high` metres, in [0, 1]; not finite or <= 0 becomes 0."""
    if not 0 < low < high:
        raise ValueError(f"expected 0 < low < high, got {low} and {high}")
    depth = np.asarray(depth, np.float64)
    usable = np.isfinite(depth) & (depth > 0)
    depth = np.where(usable, depth, low)
    if log:
        value = np.log(np.clip(depth, low, high) / low) / np.log(high / low)
    else:
        value = (np.clip(depth, low, high) - low) / (high - low)
    return np.where(usable, value, 0.0)


def colour_depth(depth: np.ndarray, low: float, high: float, *, log: bool = True) -> np.ndarray:
    """Colours [..., 3] uint8 of depths [...] in metres: near = red, far = violet blue, no depth (0, NaN) = black."""
    index = ((1.0 - position(depth, low, high, log=log)) * 255).round().astype(np.uint8)
    colours = _turbo()[index]
    colours[~(np.isfinite(depth) & (np.asarray(depth) > 0))] = 0
    return colours


def colour_relative(rel_inv_depth: np.ndarray) -> np.ndarray:
    """Colours [H, W, 3] uint8 of relative inverse depth [H, W]: its 1st percentile and below blue, the 99th red."""
    low, high = np.percentile(rel_inv_depth, (1, 99))
    place = np.clip((rel_inv_depth - low) / max(high - low, np.finfo(np.float32).tiny), 0.0, 1.0)
    return _turbo()[np.rint(255 * place).astype(np.uint8)]


def colour_error(error: np.ndarray, high: float) -> np.ndarray:
    """Colours [..., 3] uint8 of errors [...] >= 0: blue = 0, red = `high` and above."""
    share = np.clip(np.nan_to_num(np.asarray(error, np.float64) / high, nan=1.0), 0, 1)
    return _error_map()[(share * 255).round().astype(np.uint8)]


def encode_png(image: np.ndarray) -> bytes:
    """An image [H, W, 3] uint8 RGB as the content of a PNG file."""
    done, content = cv2.imencode(".png", image[..., ::-1])
    assert done
    return content.tobytes()


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own scalable font: no font file is looked for."""
    return ImageFont.load_default(size)


def depth_ticks(low: float, high: float, *, log: bool = True) -> list[float]:
    """Round depths between `low` and `high` for a colour bar, ends included, not crowded."""
    inner = [t for t in _TICKS if low < t < high]
    ticks = [low]
    for tick in [*inner, high]:
        gap = float(position(np.array(tick), low, high, log=log) - position(np.array(ticks[-1]), low, high, log=log))
        if gap >= 0.08:
            ticks.append(tick)
        elif tick == high and len(ticks) > 1:
            ticks[-1] = high  # the end matters more than its neighbour
    return ticks


def depth_bar(
    width: int, height: int, low: float, high: float, *, log: bool = True, background: int = 24
) -> np.ndarray:
    """Colour bar [height, width, 3] uint8 with ticks in metres, near at the left."""
    ticks = depth_ticks(low, high, log=log)
    at = [float(position(np.array(t), low, high, log=log)) for t in ticks]
    return _bar(_turbo()[::-1], at, [f"{t:g}" for t in ticks], "m", width, height, background)


def error_bar(width: int, height: int, high: float, *, background: int = 24) -> np.ndarray:
    """Colour bar [height, width, 3] uint8 of a relative error, 0 at the left, in percent."""
    at = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    return _bar(_error_map(), at, [f"{100 * high * a:g}" for a in at], "%", width, height, background)


def _bar(
    colours: np.ndarray, at: list[float], texts: list[str], unit: str, width: int, height: int, background: int
) -> np.ndarray:
    size = max(10, int(height * 0.45))
    thick, margin = max(4, height - size - 6), 2 * size
    canvas = np.full((height, width, 3), background, np.uint8)
    ramp = colours[np.linspace(0, 255, width - 2 * margin).round().astype(int)]
    canvas[:thick, margin : width - margin] = ramp[None]
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    for place, text in zip(at, texts, strict=True):
        x = margin + place * (width - 2 * margin - 1)
        pen.line([(x, thick), (x, thick + 3)], fill=(200, 200, 200))
        label = f"{text} {unit}" if place == at[-1] else text
        pen.text((x, height - 1), label, font=font(size), fill=(220, 220, 220), anchor="ms")
    return np.asarray(image)
