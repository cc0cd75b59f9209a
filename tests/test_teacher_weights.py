"""Depth Anything files: the official and transformers' layouts, read strictly, and written back."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from fsmde_jax import teacher_weights, weights
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.models.depth_anything import VARIANTS, DepthAnything
from tests.torch_depth_anything import (
    LITTLE,
    LITTLE_SWIGLU,
    QUICK,
    as_torch,
    error,
    pictures,
    reference,
    torch,
)

# Names and shapes of the official code's state dict for ViT-S, as `depth_anything_v2_vits.pth` holds it.
OFFICIAL = {
    name: tuple(shape)
    for name, shape in json.loads(Path(__file__).with_name("depth_anything_keys.json").read_text()).items()
}


_PARTS = ("query", "key", "value")


def state_of(model):
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def official_layout(state):
    """transformers' `state_dict()` in the official layout; written from the two codes, without this project's names."""
    out = {
        "pretrained.cls_token": state["backbone.embeddings.cls_token"],
        "pretrained.pos_embed": state["backbone.embeddings.position_embeddings"],
        "pretrained.mask_token": state["backbone.embeddings.mask_token"],
    }
    pairs = {
        "pretrained.patch_embed.proj": "backbone.embeddings.patch_embeddings.projection",
        "pretrained.norm": "backbone.layernorm",
        "depth_head.resize_layers.0": "neck.reassemble_stage.layers.0.resize",
        "depth_head.resize_layers.1": "neck.reassemble_stage.layers.1.resize",
        "depth_head.resize_layers.3": "neck.reassemble_stage.layers.3.resize",
        "depth_head.scratch.output_conv1": "head.conv1",
        "depth_head.scratch.output_conv2.0": "head.conv2",
        "depth_head.scratch.output_conv2.2": "head.conv3",
    }
    for i in range(4):
        pairs[f"depth_head.projects.{i}"] = f"neck.reassemble_stage.layers.{i}.projection"
        out[f"depth_head.scratch.layer{i + 1}_rn.weight"] = state[f"neck.convs.{i}.weight"]
        ours, theirs = f"depth_head.scratch.refinenet{i + 1}", f"neck.fusion_stage.layers.{3 - i}"
        pairs[f"{ours}.out_conv"] = f"{theirs}.projection"
        for unit in (1, 2):
            for conv in (1, 2):
                pairs[f"{ours}.resConfUnit{unit}.conv{conv}"] = f"{theirs}.residual_layer{unit}.convolution{conv}"
    depth = 1 + max(int(name.split(".")[3]) for name in state if name.startswith("backbone.encoder.layer."))
    for i in range(depth):
        ours, theirs = f"pretrained.blocks.{i}", f"backbone.encoder.layer.{i}"
        for k in (1, 2):
            pairs[f"{ours}.norm{k}"] = f"{theirs}.norm{k}"
            out[f"{ours}.ls{k}.gamma"] = state[f"{theirs}.layer_scale{k}.lambda1"]
        pairs[f"{ours}.attn.proj"] = f"{theirs}.attention.o_proj"
        for leaf in ("weight", "bias"):
            stack = [state[f"{theirs}.attention.{part}_proj.{leaf}"] for part in "qkv"]
            out[f"{ours}.attn.qkv.{leaf}"] = np.concatenate(stack)
            if f"{theirs}.mlp.gate_proj.{leaf}" in state:
                stack = [state[f"{theirs}.mlp.{part}_proj.{leaf}"] for part in ("gate", "up")]
                out[f"{ours}.mlp.w12.{leaf}"] = np.concatenate(stack)
                out[f"{ours}.mlp.w3.{leaf}"] = state[f"{theirs}.mlp.down_proj.{leaf}"]
            else:
                for k in (1, 2):
                    out[f"{ours}.mlp.fc{k}.{leaf}"] = state[f"{theirs}.mlp.fc{k}.{leaf}"]
    out |= {
        f"{ours}.{leaf}": state[f"{theirs}.{leaf}"] for ours, theirs in pairs.items() for leaf in ("weight", "bias")
    }
    return out


def files_layout(state):
    """transformers' `state_dict()` under the names of its files (`save_pretrained` and the hub)."""
    words = {f".attention.{x}_proj.": f".attention.attention.{y}." for x, y in zip("qkv", _PARTS, strict=True)}
    words[".attention.o_proj."] = ".attention.output.dense."
    out = {}
    for name, value in state.items():
        for new, old in words.items():
            name = name.replace(new, old)
        out[name] = value
    return out


