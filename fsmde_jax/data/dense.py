"""Dense depth planes as records hold them: 16-bit PNG, value = round(depth in metres * 256), 0 = none (as KITTI's)."""

import cv2
import numpy as np

from fsmde_jax.errors import DataError

UNITS_PER_METRE = 256.0
MAX_DEPTH = 65535 / UNITS_PER_METRE  # metres; beyond it is "none"


def encode(depth: np.ndarray) -> bytes:
    """PNG bytes of a depth plane [h, w] in metres; 0, what rounds to 0, not finite or beyond `MAX_DEPTH` = none."""
    units = np.rint(np.nan_to_num(np.asarray(depth, np.float64), posinf=0.0, neginf=0.0) * UNITS_PER_METRE)
    return encode_units(np.where((units > 0) & (units <= 65535), units, 0).astype(np.uint16))


def encode_units(units: np.ndarray) -> bytes:
    """PNG bytes of a plane [h, w] uint16 in 1/256 metres; the same plane gives the same bytes."""
    done, data = cv2.imencode(".png", units, [cv2.IMWRITE_PNG_COMPRESSION, 3])
    if not done:
        raise RuntimeError("OpenCV could not encode a PNG")
    return data.tobytes()


def decode_units(data: bytes, size: tuple[int, int], where: str) -> np.ndarray:
    """The plane [h, w] uint16, 1/256 metres, 0 = none.

    Raises:
      DataError: naming `where`: not a 16-bit grey PNG of `size` (h, w), or damaged.
    """
    plane = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    if plane is None or plane.dtype != np.uint16 or plane.ndim != 2:
        found = "cannot be decoded" if plane is None else f"is {plane.dtype} {plane.shape}"
        raise DataError(f"{where}: the dense depth ({len(data)} bytes) {found}; expected a 16-bit grey PNG")
    if plane.shape != tuple(size):
        expected = f"{size[0]}x{size[1]}"
        raise DataError(f"{where}: the dense depth is {plane.shape[0]}x{plane.shape[1]}, expected {expected}")
    return plane


def decode(
    data: bytes, size: tuple[int, int], where: str, rows: np.ndarray | None = None, cols: np.ndarray | None = None
) -> np.ndarray:
    """The plane, or only its `rows` [H] and `cols` [W], in metres: [H, W] float32, 0 = none (`DataError` as above)."""
    units = decode_units(data, size, where)
    if rows is not None and cols is not None:
        units = units[rows[:, None], cols]
    return units.astype(np.float32) * np.float32(1 / UNITS_PER_METRE)


def nearest_pixels(count: int, old: int) -> np.ndarray:
    """[count] int64: the pixel, of `old` ones in a line, that holds the centre of each of `count` ones over them."""
    return (2 * np.arange(count) + 1) * old // (2 * count)


def resized(data: bytes, stored: tuple[int, int], size: tuple[int, int], where: str) -> np.ndarray:
    """The whole plane at another `size` (H, W), nearest pixels: [H, W] float32 metres, 0 = none; b"" gives zeros."""
    if not data:
        return np.zeros(size, np.float32)
    rows, cols = (nearest_pixels(new, old) for new, old in zip(size, stored, strict=True))
    return decode(data, stored, where, rows, cols)


def box_pixels(
    stored: tuple[int, int], decoded: tuple[int, int], box: tuple[int, int, int, int], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Stored rows [H] and columns [W] that hold the pixel centres of a `box` after its resize to `size`.

    Whole-number arithmetic, so that nothing depends on rounding; a centre on an edge belongs to the later pixel.

    Args:
      stored: (height, width) of the plane.
      decoded: (height, width) that the box is counted in: the stored image after a scaled decoding.
      box: y0, x0, height, width in decoded pixels.
      size: (H, W).
    """
    lines = []
    for old, whole, start, length, new in zip(stored, decoded, box[:2], box[2:], size, strict=True):
        lines.append((2 * new * start + (2 * np.arange(new) + 1) * length) * old // (2 * new * whole))
    return lines[0], lines[1]
