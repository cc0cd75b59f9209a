"""What losses on masked features share: common grids, means over rigs, unit vectors and softmax over what is valid.

Float32 throughout; every function gives finite values and gradients for every mask.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fsmde_jax import interpolate

Array = Any  # jax.Array

HIGHEST = jax.lax.Precision.HIGHEST  # accelerators round float32 products otherwise
ROUNDING = 1e-6  # about 8 units in the last place of float32: a smaller relative spread is none
_SMALLEST = 1e-30  # absolute: below it a quotient or its gradient would overflow float32
_NEVER = -1e30  # logit of what is masked; finite, so that rows without anything valid are, too


def resize_features(x: Array, h: int, w: int) -> Array:
    """[..., h', w', C] -> [..., h, w, C] float32; per axis exact area weights when it shrinks, bilinear otherwise."""
    x = x.astype(jnp.float32)
    x = interpolate.resize(x, h, x.shape[-2], "area" if h < x.shape[-3] else "bilinear")
    return interpolate.resize(x, h, w, "area" if w < x.shape[-2] else "bilinear")


def cell_mask(mask: Array, h: int, w: int) -> Array:
    """Pixel mask [B, N, h', w'] bool (True = counts) -> [B, N, h, w] bool: False where more than half is masked."""
    return resize_features(mask.astype(bool)[..., None], h, w)[..., 0] > 0.5 - 1e-3  # weights are rounded


def common_grid(
    student: Array, teacher: Array, mask: Array, grid: tuple[int, int] | None = None
) -> tuple[Array, Array, Array]:
    """Student, teacher and mask on one grid whose cells cover the same rectangles of the image.

    Cells on the edge of the masked area hold what the features say there, on both sides alike; cells that are more than
    half masked do not count.

    Args:
      student: [B, N, h, w, C], any float dtype.
      teacher: [B, N, h', w', C'], any float dtype; no gradient goes into it.
      mask: [B, N, h'', w''] bool, True = counts (not the ego body, camera present).
      grid: (gh, gw); None takes the smaller of student and teacher per axis, so that nothing is invented.

    Returns:
      (student [B, N, gh, gw, C], teacher [B, N, gh, gw, C'], valid [B, N, gh, gw] bool), float32 and 0 where not valid.
    """
    shapes = student.shape, teacher.shape, mask.shape
    if [len(shape) for shape in shapes] != [5, 5, 4] or len({shape[:2] for shape in shapes}) > 1:
        raise ValueError(f"expected features [B, N, h, w, C] twice and a mask [B, N, h, w], got {shapes}")
    if grid is None:
        grid = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    valid = cell_mask(mask, *grid)
    student, teacher = (
        jnp.where(valid[..., None], resize_features(x, *grid), 0.0) for x in (student, jax.lax.stop_gradient(teacher))
    )
    return student, teacher, valid


def mean_over_rigs(values: Array, mask: Array) -> Array:
    """Mean over what is valid in each rig, then over the rigs that have anything valid.

    Args:
      values: [B, ...] float32; mask: [B, ...] bool, same shape.

    Returns:
      Scalar; 0 if nothing is valid.
    """
    values, mask = values.reshape(values.shape[0], -1), mask.reshape(mask.shape[0], -1)
    count = mask.sum(-1)
    mean = jnp.where(mask, values, 0.0).sum(-1) / jnp.maximum(count, 1)
    return mean.sum() / jnp.maximum((count > 0).sum(), 1)


def unit(x: Array, axes: int | tuple[int, ...], magnitude: Array | float = 0.0) -> tuple[Array, Array]:
    """x / ||x|| over some axes.

    Args:
      x: float32; what is masked must be 0 already.
      axes: of the vectors.
      magnitude: of the numbers that x is a difference of, shape as x or 1 along `axes`: a vector that is smaller than
        what float32 rounds off there has no direction.

    Returns:
      (x / ||x||, 0 with gradient 0 where x has no direction; known: bool, `axes` kept with size 1, False there).
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axes, keepdims=True))
    known = ~(largest <= jnp.maximum(ROUNDING * magnitude, _SMALLEST))  # written so that a NaN stays a NaN
    scaled = jnp.where(known, x / jnp.where(known, largest, 1.0), 0.0)  # neither overflows nor underflows when squared
    squares = jnp.square(scaled).sum(axes, keepdims=True)
    return scaled / jnp.sqrt(jnp.where(known, squares, 1.0)), known


def log_softmax(logits: Array, mask: Array, axis: int) -> Array:
    """Log of a softmax over the valid entries; hugely negative, but finite, at the others.

    Args:
      logits: float32.
      mask: bool, broadcasts to `logits`.
      axis: of the softmax.
    """
    return jax.nn.log_softmax(jnp.where(mask, logits, _NEVER), axis)


def kl(teacher_log: Array, student_log: Array, mask: Array, axis: int) -> Array:
    """sum p^T (log p^T - log p^S) over the valid entries of `axis`, from two results of `log_softmax`."""
    return jnp.where(mask, jnp.exp(teacher_log) * (teacher_log - student_log), 0.0).sum(axis)
