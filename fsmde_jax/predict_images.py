"""Depth pictures of single images, by a teacher."""

import functools
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import cast

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fsmde_jax import interpolate
from fsmde_jax.data.tfrecord import write_atomically
from fsmde_jax.errors import DataError
from fsmde_jax.models.teacher_images import REFERENCE_SIZE, prepare_image, teacher_size
from fsmde_jax.teacher import Teacher
from fsmde_jax.viz import colour

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_BAR = 40  # pixels high


def find_images(place: Path) -> dict[Path, Path]:
    """Image files at `place` (a file, or a folder with all below it) -> their names relative to it, no suffix.

    Raises:
      DataError: there are none, or two would get the same output name.
    """
    if place.is_file():
        return {place: Path(place.stem)}
    files = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        kinds = ", ".join(SUFFIXES)
        raise DataError(f"{place}: no images here; expected an image file, or a folder with {kinds} files")
    named: dict[Path, Path] = {}
    for file in files:
        name = file.relative_to(place).with_suffix("")
        if name in named:
            raise DataError(f"{file} and {named[name]} would both become {name}_depth.png; rename or move one of them")
        named[name] = file
    return {file: name for name, file in named.items()}


def read_image(path: Path) -> np.ndarray:
    """[H, W, 3] uint8 RGB, turned upright as the file says.

    Raises:
      DataError: it is no image.
    """
    content = np.fromfile(path, np.uint8)
    image = cv2.imdecode(content, cv2.IMREAD_COLOR) if content.size else None
    if image is None:
        raise DataError(f"{path}: not an image that can be read; delete or replace it")
    return np.ascontiguousarray(image[..., ::-1])


def predictor(teacher: Teacher, size: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """Function: image [H, W, 3] uint8 RGB -> relative inverse depth, or depth in metres, [H, W] float32.

    Args:
      teacher: the network.
      size: pixels of the shorter side inside the network; None = what it was trained at.
    """
    longer = teacher.card.longer_side
    module = teacher.module()
    patch = module.patch
    params = jax.device_put(teacher.params)

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def run(params: dict, image: jax.Array, height: int, width: int) -> jax.Array:
        outputs = cast(dict[str, jax.Array], module.apply({"params": params}, image))
        output = outputs["rel_inv_depth" if teacher.card.max_depth is None else "depth"]
        return interpolate.resize(output[..., None], height, width, "bilinear_align_corners")[0, ..., 0]

    def predict(image: np.ndarray) -> np.ndarray:
        side = size or (min(teacher_size(image.shape[:2], longer, patch)) if longer else REFERENCE_SIZE)
        return np.asarray(run(params, jnp.asarray(prepare_image(image, side, patch))[None], *image.shape[:2]))

    return predict


def picture(image: np.ndarray, output: np.ndarray, max_depth: float | None) -> np.ndarray:
    """The image and its depth in colours [H (+ bar), 2 W, 3] uint8 RGB.

    Args:
      image: [H, W, 3] uint8.
      output: [H, W] relative inverse depth, or metres where `max_depth` is given.
      max_depth: None = relative.
    """
    if max_depth is None:
        return np.concatenate([image, colour.colour_relative(output)], 1)
    low, high = (float(np.percentile(output, q)) for q in (1, 99))
    low, high = max(low, 0.01), max(high, 2 * max(low, 0.01))
    both = np.concatenate([image, colour.colour_depth(output, low, high)], 1)
    bar = colour.depth_bar(both.shape[1], _BAR, low, high)
    return np.concatenate([both, bar], 0)


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def predict_folder(
    teacher: Teacher, images: Path, out: Path, *, size: int | None, npy: bool, limit: int = 0
) -> int:  # fmt: skip
    """Writes `<name>_depth.png` (and `.npy`) per image below `out`, of the first `limit` ones (0 = all), by rename.

    Returns:
      How many images there were.

    Raises:
      DataError: there are no images, one cannot be read, or a file not be written.
    """
    found = dict(itertools.islice(find_images(images).items(), limit or None))
    predict = predictor(teacher, size)
    for file, name in tqdm(
        found.items(), unit="image", disable=None, desc="predicting (a new image size compiles first)"
    ):
        image = read_image(file)
        output = predict(image)
        shown = picture(image, output, teacher.card.max_depth)
        target = out / name.parent / f"{name.name}_depth.png"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, colour.encode_png(shown))
            if npy:
                write_atomically(target.with_suffix(".npy"), _npy(output))
        except OSError as error:
            raise DataError(
                f"{target.parent}: cannot write ({error.strerror}); free space or choose another --out"
            ) from error
    return len(found)
