"""Depth Anything against transformers' model: neck, head, output and gradients, and what its options do."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax import interpolate, teacher_weights
from fsmde_jax.models.depth_anything import VARIANTS, DepthAnything
from tests.torch_depth_anything import (
    LITTLE,
    QUICK,
    SMALL_WIDTH,
    as_torch,
    error,
    parameters,
    pictures,
    reference,
    torch,
)

ROOT = Path(__file__).resolve().parents[1]


def run(params, x, variant, **fields):
    model = DepthAnything(variant, **{"position_offset": 0.0, **fields})
    return jax.jit(lambda p, x: model.apply({"params": p}, x), compiler_options=QUICK)(params, x)


def run_reference(model, x):
    """Taps and last fused features, NHWC, and the output."""
    _, height, width, _ = x.shape
    with torch.no_grad():
        taps = [
            tap[:, 1:].unflatten(1, (height // 14, width // 14)) for tap in model.backbone(as_torch(x)).feature_maps
        ]
        neck = model.neck([tap for tap in model.backbone(as_torch(x)).feature_maps], height // 14, width // 14)
        output = model(as_torch(x)).predicted_depth
    return [tap.numpy() for tap in taps], neck[-1].permute(0, 2, 3, 1).numpy(), output.numpy()


def interpolate_officially(positions, h, w):
    """The official code's call (`DinoVisionTransformer.interpolate_pos_encoding`)."""
    grid = positions[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    scale = ((h + 0.1) / 37, (w + 0.1) / 37)
    grid = torch.nn.functional.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def check(variant, size, m=1, limit=1e-5, official_positions=False, **fields):
    """Compares everything with the reference; `limit` is ten times stricter than what is promised."""
    known = {key: fields[key] for key in ("max_depth", "version") if key in fields}
    sizes = VARIANTS[variant] if isinstance(variant, str) else variant
    model = reference(sizes, size=size, **known)
    if official_positions:  # the port's default; transformers' rule everywhere else
        model.backbone.embeddings.interpolate_pos_encoding = lambda tokens, height, width: interpolate_officially(
            model.backbone.embeddings.position_embeddings, height // 14, width // 14
        )
        fields["position_offset"] = DepthAnything.position_offset
    x = pictures(m, *size)
    taps, features, output = run_reference(model, x)
    ours = run(parameters(model, variant), x, variant, **fields)
    assert set(ours) == {"taps", "features", "depth" if "max_depth" in fields else "rel_inv_depth"}
    for tap, expected in zip(ours["taps"], taps, strict=True):
        assert error(tap, expected) < limit
    assert error(ours["features"], features) < limit
    if "max_depth" in fields:
        assert output.min() / fields["max_depth"] > 0.02 and output.max() / fields["max_depth"] < 0.999
        assert output.std() > 0.02 * fields["max_depth"]
        assert error(ours["depth"], output) < limit
    else:
        assert 0.02 < (output == 0).mean() < 0.6 and ours["rel_inv_depth"].min() == 0
        assert error(ours["rel_inv_depth"], output) < limit
    return ours


def test_neck_head_and_output_are_the_references_at_smalls_width():
    check(SMALL_WIDTH, (56, 84), m=2, official_positions=True)


def test_version_1_taps_the_last_four_blocks():
    """With the metric head and square pictures, too."""
    six = dataclasses.replace(LITTLE, depth=6, taps=(0, 2, 3, 5))
    ours = check(six, (42, 42), version=1, max_depth=80.0)
    assert ours["depth"].shape == (1, 42, 42)
    assert six.tapped(1) == (2, 3, 4, 5)
    assert VARIANTS["large"].tapped(2) == (4, 11, 17, 23) and VARIANTS["giant"].tapped(2) == (9, 19, 29, 39)
    assert VARIANTS["small"].tapped(1) == (8, 9, 10, 11) and VARIANTS["base"].tapped(2) == (2, 5, 8, 11)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant,size,fields",
    [
        ("small", (126, 182), {}),
        ("small", (518, 518), {}),
        ("small", (98, 98), {"max_depth": 20.0}),
        ("small", (98, 126), {"version": 1}),
        ("small", (14, 42), {}),  # aligned corners of a single row have nothing to interpolate between
        ("base", (98, 98), {}),
        ("base", (70, 112), {"max_depth": 80.0}),
        ("tiny", (182, 322), {"in_turn": True}),
    ],
)
def test_whole_models_are_the_references(variant, size, fields):
    """At 518 pixels PyTorch's own float32 interpolation weights are 1e-5 off; here they are rounded once."""
    m = 2 if variant == "tiny" else 1
    check(variant, size, m=m, limit=2e-5 if size == (518, 518) else 1e-5, **fields)


