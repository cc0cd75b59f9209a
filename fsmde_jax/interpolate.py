"""Resizing as interpolation matrices: exact, differentiable, and the same numbers on every backend and after export.

`jax.image.resize` antialiases when it shrinks and cannot align corners; two small matrices and an einsum can do
everything that is needed here.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Method = Literal["bilinear", "bilinear_align_corners", "area"]


def resize_matrix(src: int, dst: int, method: Method = "bilinear") -> np.ndarray:
    """Matrix [dst, src] float32 that resizes one axis; its rows sum to 1.

    `bilinear`: half-pixel centres without antialias, border clamped (PyTorch `align_corners=False`).
    `bilinear_align_corners`: first and last samples map onto each other (PyTorch `align_corners=True`).
    `area`: exact overlap of the cells, for shrinking (OpenCV `INTER_AREA`, also at non-integer ratios).
    """
    if src < 1 or dst < 1:
        raise ValueError(f"sizes must be positive, got {src} -> {dst}")
    if method == "area":
        edges_src = np.arange(src + 1, dtype=np.float64)
        edges_dst = np.arange(dst + 1, dtype=np.float64) * (src / dst)
        upper = np.minimum(edges_dst[1:, None], edges_src[None, 1:])
        lower = np.maximum(edges_dst[:-1, None], edges_src[None, :-1])
        overlap = np.clip(upper - lower, 0.0, None)
        return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)
    if method == "bilinear":
        position = (np.arange(dst) + 0.5) * (src / dst) - 0.5
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