def tiny_tensors(seed=0):
    """Random tensors in the official layout of tiny, with those that are never used."""
    rng = np.random.default_rng(seed)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), teacher_weights.template("tiny"))
    named = teacher_weights.to_official_names(zeros, unused=True)
    return {name: rng.normal(size=value.shape).astype(np.float32) for name, value in named.items()}


def test_the_official_key_list():
    """Every name and shape of ViT-S, both ways; what is not read is listed as unused."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), teacher_weights.template("small"))
    written = teacher_weights.to_official_names(zeros, unused=True)
    assert {name: value.shape for name, value in written.items()} == OFFICIAL
    used = set(teacher_weights.to_official_names(zeros))
    unused = {n for n in OFFICIAL if any(re.fullmatch(p, n) for p in teacher_weights.UNUSED_OFFICIAL)}
    assert used | unused == set(OFFICIAL) and not used & unused
    assert len(OFFICIAL) == 239 and len(unused) == 5
    assert sum(int(np.prod(OFFICIAL[name])) for name in used) == VARIANTS["small"].parameters


def test_both_files_of_the_same_numbers_are_the_same_model(tmp_path):
    """Small: an official .pth and transformers' own file give identical parameters, and the reference's output."""
    model = reference(VARIANTS["small"])
    official = official_layout(state_of(model))
    assert {name: value.shape for name, value in official.items()} == OFFICIAL
    path = tmp_path / "depth_anything_v2_vits.pth"
    torch.save({name: torch.from_numpy(value) for name, value in official.items()}, path)
    model.save_pretrained(tmp_path)
    (params, variant), other = (teacher_weights.load_teacher(p) for p in (path, tmp_path / "model.safetensors"))
    assert variant == other[1] == "small"
    jax.tree.map(np.testing.assert_array_equal, params, other[0])
    x = pictures(1, 56, 84)
    net = DepthAnything("small", position_offset=0.0)
    run = jax.jit(lambda p, x: net.apply({"params": p}, x)["rel_inv_depth"], compiler_options=QUICK)
    ours = run(params, x)
    with torch.no_grad():
        assert error(ours, model(as_torch(x)).predicted_depth) < 1e-5


@pytest.mark.parametrize("variant", [LITTLE, LITTLE_SWIGLU], ids=["mlp", "swiglu"])
def test_layouts_agree_and_official_names_round_trip(variant, tmp_path):
    model = reference(variant)
    state = state_of(model)
    official = official_layout(state)
    model.save_pretrained(tmp_path)
    sources = (official, state, weights.load_tensors(tmp_path / "model.safetensors"))
    params = [teacher_weights.convert_teacher(tensors, variant, source="test")[0] for tensors in sources]
    for other in params[1:]:
        jax.tree.map(np.testing.assert_array_equal, params[0], other)
    written = teacher_weights.to_official_names(params[0])
    assert set(official) - set(written) == {
        "pretrained.mask_token",
        *(f"depth_head.scratch.refinenet4.resConfUnit1.conv{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")),
    }
    for name, value in written.items():
        np.testing.assert_array_equal(value, official[name])
    qkv = params[0]["pretrained"]["blocks_2"]["attn"]["qkv"]["kernel"]
    keys = state["backbone.encoder.layer.2.attention.k_proj.weight"]
    np.testing.assert_array_equal(qkv[:, 48:96], keys.T)


def test_the_tiny_file_round_trips(tmp_path):
    """As it ships: safetensors in the official layout; half precision loses digits and nothing else."""
    tensors = tiny_tensors()
    save_file(tensors, tmp_path / "tiny.safetensors")
    params, variant = teacher_weights.load_teacher(tmp_path / "tiny.safetensors")
    assert variant == "tiny"
    assert params["depth_head"]["resize_layers_0"]["kernel"].shape == (4, 4, 24, 24)
    assert (
        params["depth_head"]["resize_layers_0"]["kernel"][1, 2, 3, 4]
        == (
            tensors["depth_head.resize_layers.0.weight"][4, 3, 1, 2]  # torch: in, out, rows, columns
        )
    )
    written = teacher_weights.to_official_names(params)
    assert all(value.flags.c_contiguous for value in written.values())
    for name, value in written.items():
        np.testing.assert_array_equal(value, tensors[name])
    wrapped = {f"module.{name}": torch.from_numpy(value) for name, value in tensors.items()}
    torch.save({"model": wrapped, "epoch": 3}, tmp_path / "latest.pth")  # as the official metric training saves it
    again, variant = teacher_weights.load_teacher(tmp_path / "latest.pth")
    assert variant == "tiny"
    jax.tree.map(np.testing.assert_array_equal, params, again)
    half = {name: value.astype(np.float16) for name, value in written.items()}
    save_file(half, tmp_path / "half.safetensors")
    assert (tmp_path / "half.safetensors").stat().st_size < 13e6
    read, _ = teacher_weights.load_teacher(tmp_path / "half.safetensors", "tiny")
    rounded = jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, read, rounded)


def test_names_of_transformers():
    """Spelled out, from its published files."""
    expected = {
        ("pretrained", "pos_embed"): "backbone.embeddings.position_embeddings",
        ("pretrained", "patch_embed", "proj", "kernel"): "backbone.embeddings.patch_embeddings.projection.weight",
        (
            "pretrained",
            "blocks_11",
            "attn",
            "value",
            "bias",
        ): "backbone.encoder.layer.11.attention.attention.value.bias",
        ("pretrained", "blocks_3", "attn", "proj", "kernel"): "backbone.encoder.layer.3.attention.output.dense.weight",
        ("pretrained", "blocks_3", "ls2", "gamma"): "backbone.encoder.layer.3.layer_scale2.lambda1",
        ("pretrained", "blocks_3", "norm1", "scale"): "backbone.encoder.layer.3.norm1.weight",
        ("pretrained", "norm", "bias"): "backbone.layernorm.bias",
        ("depth_head", "projects_2", "kernel"): "neck.reassemble_stage.layers.2.projection.weight",
        ("depth_head", "resize_layers_3", "bias"): "neck.reassemble_stage.layers.3.resize.bias",
        ("depth_head", "scratch", "layer4_rn", "kernel"): "neck.convs.3.weight",
        ("depth_head", "scratch", "refinenet4", "out_conv", "bias"): "neck.fusion_stage.layers.0.projection.bias",
        ("depth_head", "scratch", "refinenet1", "resConfUnit1", "conv2", "kernel"): (
            "neck.fusion_stage.layers.3.residual_layer1.convolution2.weight"
        ),
        ("depth_head", "scratch", "output_conv2_2", "bias"): "head.conv3.bias",
    }
    for path, name in expected.items():
        assert teacher_weights.transformers_name(path) == name
    path = ("depth_head", "scratch", "output_conv2_0", "kernel")
    assert teacher_weights.official_name(path) == "depth_head.scratch.output_conv2.0.weight"


def broken(tensors, attention):
    """Five problems, one of each kind and one more."""
    tensors = dict(tensors)
    del tensors[attention]
    head = "depth_head.projects.1" if "depth_head.projects.1.bias" in tensors else "neck.reassemble_stage.layers.1"
    (name,) = (n for n in tensors if n.startswith(head) and n.endswith(("projects.1.bias", "projection.bias")))
    tensors[name] = np.full_like(tensors[name], np.nan)
    position = next(n for n in tensors if n.endswith(("pos_embed", "position_embeddings")))
    tensors[position] = tensors[position][:, :257]
    cls = next(n for n in tensors if n.endswith("cls_token"))
    tensors[cls + "_2"] = tensors[cls]
    norm = next(n for n in tensors if n.endswith("1.norm2.weight"))
    tensors[norm] = tensors[norm].astype(np.float64)
    tensors[norm][3] = np.inf
    shapes = f"is (1, 257, {tensors[position].shape[2]}), expected (1, 1370, {tensors[position].shape[2]})"
    return tensors, (
        f"missing: {attention}",
        f"not finite: {name}",
        f"unexpected: {cls}_2",
        f"not finite: {norm}",
        f"wrong shape: {position} {shapes}",
    )


@pytest.mark.parametrize("layout", ["official", "files", "state"])
def test_every_problem_is_reported_at_once(layout):
    state = state_of(reference(LITTLE))
    tensors = {"official": official_layout, "files": files_layout, "state": dict}[layout](state)
    attention = {
        "official": "pretrained.blocks.2.attn.qkv.bias",
        "files": "backbone.encoder.layer.2.attention.attention.key.bias",
        "state": "backbone.encoder.layer.2.attention.k_proj.bias",
    }[layout]
    teacher_weights.convert_teacher(tensors, LITTLE, source="x")
    damaged, problems = broken(tensors, attention)
    with pytest.raises(DataError) as caught:
        teacher_weights.convert_teacher(damaged, LITTLE, source="weights.pth")
    text = str(caught.value)
    assert text.startswith("weights.pth: 5 tensors do not fit")
    for problem in problems:
        assert problem in text
    assert "mask_token" not in text and "resConfUnit1" not in text and "residual_layer1" not in text


def test_a_file_of_another_size_or_kind_is_named(tmp_path):
    save_file(tiny_tensors(), tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=r"a\.safetensors: not weights of small; it looks like tiny$"):
        teacher_weights.load_teacher(tmp_path / "a.safetensors", "small")
    with pytest.raises(ConfigError, match="variant: unknown name 'smal'; did you mean 'small'"):
        teacher_weights.load_teacher(tmp_path / "a.safetensors", "smal")
    little = official_layout(state_of(reference(LITTLE)))
    with pytest.raises(
        DataError, match=r"x: weights of Depth Anything in no known size.*known: tiny, small, base, large, giant\."
    ):
        teacher_weights.convert_teacher(little, source="x")
    with pytest.raises(DataError, match=r"not weights of Depth Anything; it looks like a vision transformer"):
        dinov2 = {name.removeprefix("pretrained."): v for name, v in little.items() if name.startswith("pretrained.")}
        teacher_weights.convert_teacher(dinov2, source="dinov2_vits14_pretrain.pth")
    with pytest.raises(DataError, match="x: not weights of Depth Anything; it holds something, else"):
        teacher_weights.convert_teacher({"something": np.zeros(1), "else": np.zeros(1)}, source="x")
    with pytest.raises(DataError, match="no tensors at all"):
        teacher_weights.convert_teacher({}, "small", source="x")
    with pytest.raises(DataError, match="no such weight file"):
        teacher_weights.load_teacher(tmp_path / "none.pth")


@pytest.mark.parametrize("variant", ["base", "large", "giant"])
def test_other_variants_are_recognised_by_their_shapes(variant):
    """Without gigabytes: arrays that repeat one number."""
    shapes = teacher_weights.template(variant)
    views = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    sizes = VARIANTS[variant]
    tensors = {
        "pretrained.cls_token": views["pretrained"]["cls_token"],
        f"pretrained.blocks.{sizes.depth - 1}.norm1.weight": np.zeros(sizes.embed_dim),
    }
    assert teacher_weights.recognise(tensors) == variant
    other = dataclasses.replace(sizes, depth=sizes.depth + 1)
    tensors[f"pretrained.blocks.{other.depth - 1}.norm1.weight"] = np.zeros(sizes.embed_dim)
    assert teacher_weights.recognise(tensors) == ""
