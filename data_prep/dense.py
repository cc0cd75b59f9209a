"""Dense depth files of rendered datasets: 16-bit PNG beside the images, value = depth in metres * 256, 0 = none."""

import argparse
from pathlib import Path

from data_prep.images import read_bytes
from fsmde_jax.data import dense
from fsmde_jax.errors import DataError

FOLDER = "dense_depth"  # <dataroot or scene>/dense_depth/<CAMERA>/<image stem>.png
CHOICES = ("auto", "off")
_PNG_END = b"IEND\xaeB`\x82"


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --dense_depth to a converter that finds the files by itself."""
    parser.add_argument(
        "--dense_depth",
        choices=CHOICES,
        default="auto",
        help=f"auto: keep the exact depth of rendered data where a folder {FOLDER}/ holds it; off: leave it out",
    )


def path_of(root: str | Path, camera: str, image: str | Path) -> str:
    """File with the dense depth of an image: `<root>/dense_depth/<camera>/<image stem>.png`."""
    return str(Path(root) / FOLDER / camera / f"{Path(image).stem}.png")


def prepare(path: str, native_size: tuple[int, int], image_size: tuple[int, int]) -> bytes:
    """Dense depth of a record: 16-bit PNG at `image_size`, each pixel the file's pixel that holds its centre.

    Depths are never mixed: a mean over an edge would be a surface that is not there. At native size the file is copied.

    Args:
      path: 16-bit grey PNG of the native size.
      native_size: (height, width) of the camera's images.
      image_size: (height, width) of the record's images.

    Raises:
      DataError: missing, damaged, not 16-bit grey, or of another size than the images.
    """
    data = read_bytes(path, "dense depth")
    if _PNG_END not in data[-64:]:
        raise DataError(f"{path}: truncated or no PNG ({len(data)} bytes); render or copy this file again")
    units = dense.decode_units(data, native_size, path)
    if tuple(native_size) == tuple(image_size):
        return data
    rows, cols = (dense.nearest_pixels(new, old) for new, old in zip(image_size, native_size, strict=True))
    return dense.encode_units(units[rows[:, None], cols])
