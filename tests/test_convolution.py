"""Convolution on small maps, and max pooling, against XLA's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fsmde_jax.models import convolution
from fsmde_jax.models.convolution import convolve


@pytest.mark.parametrize(
    ("size", "kernel", "stride"),
    [((2, 4), 3, 1), ((4, 8), 3, 2), ((1, 1), 3, 1), ((3, 5), 3, 2), ((2, 2), 7, 2), ((5, 6), 3, 1), ((2, 3), 1, 1)],
)
def test_numbers_and_gradients_are_those_of_the_plain_convolution(size, kernel, stride):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, 5)), jnp.float32)
    layers = [
        nn.Conv(7, (kernel, kernel), (stride, stride), padding=kernel // 2, **options)
        for options in ({}, {"conv_general_dilated": convolve})
    ]
    variables = layers[0].init(jax.random.key(0), x)
    outputs = [jax.jit(layer.apply)(variables, x) for layer in layers]
    weights = rng.normal(size=outputs[0].shape)
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)

    def total(layer, variables, x):
        return (layer.apply(variables, x) * weights).sum()

    gradients = [jax.jit(jax.grad(functools.partial(total, layer), argnums=(0, 1)))(variables, x) for layer in layers]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *reversed(gradients))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(3, 1, 1), (3, 2, "SAME"), (7, 2, 3), (3, 2, ((0, 2), (1, 0))), ((1, 3), 1, "VALID")],
)
def test_the_gradient_for_a_kernel_is_that_of_the_plain_convolution(kernel, stride, padding, dtype, monkeypatch):
    """In float64 by XLA; odd and even sizes, paddings that are not the same on both sides."""
    monkeypatch.setattr(convolution, "_PER_ROW", 0)
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 17, 22, 3)), rng.normal(size=(*size, 3, 5))
    pads = [(padding, padding)] * 2 if isinstance(padding, int) else padding
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def pulled(function, dtype):
        given = jnp.asarray(x, dtype), jnp.asarray(weight, dtype)
        found, back = jax.vjp(lambda x, k: function(x, k, (stride, stride), pads, **options), *given)
        above = jnp.asarray(np.random.default_rng(1).normal(size=found.shape), dtype)
        return found, *back(above)

    with jax.enable_x64(True):
        wanted = pulled(jax.lax.conv_general_dilated, jnp.float64)
    found = jax.jit(functools.partial(pulled, convolve, dtype))()
    for value, reference in zip(found, wanted, strict=True):
        assert value.dtype == dtype
        tolerance = 1e-6 if dtype == jnp.float32 else 0.01
        np.testing.assert_allclose(value.astype(np.float32), reference, atol=5 * tolerance * np.abs(reference).max())


def test_the_gradient_for_a_kernel_is_by_rows_in_a_program_for_one_cpu_alone():
    """And where a row is large: two images of 96 x 256, 64 channels."""

    def loops(platform, devices=1, width=256):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 96, width, 64), (3, 3, 64, 64))]

        def gradient(x, kernel):
            given = (1, 1), "SAME"
            return jax.grad(lambda k: convolve(x, k, *given, dimension_numbers=("NHWC", "HWIO", "NHWC")).sum())(kernel)

        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((devices,), ("data",))):
            text = jax.export.export(jax.jit(gradient), platforms=[platform])(*shapes).mlir_module()
        return text.count("stablehlo.while"), text.count("stablehlo.convolution")

    assert loops("cpu") == (1, 0) and loops("tpu") == (0, 1) and loops("cuda") == (0, 1)
    assert loops("cpu", devices=2) == loops("cpu", width=64) == (0, 1)


def test_the_slow_form_is_left_on_small_maps_only():
    def primitives(size, groups=1):
        layer = nn.Conv(4, (3, 3), padding=1, feature_group_count=groups, conv_general_dilated=convolve)
        x = jnp.zeros((1, *size, 4))
        variables = layer.init(jax.random.key(0), x)
        return str(jax.make_jaxpr(layer.apply)(variables, x))

    assert "conv_general_dilated" not in primitives((2, 8))
    assert "conv_general_dilated" in primitives((3, 8))
    assert "conv_general_dilated" in primitives((2, 8), groups=2)  # depthwise and grouped ones have their own code


def test_max_pool_is_that_of_flax_with_its_gradient():
    """Distinct random numbers: without ties both give each gradient to the one maximum."""
    x = jnp.asarray(np.random.default_rng(0).permutation(2 * 8 * 6 * 3).reshape(2, 8, 6, 3), jnp.float32) - 100
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 3, 3)), jnp.float32)

    def reference(x):
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

    np.testing.assert_array_equal(convolution.max_pool(x), reference(x))
    ours, theirs = (jax.grad(lambda x, f=f: (f(x) * weights).sum())(x) for f in (convolution.max_pool, reference))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_ties_of_max_pool_share_their_gradient():
    gradient = jax.grad(lambda x: convolution.max_pool(x).sum())(jnp.ones((1, 4, 4, 1)))
    np.testing.assert_allclose(gradient.sum(), 4.0, rtol=1e-6)  # nothing is lost and nothing counted twice
