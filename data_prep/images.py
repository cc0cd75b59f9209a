"""Images and ego-body masks: read strictly, resize once by area, encode. Damaged files are errors."""

import contextlib
import functools
import io
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from fsmde_jax.errors import DataError

_JPEG_END = b"\xff\xd9"
_PNG_END = b"IEND\xaeB`\x82"
_EXIF_ORIENTATION = 0x0112
# libjpeg's warnings about data (jerror.h), as far as they mean lost or foreign bytes
_JPEG_COMPLAINTS = ("Corrupt JPEG data", "Premature end of JPEG", "Inconsistent progression", "Invalid SOS")
_lock = threading.Lock()


def read_bytes(path: str | Path, what: str) -> bytes:
    """File content; `DataError` naming the file and `what` where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read this {what} ({error.strerror}); is the download complete?") from error


@functools.lru_cache(maxsize=1)
def _scratch(process: int) -> int:
    """Descriptor of an empty temporary file, one per process."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


@contextlib.contextmanager
def _libjpeg_warnings() -> Iterator[list[str]]:
    """Collects what libjpeg says about damaged data in the body; everything else goes on to standard error.

    libjpeg writes to file descriptor 2, and OpenCV gives no other access to it. So this descriptor is a temporary file
    meanwhile: two system calls per image. Calls must not overlap in threads, hence the lock.
    """
    found: list[str] = []
    with _lock:
        scratch = _scratch(os.getpid())
        try:
            before = os.dup(2)
        except OSError:  # standard error is closed: take the descriptor, and close it again below
            before = -1
        os.dup2(scratch, 2)
        try:
            yield found
        finally:
            if before < 0:
                os.close(2)
            else:
                os.dup2(before, 2)
                os.close(before)
            if size := os.fstat(scratch).st_size:
                text = os.pread(scratch, size, 0).decode(errors="replace")
                os.ftruncate(scratch, 0)
                os.lseek(scratch, 0, os.SEEK_SET)
                for line in text.splitlines(keepends=True):
                    if any(complaint in line for complaint in _JPEG_COMPLAINTS):
                        found.append(line.strip())
                    elif before >= 0:
                        os.write(2, line.encode())


def decode_image(
    data: bytes, where: str, advice: str = "get this file again, or leave the sample out with --on_error skip"
) -> np.ndarray:
    """Decodes JPEG or PNG bytes to [H, W, 3] uint8 RGB.

    OpenCV fills the damaged or missing part of a JPEG with grey and goes on; its JPEG library only prints a warning.
    Any such warning is an error here (`_libjpeg_warnings`). Pillow shows no warnings at all, but raises where the end
    is missing; it is asked, too, where a JPEG does not end with its end marker.

    Args:
      data: the file's content.
      where: its name, for messages.
      advice: what to do about a damaged file.

    Raises:
      DataError: not an image, truncated, damaged, or turned by an EXIF tag (calibration would not fit).
    """
    if not data:
        raise DataError(f"{where}: the image file is empty; {advice}")
    try:
        with Image.open(io.BytesIO(data)) as image:  # header only: cheap
            kind, mode = image.format, image.mode
            if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
                raise DataError(
                    f"{where}: turned by an EXIF orientation tag; save the pixels upright as the calibration sees them"
                )
            if kind == "JPEG" and mode in ("RGB", "L"):
                if not data.endswith(_JPEG_END):
                    image.load()
                with _libjpeg_warnings() as warnings:
                    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
                if pixels is None or warnings:
                    raise DataError(f"{where}: damaged JPEG ({'; '.join(warnings) or 'not decodable'}); {advice}")
                return pixels
            if kind == "PNG" and _PNG_END not in data[-64:]:
                raise DataError(f"{where}: truncated PNG; {advice}")
            if mode not in ("RGB", "RGBA", "L", "P"):
                raise DataError(f"{where}: pixel format {mode!r}; expected 8-bit RGB or grey")
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on damaged files
        raise DataError(f"{where}: truncated or damaged image ({error}); {advice}") from error


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """JPEG bytes of [H, W, 3] uint8 RGB, chroma at half resolution (4:2:0), without metadata."""
    flags = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), flags)
    if not done:
        raise RuntimeError("OpenCV could not encode a JPEG")
    return data.tobytes()


def prepare_image(
    path: str | Path, native_size: tuple[int, int], image_size: tuple[int, int] | None, quality: int
) -> tuple[bytes, tuple[int, int]]:
    """Encoded image of a record and its (height, width).

    Args:
      path: JPEG or PNG file.
      native_size: (height, width) that the calibration belongs to; another size is an error.
      image_size: (height, width) to resize to with area weights; None = native, and then JPEG files are copied byte
        for byte (after a decode that proves them whole).
      quality: JPEG quality where pixels are encoded again.

    Raises:
      DataError: see `decode_image`, and if the size does not match.
    """
    data = read_bytes(path, "image")
    pixels = decode_image(data, str(path))
    if pixels.shape[:2] != tuple(native_size):
        got, expected = f"{pixels.shape[0]}x{pixels.shape[1]}", f"{native_size[0]}x{native_size[1]}"
        raise DataError(f"{path}: the image is {got}, but its calibration is for {expected} (height x width)")
    if image_size is None or tuple(image_size) == tuple(native_size):
        if data.startswith(b"\xff\xd8") and data.endswith(_JPEG_END):
            return data, native_size
        return encode_jpeg(pixels, quality), native_size
    height, width = image_size
    shrinks = height <= native_size[0] and width <= native_size[1]
    resized = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return encode_jpeg(resized, quality), (height, width)


def read_mask(path: str, native_size: tuple[int, int]) -> np.ndarray:
    """Ego-body mask [H, W] uint8 from its file: 255 = visible, 0 = own body.

    Raises:
      DataError: missing, damaged, of another size than the images, or with values between 0 and 255.
    """
    data = read_bytes(path, "mask")
    try:
        with Image.open(io.BytesIO(data)) as image:
            mask = np.array(image.convert("L"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: truncated or damaged mask ({error}); get this file again") from error
    if mask.shape != tuple(native_size):
        raise DataError(
            f"{path}: the mask is {mask.shape[0]}x{mask.shape[1]}, the camera's images are"
            f" {native_size[0]}x{native_size[1]}"
        )
    if not np.all((mask == 0) | (mask == 255)):
        raise DataError(f"{path}: mask values must be 255 (visible) or 0 (own body), found others; threshold it first")
    return mask


@functools.lru_cache(maxsize=128)
def prepare_mask(path: str, native_size: tuple[int, int]) -> bytes:
    """Ego-body mask of a record: 1-bit PNG, or b"" where everything is visible (errors as `read_mask`)."""
    mask = read_mask(path, native_size)
    if mask.all():
        return b""
    out = io.BytesIO()
    Image.fromarray(mask > 0).save(out, "PNG")
    return out.getvalue()
