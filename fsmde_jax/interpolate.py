"""Resizing as interpolation matrices: exact, differentiable, and the same numbers on every backend and after export.

`jax.image.resize` antialiases when it shrinks and cannot align corners; two small matrices and an einsum can do
everything that is needed here. `resize_taps` does the same for big maps without multiplying by the matrices' zeros.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Method = Literal["bilinear", "bilinear_align_corners", "area", "bicubic"]

_CUBIC_A = -0.75  # PyTorch's and OpenCV's choice; Pillow and jax.image take -0.5


def resize_matrix(src: int, dst: int, method: Method = "bilinear", scale: float | None = None) -> np.ndarray:
    """Matrix [dst, src] float32 that resizes one axis; its rows sum to 1.

    `bilinear`: half-pixel centres without antialias, border clamped (PyTorch `align_corners=False`).
    `bilinear_align_corners`: first and last samples map onto each other (PyTorch `align_corners=True`).
    `area`: exact overlap of the cells, for shrinking (OpenCV `INTER_AREA`, also at non-integer ratios).
    `bicubic`: Keys' cubic convolution (IEEE TASSP 1981) with a = -0.75, half-pixel centres without antialias, border
    clamped (PyTorch `align_corners=False`).

    Args:
      src: size before.
      dst: size after.
      method: see above.
      scale: ratio of the half-pixel grids for `bilinear` and `bicubic`, as PyTorch's `scale_factor`; dst / src unless
        given. It sets where samples lie, not how many there are.

    Raises:
      ValueError: sizes that are not positive, an unknown method, or a `scale` for a method that has none.
    """
    if src < 1 or dst < 1:
        raise ValueError(f"sizes must be positive, got {src} -> {dst}")
    if scale is not None and (scale <= 0 or method not in ("bilinear", "bicubic")):
        raise ValueError(f"scale {scale} cannot be used with {method!r}: positive, for bilinear and bicubic only")
    half_pixel = (np.arange(dst) + 0.5) * (src / dst if scale is None else 1 / scale) - 0.5
    if method == "area":
        edges_src = np.arange(src + 1, dtype=np.float64)
        edges_dst = np.arange(dst + 1, dtype=np.float64) * (src / dst)
        upper = np.minimum(edges_dst[1:, None], edges_src[None, 1:])
        lower = np.maximum(edges_dst[:-1, None], edges_src[None, :-1])
        overlap = np.clip(upper - lower, 0.0, None)
        return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)
    if method == "bicubic":
        return _bicubic_matrix(src, half_pixel)
    if method == "bilinear":
        position = half_pixel
    elif method == "bilinear_align_corners":
        position = np.arange(dst) * ((src - 1) / (dst - 1) if dst > 1 else 0.0)
    else:
        raise ValueError(f"unknown method {method!r}")
    position = np.clip(position, 0.0, src - 1)
    low = np.minimum(np.floor(position).astype(int), max(src - 2, 0))
    weight = position - low
    matrix = np.zeros((dst, src), np.float64)
    rows = np.arange(dst)
    matrix[rows, low] += 1.0 - weight
    matrix[rows, np.minimum(low + 1, src - 1)] += weight
    return matrix.astype(np.float32)


def _bicubic_matrix(src: int, position: np.ndarray) -> np.ndarray:
    low = np.floor(position).astype(int)
    matrix = np.zeros((len(position), src), np.float64)
    for offset in (-1, 0, 1, 2):
        distance = np.abs(position - (low + offset))
        near = ((_CUBIC_A + 2) * distance - (_CUBIC_A + 3)) * distance**2 + 1
        far = _CUBIC_A * (((distance - 5) * distance + 8) * distance - 4)
        weight = np.where(distance <= 1, near, far)
        np.add.at(matrix, (np.arange(len(position)), np.clip(low + offset, 0, src - 1)), weight)
    return matrix.astype(np.float32)


def resize(x: Any, height: int, width: int, method: Method = "bilinear") -> Any:
    """Resizes [..., h, w, C] to [..., height, width, C] in x's dtype (see `resize_matrix`)."""
    h, w = x.shape[-3], x.shape[-2]
    highest = jax.lax.Precision.HIGHEST  # accelerators would round float32 to fewer bits inside the products
    if h != height:
        matrix = jnp.asarray(resize_matrix(h, height, method), x.dtype)
        x = jnp.einsum("...hwc,Hh->...Hwc", x, matrix, precision=highest)
    if w != width:
        matrix = jnp.asarray(resize_matrix(w, width, method), x.dtype)
        x = jnp.einsum("...hwc,Ww->...hWc", x, matrix, precision=highest)
    return x


def resize_taps(x: Any, height: int, width: int, method: Method = "bilinear") -> Any:
    """`resize` as weighted sums of neighbours: reads only what the matrices' bands need.

    For maps of hundreds of pixels: on a CPU 20 to 40 times faster than the products with mostly zeros. The gradient is
    a weighted sum of neighbours, too, instead of a scatter. Forward-mode derivatives are not defined.
    """
    for axis, size in ((x.ndim - 3, height), (x.ndim - 2, width)):
        if x.shape[axis] != size:
            x = _banded(x, axis, x.shape[axis], size, method, False)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
def _banded(x: Any, axis: int, src: int, dst: int, method: Method, transpose: bool) -> Any:
    """Multiplies one axis by `resize_matrix`, or by its transpose, a band at a time."""
    matrix = resize_matrix(src, dst, method)
    matrix = matrix.T if transpose else matrix
    rows, columns = matrix.shape
    used = matrix != 0
    first = np.where(used.any(1), used.argmax(1), 0)
    last = np.where(used.any(1), columns - 1 - used[:, ::-1].argmax(1), 0)
    total = None
    for offset in range(int((last - first).max()) + 1):
        index = np.minimum(first + offset, columns - 1)
        weight = np.where(first + offset <= last, matrix[np.arange(rows), index], 0)
        shape = [rows if i == axis else 1 for i in range(x.ndim)]
        term = jnp.take(x, index, axis=axis, mode="clip") * jnp.asarray(weight.reshape(shape), x.dtype)
        total = term if total is None else total + term
    return total


def _banded_forward(x: Any, axis: int, src: int, dst: int, method: Method, transpose: bool) -> tuple[Any, None]:
    return _banded(x, axis, src, dst, method, transpose), None


def _banded_backward(
    axis: int, src: int, dst: int, method: Method, transpose: bool, _: None, gradient: Any
) -> tuple[Any]:
    return (_banded(gradient, axis, src, dst, method, not transpose),)


_banded.defvjp(_banded_forward, _banded_backward)
