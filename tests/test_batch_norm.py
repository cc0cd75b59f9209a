"""Folding BatchNorm, against flax's own and against the network as it was."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax.models.batch_norm import BatchNorm, fold
from fsmde_jax.models.registry import ENCODERS, build_encoder
from fsmde_jax.models.student import ENCODER_SCOPE, fold_batch_norm
from tests.exported import perturbed_tree


class Pair(nn.Module):
    norm: type[nn.BatchNorm]

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        return self.norm(use_running_average=not train, epsilon=0.1, name="norm")(x, mask=mask)


@pytest.mark.parametrize("train", [True, False])
def test_it_is_flax_batch_norm(train):
    """Output, gradient and new statistics, bit for bit, a masked batch included."""
    x = jax.random.normal(jax.random.key(0), (3, 5, 6, 2))
    mask = jnp.array([True, False, True]).reshape(3, 1, 1, 1)
    variables = perturbed_tree(Pair(nn.BatchNorm).init(jax.random.key(1), x, train=False))

    def run(norm):
        def loss(params):
            out, new = Pair(norm).apply({**variables, "params": params}, x, train=train, mask=mask, mutable=True)
            return jnp.sum(out**3), (out, new["batch_stats"])

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    jax.tree.map(np.testing.assert_array_equal, run(BatchNorm), run(nn.BatchNorm))


def test_the_shift_that_is_left():
    """Closed form: kernel * s and bias - mean * s, s = scale / sqrt(var + epsilon)."""
    norm = {"scale": np.array([2.0, -1.0]), "bias": np.array([0.5, 0.0])}
    stats = {"mean": np.array([1.0, 3.0]), "var": np.array([3.0, 0.0])}
    kernel = np.arange(4.0).reshape(1, 1, 2, 2)
    params = {"net": {"conv": {"kernel": kernel}, "norm": norm}, "head": {"kernel": kernel}}
    found = fold(params, {"net": {"norm": stats}}, {"net": 1.0})
    np.testing.assert_allclose(found["net"]["conv"]["kernel"], kernel * [1.0, -1.0])
    np.testing.assert_allclose(found["net"]["norm"]["bias"], [-0.5, 3.0])
    assert set(found["net"]["norm"]) == {"bias"} and found["head"] is params["head"]
    with pytest.raises(ValueError, match="net: no convolution is known before norm"):
        fold({"net": {"other": {"kernel": kernel}, "norm": norm}}, {"net": {"norm": stats}}, {"net": 1.0})
    biased = {"kernel": kernel, "bias": np.ones(2)}
    with pytest.raises(ValueError, match="net/conv: has bias beside its kernel"):
        fold({"net": {"conv": biased, "norm": norm}}, {"net": {"norm": stats}}, {"net": 1.0})


@pytest.mark.parametrize(
    "encoder",
    ["resnet18", "efficientnet_lite0", pytest.param("resnet50", marks=pytest.mark.slow)],
)
def test_an_encoder_is_the_same_function(encoder):
    """In float64, where rounding cannot hide a wrong pair: every tap to 1e-9."""
    with jax.enable_x64(True):
        network = build_encoder(encoder, jnp.float64)
        x = jax.random.normal(jax.random.key(0), (2, 64, 64, 3), jnp.float64)
        shapes = jax.eval_shape(partial(network.init, train=False), jax.random.key(1), x)
        variables = jax.tree.map(lambda leaf: leaf.astype(np.float64), perturbed_tree(shapes))
        run = jax.jit(partial(network.apply, train=False))
        whole = {kind: {ENCODER_SCOPE: tree} for kind, tree in variables.items()}
        folded = fold_batch_norm(encoder, whole)
        assert folded["batch_stats"] == {}
        found = run({"params": folded["params"][ENCODER_SCOPE]}, x)
        wanted = run(variables, x)
    assert len(found) == len(ENCODERS[encoder].channels)
    for f, w in zip(found, wanted, strict=True):
        np.testing.assert_allclose(f, w, rtol=1e-9, atol=1e-9 * float(np.abs(w).max()))