@pytest.mark.parametrize("remat", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradients_are_the_references(remat):
    """Of a weighted sum of the output, for every parameter at once; torch's gradients are converted like weights."""
    model, x = reference(LITTLE), pictures(1, 42, 56)
    weight = np.random.default_rng(3).normal(1, 1, size=(1, 42, 56)).astype(np.float32)
    (model(as_torch(x)).predicted_depth * torch.from_numpy(weight)).sum().backward()
    state = {name: np.zeros(value.shape) for name, value in model.state_dict().items()}
    state |= {name: value.grad.numpy() for name, value in model.named_parameters() if value.grad is not None}
    expected, _ = teacher_weights.convert_teacher(state, LITTLE, source="gradients")
    net = DepthAnything(LITTLE, position_offset=0.0, remat=remat)

    def loss(params):
        return (net.apply({"params": params}, x)["rel_inv_depth"] * weight).sum()

    params = parameters(model, LITTLE)
    traced = jax.jit(jax.grad(loss), compiler_options=QUICK).trace(params)
    worst = jax.tree.map(error, traced.lower().compile()(params), expected)
    assert max(jax.tree.leaves(worst)) < 1e-4, worst
    blocks = str(traced.jaxpr).count("remat2[")
    assert blocks >= LITTLE.depth + 4 if remat else blocks == 0  # of the backbone and of the fusion


@pytest.mark.parametrize("variant", ["tiny", "small", "base", "large", "giant"])
def test_parameters_are_as_listed(variant):
    """The numbers of small to giant are those of the official code's state dicts without what is never used."""
    leaves = jax.tree.leaves(teacher_weights.template(variant))
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == VARIANTS[variant].parameters
    sizes = VARIANTS[variant]
    assert sizes.embed_dim == 64 * sizes.heads and sizes.taps[-1] == sizes.depth - 1


def test_images_in_turn_and_in_bfloat16():
    in_turn = check(LITTLE, (56, 84), m=2, in_turn=True)
    params = parameters(reference(LITTLE), LITTLE)
    x = pictures(2, 56, 84)
    plain = run(params, x, LITTLE)
    assert jax.tree.structure(plain) == jax.tree.structure(in_turn)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(in_turn), strict=True):
        assert error(b, a) < 1e-5
    assert plain["features"].shape == (2, 32, 48, LITTLE.fusion)
    assert [tap.shape for tap in plain["taps"]] == [(2, 4, 6, LITTLE.embed_dim)] * 4
    names = jax.eval_shape(DepthAnything(LITTLE, in_turn=True, remat=True).init, jax.random.key(0), x)
    assert jax.tree.structure(names["params"]) == jax.tree.structure(params)
    half = run(params, x, LITTLE, dtype=jnp.bfloat16)
    assert half["rel_inv_depth"].dtype == jnp.float32 and half["taps"][3].dtype == jnp.bfloat16
    assert 1e-5 < error(half["taps"][3], plain["taps"][3]) < 0.02
    assert error(half["rel_inv_depth"], plain["rel_inv_depth"]) < 0.05


@pytest.mark.parametrize("src,dst", [((5, 7), (10, 14)), ((16, 3), (28, 5)), ((9, 4), (5, 4)), ((1, 6), (4, 11))])
def test_resizing_by_taps_and_its_gradient_are_torchs(src, dst):
    x = np.random.default_rng(0).normal(size=(2, *src, 3)).astype(np.float32)
    weight = np.random.default_rng(1).normal(size=(2, *dst, 3)).astype(np.float32)
    for method, align in (("bilinear_align_corners", True), ("bilinear", False), ("bicubic", False)):
        t = as_torch(x).double().requires_grad_()
        mode = method.split("_")[0]
        expected = torch.nn.functional.interpolate(t, dst, mode=mode, align_corners=align)
        (expected * as_torch(weight)).sum().backward()
        ours, backward = jax.vjp(lambda a, m=method: interpolate.resize_taps(a, *dst, m), x)
        np.testing.assert_allclose(ours, expected.detach().permute(0, 2, 3, 1), atol=3e-6)
        np.testing.assert_allclose(backward(jnp.asarray(weight))[0], t.grad.permute(0, 2, 3, 1), atol=1e-5)


def test_unknown_names_are_refused():
    x = jnp.zeros((1, 14, 14, 3))
    with pytest.raises(ValueError, match="unknown variant 'vits'; known: tiny, small, base, large, giant"):
        jax.eval_shape(DepthAnything("vits").init, jax.random.key(0), x)
    with pytest.raises(ValueError, match="versions 1 and 2, got 3"):
        jax.eval_shape(DepthAnything("tiny", version=3).init, jax.random.key(0), x)
    with pytest.raises(ValueError, match="15 x 14; both sides must be multiples of 14"):
        jax.eval_shape(DepthAnything("tiny").init, jax.random.key(0), jnp.zeros((1, 15, 14, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["file", "module"])
def test_benchmark(tmp_path, way):
    script = ["-m", "benchmarks.teacher"] if way == "module" else [str(ROOT / "benchmarks/teacher.py")]
    options = ["--variant", "tiny", "--sizes", "2x28x42", "--repeats", "1", "--out", str(tmp_path / "result.json")]
    command = [sys.executable, *script, *options, *(["--no-memory"] if way == "file" else [])]
    done = subprocess.run(
        command, cwd=ROOT if way == "module" else tmp_path, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert row["relative_error"] < 1e-4 and set(row["median"]) == {"here", "PyTorch eager"}
    assert 0 < row["bfloat16_deviation"]["mean"] < 0.1
    assert ("peak_memory_mb" in row) == (way == "module")
