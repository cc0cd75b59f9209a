"""Convolution and pooling in forms that XLA's CPU backend is not slow at."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # jax.Array
_LAYOUT = ("NHWC", "HWIO", "NHWC")
_PER_ROW = 3e7  # operations of a row's product from which on `_for_kernel` is worth its calls (docs/scaling.md)


def convolve(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Array:
    """`jax.lax.conv_general_dilated`, as `nn.Conv(conv_general_dilated=convolve)` calls it; the numbers are the same.

    Where the output is smaller than the kernel, e.g. at stride 32 of a small image, XLA's CPU backend leaves its fast
    convolution, for the gradient too: 3x3 on 2 x 4 pixels takes 50 times as long. There it is one matrix product over
    gathered neighbourhoods instead. A 1x1 convolution is a product as well, and so is then the gradient for its kernel,
    which would be a convolution with a kernel of the map's size. Of large convolutions that gradient is
    `_for_kernel` in a program for a CPU.

    Args:
      x: [M, h, w, c].
      kernel: [kh, kw, c, features].
      strides, padding: per spatial axis.
      options: the others of `conv_general_dilated`.
    """
    plain = options.get("feature_group_count", 1) == 1 and all(
        set(options.get(name) or (1,)) == {1} for name in ("lhs_dilation", "rhs_dilation")
    )
    unpadded = isinstance(padding, str) or not np.any(padding)  # of a 1x1 convolution: SAME and VALID add nothing to it
    if plain and kernel.shape[:2] == (1, 1) and set(strides) == {1} and unpadded:
        return jnp.matmul(x, kernel[0, 0], precision=options.get("precision"))
    if plain and not isinstance(padding, str) and max(kernel.shape[:2]) > 1:
        size = [
            (length + sum(pad) - k) // stride + 1
            for length, pad, k, stride in zip(x.shape[1:3], padding, kernel.shape[:2], strides, strict=True)
        ]
        if any(0 < n < k for n, k in zip(size, kernel.shape[:2], strict=True)):
            return _by_product(x, kernel, strides, padding, size, options.get("precision"))
    layout = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, _LAYOUT)
    known = options.get("dimension_numbers") in (layout, _LAYOUT) and options.get("preferred_element_type") is None
    if plain and known:
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
        pads = tuple((int(pad[0]), int(pad[1])) for pad in padding)
        return _convolved(x, kernel, tuple(strides), pads, options.get("precision"))
    return jax.lax.conv_general_dilated(x, kernel, tuple(strides), padding, **options)


def _plain(
    x: Array, kernel: Array, strides: tuple[int, int], padding: tuple[tuple[int, int], ...], precision: Any
) -> Array:  # fmt: skip
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_LAYOUT, precision=precision)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolved(
    x: Array, kernel: Array, strides: tuple[int, int], padding: tuple[tuple[int, int], ...], precision: Any
) -> Array:  # fmt: skip
    return _plain(x, kernel, strides, padding, precision)


def _forward(x: Array, kernel: Array, *options: Any) -> tuple[Array, tuple[Array, Array]]:
    return _plain(x, kernel, *options), (x, kernel)


def _backward(
    strides: tuple[int, int], padding: tuple[tuple[int, int], ...], precision: Any, saved: tuple[Array, Array],
    gradient: Array,
) -> tuple[Array, Array]:  # fmt: skip
    x, kernel = saved

    def by_convolution(x: Array, gradient: Array) -> Array:
        return jax.vjp(lambda k: _plain(x, k, strides, padding, precision), kernel)[1](gradient)[0]

    def by_rows(x: Array, gradient: Array) -> Array:
        return _for_kernel(x, gradient, kernel.shape[:2], strides, padding, precision).astype(kernel.dtype)

    (for_x,) = jax.vjp(lambda x: _plain(x, kernel, strides, padding, precision), x)[1](gradient)
    per_row = 2 * gradient.shape[0] * gradient.shape[2] * kernel.size
    several = jax.sharding.get_abstract_mesh().size > 1  # by rows, images on other devices would be summed up for each
    if several or per_row < _PER_ROW:
        return for_x, by_convolution(x, gradient)
    return for_x, jax.lax.platform_dependent(x, gradient, cpu=by_rows, default=by_convolution)


_convolved.defvjp(_forward, _backward)


def _for_kernel(
    x: Array, gradient: Array, size: tuple[int, int], strides: tuple[int, int],
    padding: tuple[tuple[int, int], ...], precision: Any,
) -> Array:  # fmt: skip
    """Gradient [kh, kw, c, features] of a convolution for its kernel, as a sum of products, one for each output row.

    XLA's CPU backend has it as a convolution whose kernel is as large as the map, with transposed copies of both sides:
    at 2 to 40 % of the speed of a matrix product, the slower the larger the map (docs/scaling.md).

    Args:
      x: [M, h, w, c]; gradient: [M, h', w', features], for the output.
    """
    (kh, kw), (sy, sx), (m, h, w, features) = size, strides, gradient.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))

    def add_row(total: Array, row: Array) -> tuple[Array, None]:
        rows = jax.lax.dynamic_slice_in_dim(x, row * sy, kh, 1)
        columns = [rows[:, i, j : j + (w - 1) * sx + 1 : sx] for i in range(kh) for j in range(kw)]
        neighbours = jnp.concatenate(columns, -1).reshape(m * w, -1)
        of_row = jax.lax.dynamic_index_in_dim(gradient, row, 1, keepdims=False).reshape(m * w, features)
        return total + jnp.matmul(neighbours.T, of_row, precision=precision, preferred_element_type=jnp.float32), None

    total, _ = jax.lax.scan(add_row, jnp.zeros((kh * kw * x.shape[-1], features), jnp.float32), jnp.arange(h))
    return total.reshape(kh, kw, x.shape[-1], features)


def _by_product(
    x: Array, kernel: Array, strides: Sequence[int], padding: Sequence[tuple[int, int]], size: Sequence[int],
    precision: Any,
) -> Array:  # fmt: skip
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    (kh, kw), (sy, sx), (h, w) = kernel.shape[:2], strides, size
    neighbours = [
        x[:, i : i + (h - 1) * sy + 1 : sy, j : j + (w - 1) * sx + 1 : sx] for i in range(kh) for j in range(kw)
    ]
    return jnp.matmul(jnp.concatenate(neighbours, -1), kernel.reshape(-1, kernel.shape[-1]), precision=precision)


def max_pool(x: Array) -> Array:
    """3x3 maximum with stride 2 and a border of one: [M, h, w, c], h and w even -> [M, h / 2, w / 2, c].

    `nn.max_pool` of the same numbers has a gradient that takes forty times as long as its forward pass on a CPU (XLA's
    select-and-scatter); this one is a maximum of slices, along one axis after the other. Where several inputs of a
    window are its maximum they share its gradient; PyTorch gives it to one. After ReLU those are zeros and have none.
    """
    return _max_along(_max_along(x, 2), 1)


def _max_along(x: Array, axis: int) -> Array:
    halves = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    even, odd = (jax.lax.index_in_dim(halves, i, axis + 1, keepdims=False) for i in (0, 1))
    shift = [(1, -1, 0) if i == axis else (0, 0, 0) for i in range(odd.ndim)]
    before = jax.lax.pad(odd, jnp.asarray(-jnp.inf, x.dtype), shift)
    return jnp.maximum(jnp.maximum(even, odd), before)
