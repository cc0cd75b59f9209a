"""Resizing against PyTorch and OpenCV."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax import interpolate

SIZES = [
    ((5, 7), (10, 14)),
    ((5, 7), (13, 9)),
    ((12, 20), (5, 8)),
    ((4, 6), (4, 6)),
    ((1, 3), (4, 1)),
    ((6, 1), (3, 5)),
]


def _picture(h: int, w: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(h * 100 + w).normal(size=(2, h, w, channels)).astype(np.float32)


@pytest.mark.parametrize("src,dst", SIZES)
@pytest.mark.parametrize("align", [False, True])
def test_bilinear_is_torchs(src, dst, align):
    torch = pytest.importorskip("torch")
    x = _picture(*src)
    reference = torch.nn.functional.interpolate(
        torch.from_numpy(x).double().permute(0, 3, 1, 2), dst, mode="bilinear", align_corners=align, antialias=False
    )
    ours = interpolate.resize(jnp.asarray(x), *dst, "bilinear_align_corners" if align else "bilinear")
    np.testing.assert_allclose(ours, reference.permute(0, 2, 3, 1).numpy(), atol=2e-6)


def test_area_is_torchs_average_at_integer_ratios():
    torch = pytest.importorskip("torch")
    x = _picture(12, 20)
    reference = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(x).permute(0, 3, 1, 2), (4, 5))
    ours = interpolate.resize(jnp.asarray(x), 4, 5, "area")
    np.testing.assert_allclose(ours, reference.permute(0, 2, 3, 1).numpy(), atol=2e-6)


@pytest.mark.parametrize("dst", [(5, 9), (11, 19), (7, 20), (1, 1)])
def test_area_is_opencvs_at_any_ratio(dst):
    x = _picture(12, 20)[0]
    reference = cv2.resize(x, dst[::-1], interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(interpolate.resize(jnp.asarray(x), *dst, "area"), reference, atol=2e-5)


@pytest.mark.parametrize("method", ["bilinear", "bilinear_align_corners", "area"])
@pytest.mark.parametrize("src,dst", [(7, 3), (352, 22), (22, 35)])
def test_rows_sum_to_one(method, src, dst):
    matrix = interpolate.resize_matrix(src, dst, method)
    assert matrix.shape == (dst, src)
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-6)
    assert matrix.min() >= 0


def test_half_pixel_keeps_a_ramp():
    """At integer pixel centres u, resizing a ramp u gives (u' + .5) / s - .5 away from the border."""
    ramp = jnp.arange(16, dtype=jnp.float32)[None, :, None] * jnp.ones((2, 1, 1))
    out = interpolate.resize(ramp, 2, 48)[0, :, 0]
    expected = (np.arange(48) + 0.5) / 3 - 0.5
    np.testing.assert_allclose(out[2:-2], expected[2:-2], atol=1e-5)


def test_leading_dimensions_dtype_and_jit():
    x = jnp.asarray(_picture(4, 6)).astype(jnp.bfloat16)[None, :, None]
    out = jax.jit(lambda a: interpolate.resize(a, 8, 12))(x)
    assert out.shape == (1, 2, 1, 8, 12, 3) and out.dtype == jnp.bfloat16


@pytest.mark.parametrize("arguments", [(0, 4, "area"), (4, 0, "bilinear"), (4, 4, "cubic")])
def test_impossible_requests_are_refused(arguments):
    with pytest.raises(ValueError, match=r"sizes must be positive|unknown method"):
        interpolate.resize_matrix(*arguments)
