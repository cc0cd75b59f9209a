"""ResNet encoders against transformers' `ResNetModel`, layer by layer, and BatchNorm's training mode against torch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax import weights
from fsmde_jax.models import registry
from fsmde_jax.models.resnet import ResNet
from tests.random_network import random_variables

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def reference(sizes, depths, kind, seed=0):
    """A randomly initialised `ResNetModel` whose BatchNorms have statistics and affine numbers far from 0 and 1."""
    torch.manual_seed(seed)
    config = transformers.ResNetConfig(
        embedding_size=sizes[0] if kind == "basic" else 16,
        hidden_sizes=list(sizes),
        depths=list(depths),
        layer_type=kind,
    )
    model = transformers.ResNetModel(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def numpy_state(model):
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


def convert(module, model):
    template = weights.template_of(module, jnp.zeros((1, 32, 32, 3)), train=False)
    return weights.assemble(
        numpy_state(model), template, weights.transformers_resnet_name, source="test", ignored=[weights.COUNTERS]
    )


def torch_taps(model, images):
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    stem = model.embedder.embedder(x)
    hidden = model(x, output_hidden_states=True).hidden_states  # the first is after max pooling
    return [tap.detach().permute(0, 2, 3, 1).numpy() for tap in (stem, *hidden[1:])]


def relative_error(ours, theirs):
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


CASES = {
    "resnet18": ((64, 128, 256, 512), (2, 2, 2, 2), "basic"),
    "resnet34 depths": ((8, 16, 24, 32), (3, 4, 6, 3), "basic"),
    "resnet50 depths, narrow": ((32, 64, 128, 256), (3, 4, 6, 3), "bottleneck"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_tap_is_the_references(case):
    sizes, depths, kind = CASES[case]
    model = reference(sizes, depths, kind)
    bottleneck = kind == "bottleneck"
    widths = tuple(size // 4 for size in sizes) if bottleneck else sizes
    ours = ResNet(depths, bottleneck, widths, stem_width=16 if bottleneck else sizes[0])
    images = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype(np.float32)
    taps = jax.jit(lambda v, x: ours.apply(v, x, train=False))(convert(ours, model), images)
    expected = torch_taps(model, images)
    assert len(taps) == len(expected) == 5
    for i, (tap, theirs) in enumerate(zip(taps, expected, strict=True)):
        assert tap.shape == theirs.shape == (2, 64 // 2 ** (i + 1), 96 // 2 ** (i + 1), ours.channels[i])
        assert relative_error(tap, theirs) < 1e-4


def training(module):
    """Applies a network in training; returns its outputs and the new statistics."""
    return jax.jit(partial(module.apply, train=True, mutable=["batch_stats"]))


@pytest.mark.slow
def test_full_resnet50_is_the_references():
    torch.manual_seed(1)
    model = transformers.ResNetModel(transformers.ResNetConfig()).eval()  # the default is ResNet-50
    params, stats = weights.convert_encoder(numpy_state(model), "resnet50", source="test")
    images = np.random.default_rng(0).normal(size=(1, 96, 64, 3)).astype(np.float32)
    taps = registry.build_encoder("resnet50").apply({"params": params, "batch_stats": stats}, images, train=False)
    for tap, theirs in zip(taps, torch_taps(model, images), strict=True):
        assert relative_error(tap, theirs) < 1e-4


def test_training_mode_normalises_by_the_batch_and_updates_the_statistics_like_torch():
    model = reference((8, 16, 24, 32), (1, 1, 1, 1), "basic")
    ours = ResNet((1, 1, 1, 1), False, (8, 16, 24, 32), stem_width=8)
    variables = convert(ours, model)
    before = weights.template_of(ours, jnp.zeros((1, 32, 32, 3)), train=False)["batch_stats"]
    images = np.random.default_rng(1).normal(size=(3, 64, 96, 3)).astype(np.float32)
    old = numpy_state(model)
    model.train()
    expected = torch_taps_once(model, images)
    taps, updates = training(ours)(variables, images)
    for tap, theirs in zip(taps, expected, strict=True):
        assert relative_error(tap, theirs) < 1e-4
    new = numpy_state(model)
    sizes = {}  # numbers per channel that each normalisation saw
    for i in range(5):
        sizes["bn1" if i == 0 else f"layer{i}_0"] = 3 * (64 >> (i + 1)) * (96 >> (i + 1))
    flat = jax.tree_util.tree_flatten_with_path(updates["batch_stats"])[0]
    assert len(flat) == len(jax.tree.leaves(before))
    for keys, value in flat:
        path = tuple(key.key for key in keys)
        name = weights.transformers_resnet_name(path)
        theirs = new[name]
        if path[-1] == "var":  # torch keeps the unbiased variance n / (n - 1), flax the biased one
            n = sizes[path[0]]
            theirs = 0.9 * old[name] + (theirs - 0.9 * old[name]) * (n - 1) / n
        np.testing.assert_allclose(value, theirs, rtol=2e-4, atol=2e-5, err_msg=name)


def torch_taps_once(model, images):
    """As `torch_taps`, with a single pass through the stem, so that the statistics move once."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        stem = model.embedder.embedder(x)
        taps, hidden = [stem], model.embedder.pooler(stem)
        for stage in model.encoder.stages:
            hidden = stage(hidden)
            taps.append(hidden)
    return [tap.permute(0, 2, 3, 1).numpy() for tap in taps]


def test_masked_images_stay_out_of_the_batch_statistics():
    module = ResNet((1, 1, 1, 1), False, (4, 4, 4, 4), stem_width=4)
    images = np.random.default_rng(2).normal(size=(3, 32, 64, 3)).astype(np.float32)
    variables, run = random_variables(module, images), training(module)
    mask = jnp.asarray([True, False, True]).reshape(3, 1, 1, 1)
    masked, updates = run(variables, images, mask=mask)
    alone, expected = run(variables, images[[0, 2]])
    for a, b in zip(masked, alone, strict=True):
        np.testing.assert_allclose(np.asarray(a)[[0, 2]], b, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), updates, expected)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    module = ResNet((1, 1, 1, 1), False, (4, 4, 4, 4), stem_width=4, dtype=jnp.bfloat16)
    images = jnp.ones((1, 32, 32, 3))
    shapes = jax.eval_shape(partial(module.init, train=False), jax.random.key(0), images)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    taps, updates = training(module)(random_variables(module, images), images)
    assert all(tap.dtype == jnp.bfloat16 for tap in taps)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(updates))
