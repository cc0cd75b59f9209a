"""The DINOv2 backbone against transformers', PyTorch's and NumPy's numbers."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax import interpolate
from fsmde_jax.models import vit
from tests.torch_depth_anything import (
    LITTLE,
    LITTLE_SWIGLU,
    QUICK,
    SMALL_WIDTH,
    as_torch,
    error,
    parameters,
    pictures,
    reference,
    torch,
)

functional = torch.nn.functional


def backbone(variant, **fields):
    return vit.DinoV2(variant.embed_dim, variant.depth, variant.heads, variant.ffn, variant.taps, **fields)


@pytest.mark.parametrize("src,dst", [(37, 4), (37, 50), (5, 5), (3, 7), (2, 9), (1, 3)])
def test_bicubic_is_torchs(src, dst):
    x = np.random.default_rng(src).normal(size=(1, src, 4)).astype(np.float32)
    expected = functional.interpolate(
        torch.from_numpy(x).double()[..., None].permute(0, 2, 1, 3).expand(1, 4, src, 3),
        (dst, 3),
        mode="bicubic",
        align_corners=False,
    )
    matrix = interpolate.resize_matrix(src, dst, "bicubic")
    np.testing.assert_allclose(matrix @ x[0], expected[0, :, :, 1].T, atol=2e-6)


@pytest.mark.parametrize("dst", [4, 13, 45, 90])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_a_scale_moves_the_samples_as_torchs_scale_factor_does(mode, dst):
    x = np.random.default_rng(dst).normal(size=(1, 6, 37, 37)).astype(np.float64)
    scale = (dst + 0.1) / 37
    expected = functional.interpolate(torch.from_numpy(x), scale_factor=(scale, scale), mode=mode, align_corners=False)
    matrix = interpolate.resize_matrix(37, dst, mode, scale)
    np.testing.assert_allclose(np.einsum("Hh,nchw,Ww->ncHW", matrix, x, matrix), expected, atol=3e-6)
    plain = interpolate.resize_matrix(37, dst, mode)
    assert np.abs(plain - matrix).max() > 1e-3


@pytest.mark.parametrize(
    "arguments", [(4, 8, "area", 2.0), (4, 8, "bicubic", 0.0), (4, 8, "bilinear_align_corners", 2)]
)
def test_a_scale_without_meaning_is_refused(arguments):
    with pytest.raises(ValueError, match="scale"):
        interpolate.resize_matrix(*arguments)


@pytest.mark.parametrize("h,w", [(4, 6), (25, 45), (37, 38), (37, 37)])
def test_positions_are_interpolated_as_the_official_code_and_as_transformers_do(h, w):
    """The official call passes a scale with 0.1 of a patch added; transformers passes the size."""
    positions = np.random.default_rng(0).normal(size=(1, 1370, 8)).astype(np.float32)
    grid = torch.from_numpy(positions[:, 1:]).double().reshape(1, 37, 37, 8).permute(0, 3, 1, 2)
    scale = ((h + 0.1) / 37, (w + 0.1) / 37)
    official = functional.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=False)
    by_size = functional.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
    if (h, w) == (37, 37):
        official = by_size = grid  # both leave out the interpolation
    for offset, expected in ((0.1, official), (0.0, by_size)):
        ours = vit.interpolate_positions(jnp.asarray(positions), h, w, offset)
        np.testing.assert_array_equal(ours[:, 0], positions[:, 0])
        expected = expected.permute(0, 2, 3, 1).reshape(1, h * w, 8).numpy()
        np.testing.assert_allclose(ours[:, 1:], expected, atol=1e-5)
    assert (np.abs(np.asarray(official) - np.asarray(by_size)).max() > 0.01) == ((h, w) != (37, 37))


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("size,limit", [(1.0, 2e-6), (40.0, 1e-3)])
def test_attention_and_its_gradient_are_torchs(implementation, size, limit):
    """At size 40 scores reach thousands: without the maximum taken off they overflow (and they keep fewer digits)."""
    rng = np.random.default_rng(0)
    qkv = (size * rng.normal(size=(2, 11, 3, 3, 8))).astype(np.float32)
    weight = rng.normal(size=(2, 11, 3, 8)).astype(np.float32)
    x = torch.from_numpy(qkv).double().requires_grad_()
    query, key, value = x.unbind(2)
    scores = torch.einsum("mtnc,msnc->mnts", query, key) / np.sqrt(8)
    expected = torch.einsum("mnts,msnc->mtnc", scores.softmax(-1), value)
    (expected * torch.from_numpy(weight)).sum().backward()

    def loss(x):
        out = vit.attend(x, implementation)
        return (out * weight).sum(), out

    gradient, ours = jax.jit(jax.grad(loss, has_aux=True))(qkv)
    assert error(ours, expected.detach()) < limit
    assert error(gradient, x.grad) < limit


@pytest.mark.skipif(jax.default_backend() != "gpu" or not vit._flash_runs(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("tokens", [1126, 1127])
def test_flash_attention_and_its_gradient_are_xlas(tokens):
    qkv = jnp.asarray(np.random.default_rng(0).normal(size=(2, tokens, 3, 6, 64)), jnp.bfloat16)

    def loss(x, implementation):
        out = vit.attend(x, implementation)
        return (out.astype(jnp.float32) ** 2).sum(), out

    (flash, ours), (gradient, expected) = (jax.grad(loss, has_aux=True)(qkv, kind) for kind in (None, "xla"))
    assert error(ours.astype(jnp.float32), expected.astype(jnp.float32)) < 0.02
    assert error(flash.astype(jnp.float32), gradient.astype(jnp.float32)) < 0.02


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_attention_sums_in_float32(implementation):
    """1500 equal scores: a bfloat16 sum of ones stops at 256, and the mean of the values would come out wrong."""
    value = np.random.default_rng(0).normal(1, 0.3, size=(1, 1500, 1, 8))
    qkv = jnp.stack([jnp.zeros(value.shape), jnp.zeros(value.shape), value], 2).astype(jnp.bfloat16)
    ours = vit.attend(qkv, implementation)
    assert ours.dtype == jnp.bfloat16
    assert error(ours[:, :1], value.mean(1, keepdims=True)) < 0.006


@pytest.mark.parametrize(
    ("version", "capability"),
    [("cpu", ""), ("PJRT C API\ncuda 13000", "9.0"), ("PJRT C API\ncuda 13000", "7.5"), ("PJRT C API\nrocm 70000", "")],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_flash_attention_is_for_16_bit_on_nvidia_from_ampere_on(monkeypatch, version, capability, dtype):
    """cuDNN itself cannot run here: which implementations the program holds, not what they compute."""
    asked = []

    def recorded(query, key, value, implementation):
        asked.append(implementation)
        return value

    device = SimpleNamespace(client=SimpleNamespace(platform_version=version), compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    jax.eval_shape(lambda qkv: vit.attend(qkv), jax.ShapeDtypeStruct((2, 5, 3, 3, 8), dtype))  # a trace of its own
    assert sorted(asked) == (["cudnn", "xla"] if capability == "9.0" and dtype == jnp.bfloat16 else ["xla"])


def test_norms_do_not_cancel():
    """Far from zero, as DINOv2's activations are, the mean of squares minus the squared mean loses all digits."""
    x = (3000 + np.random.default_rng(0).normal(size=(1, 5, 64))).astype(np.float32)
    norm = vit._norm(jnp.float32, "norm")
    for values in (x, 1e-3 * (x - 3000)):  # and small ones, where epsilon is half of the variance
        wide = values.astype(np.float64)
        expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
        assert error(norm.apply(norm.init(jax.random.key(0), x), values), expected) < 1e-3
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    half = vit._norm(jnp.bfloat16, "norm")
    result = half.apply(half.init(jax.random.key(0), x), x)
    assert result.dtype == jnp.bfloat16 and error(result, expected) < 0.01


def test_gelu_is_torchs():
    x = np.linspace(-8, 8, 4001, dtype=np.float32)
    expected = functional.gelu(torch.from_numpy(x).double()).numpy()
    np.testing.assert_allclose(vit.gelu(jnp.asarray(x)), expected, atol=1e-6)
    assert vit.gelu(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def run_reference(model, x):
    """Patch embedding, output of block 0, and the taps, class token left out, as [M, h, w, C]."""
    m, height, width, _ = x.shape
    with torch.no_grad():
        output = model.backbone(as_torch(x), output_hidden_states=True)
        patches = model.backbone.embeddings.patch_embeddings(as_torch(x))
    maps = [patches, output.hidden_states[1][:, 1:], *(tap[:, 1:] for tap in output.feature_maps)]
    return [value.reshape(m, height // 14, width // 14, -1).numpy() for value in maps]


@pytest.mark.parametrize(
    "variant,size,limit",
    [
        (LITTLE, (56, 84), 5e-6),
        (LITTLE, (98, 42), 5e-6),
        (LITTLE_SWIGLU, (56, 84), 5e-6),
        (SMALL_WIDTH, (84, 56), 1e-5),
    ],
)
def test_patches_block_0_and_taps_are_the_references(variant, size, limit):
    model = reference(variant)
    params = parameters(model, variant)["pretrained"]
    x = pictures(2, *size)
    patches, block, *taps = run_reference(model, x)
    assert len(taps) == 4

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, x):
        seen = backbone(variant, position_offset=0.0).apply(
            {"params": params}, x, capture_intermediates=lambda module, _: module.name in ("patch_embed", "blocks_0")
        )
        return seen[0], seen[1]["intermediates"]

    ours, inside = run(params, x)
    assert error(inside["patch_embed"]["__call__"][0], patches) < limit
    first = inside["blocks_0"]["__call__"][0][:, 1:].reshape(block.shape)
    assert error(first, block) < limit
    for tap, expected in zip(ours, taps, strict=True):
        assert error(tap, expected) < limit


@pytest.mark.parametrize("size", [(28, 30), (13, 28), (0, 28)])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}; both sides must be multiples of 14"):
        jax.eval_shape(backbone(LITTLE).init, jax.random.key(0), jnp.zeros((1, *size, 3)))
