"""Depth Anything weight files -> parameters of `models.depth_anything`, and back to the official names.

Two layouts are known, each as PyTorch or safetensors file: the official repository's (`pretrained.*`, `depth_head.*`)
and Hugging Face transformers' (`backbone.*`, `neck.*`, `head.*`), whose separate queries, keys and values become one
matrix. Version 1, version 2 and metric checkpoints hold the same tensors: which it is, and the metric model's largest
depth, must be known by whoever loads the file. Reading is strict both ways; tensors that the models declare but never
use are listed here.
"""

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from fsmde_jax import weights
from fsmde_jax.errors import DataError
from fsmde_jax.models.depth_anything import VARIANTS, DepthAnything, Variant
from fsmde_jax.names import check_name

Path = weights.Path
Tensors = weights.Tensors

# The mask token serves DINOv2's own training, and the coarsest fusion block has nothing to add with its first unit.
UNUSED_OFFICIAL = (
    r"pretrained\.mask_token",
    r"depth_head\.scratch\.refinenet4\.resConfUnit1\.conv[12]\.(weight|bias)",
)
UNUSED_TRANSFORMERS = (
    r"backbone\.embeddings\.mask_token",
    r"neck\.fusion_stage\.layers\.0\.residual_layer1\.convolution[12]\.(weight|bias)",
)

# Matrices that one layout holds in one piece and another in several, stacked along the outputs.
_PARTS = {("attn", "qkv"): ("query", "key", "value"), ("mlp", "w12"): ("gate_proj", "up_proj")}


def official_name(path: Path) -> str:
    """("pretrained", "blocks_3", "attn", "qkv", "kernel") -> "pretrained.blocks.3.attn.qkv.weight"."""
    return weights.torchvision_resnet_name(path)  # the same rule: modules by their PyTorch names


# Both spellings of transformers: what its files hold, and what `state_dict()` of version 5 returns.
_FILE_WORDS = {
    "query": "attention.attention.query", "key": "attention.attention.key", "value": "attention.attention.value",
    "proj": "attention.output.dense", "w12": "mlp.weights_in", "w3": "mlp.weights_out",
}  # fmt: skip
_STATE_WORDS = {
    "query": "attention.q_proj", "key": "attention.k_proj", "value": "attention.v_proj", "proj": "attention.o_proj",
    "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "w3": "mlp.down_proj",
}  # fmt: skip
_WORDS = {"norm1": "norm1", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_TOP = {
    ("pretrained", "cls_token"): "backbone.embeddings.cls_token",
    ("pretrained", "pos_embed"): "backbone.embeddings.position_embeddings",
    ("pretrained", "patch_embed", "proj"): "backbone.embeddings.patch_embeddings.projection",
    ("pretrained", "norm"): "backbone.layernorm",
    ("depth_head", "scratch", "output_conv1"): "head.conv1",
    ("depth_head", "scratch", "output_conv2_0"): "head.conv2",
    ("depth_head", "scratch", "output_conv2_2"): "head.conv3",
}


def transformers_name(path: Path, words: dict[str, str] = _FILE_WORDS) -> str:
    """("pretrained", "blocks_3", "attn", "query", "kernel") -> "backbone.encoder.layer.3.attention.attention.query.weight".

    The path's queries, keys and values are separate, as in the file.
    """  # noqa: E501
    if path in _TOP:
        return _TOP[path]
    module, leaf = path[:-1], weights.leaf_name(path[-1])
    if module in _TOP:
        return f"{_TOP[module]}.{leaf}"
    number = re.sub(r"\D", "", module[1] if module[0] == "pretrained" else module[-1])
    if module[0] == "pretrained":
        name = f"backbone.encoder.layer.{number}."
        if module[-1].startswith("ls"):
            return f"{name}layer_scale{module[-1][2]}.lambda1"
        return f"{name}{(_WORDS | words)[module[-1]]}.{leaf}"
    if module[1] != "scratch":
        kind = {"projects": "projection", "resize_layers": "resize"}[module[1].rsplit("_", 1)[0]]
        return f"neck.reassemble_stage.layers.{number}.{kind}.{leaf}"
    if module[2].endswith("_rn"):
        return f"neck.convs.{int(number) - 1}.{leaf}"
    name = f"neck.fusion_stage.layers.{4 - int(module[2].removeprefix('refinenet'))}."
    if module[3] == "out_conv":
        return f"{name}projection.{leaf}"
    return f"{name}residual_layer{module[3][-1]}.convolution{module[4][-1]}.{leaf}"


def template(variant: str | Variant) -> dict[str, Any]:
    """Shapes of the parameters, nested as the module nests them. All heads and versions have the same."""
    return weights.template_of(DepthAnything(variant), jax.ShapeDtypeStruct((1, 14, 14, 3), jnp.float32))["params"]


def _split(tree: Mapping[str, Any], pairs: Mapping[tuple[str, str], tuple[str, ...]]) -> dict[str, Any]:
    """The template with each module of `pairs` cut along its outputs into modules of equal size."""
    flat = {}
    for path, spec in flax.traverse_util.flatten_dict(dict(tree)).items():
        parts = pairs.get(path[-3:-1])
        for part in parts or ():
            shape = (*spec.shape[:-1], spec.shape[-1] // len(parts or ()))
            flat[(*path[:-2], part, path[-1])] = jax.ShapeDtypeStruct(shape, spec.dtype)
        if parts is None:
            flat[path] = spec
    return flax.traverse_util.unflatten_dict(flat)


def _join(tree: Mapping[str, Any], whole: Mapping[str, Any], pairs: Mapping[tuple[str, str], tuple[str, ...]]) -> Any:
    """Undoes `_split` on arrays."""
    flat = flax.traverse_util.flatten_dict(dict(tree))
    joined = {}
    for path in flax.traverse_util.flatten_dict(dict(whole)):
        parts = pairs.get(path[-3:-1])
        pieces = [flat[(*path[:-2], part, path[-1])] for part in parts or ()]
        joined[path] = np.concatenate(pieces, -1) if pieces else flat[path]
    return flax.traverse_util.unflatten_dict(joined)


def _layout(tensors: Tensors) -> tuple[Callable[[Path], str], tuple[str, ...], dict[tuple[str, str], tuple[str, ...]]]:
    """Naming, unused tensors and split matrices of the file's layout.

    Raises:
      KeyError: it is neither layout.
    """
    if any(name.startswith(("depth_head.", "pretrained.")) for name in tensors):
        return official_name, UNUSED_OFFICIAL, {}
    if not any(name.startswith(("backbone.e", "neck.", "head.conv")) for name in tensors):
        raise KeyError("layout")
    if any(name.endswith(".attention.q_proj.weight") for name in tensors):
        return lambda path: transformers_name(path, _STATE_WORDS), UNUSED_TRANSFORMERS, _PARTS
    pairs = {key: parts for key, parts in _PARTS.items() if key[0] == "attn"}
    return transformers_name, UNUSED_TRANSFORMERS, pairs


def recognise(tensors: Tensors) -> str:
    """Name of the variant that the tensors' shapes say, "" when in doubt."""
    blocks = [re.match(r"(?:pretrained\.blocks|backbone\.encoder\.layer)\.(\d+)\.", name) for name in tensors]
    depth = 1 + max((int(block[1]) for block in blocks if block), default=-1)
    widths = {np.shape(tensors[n])[-1] for n in tensors if n.endswith((".cls_token", ".pos_embed", ".norm1.weight"))}
    fits = [name for name, sizes in VARIANTS.items() if sizes.depth == depth and widths == {sizes.embed_dim}]
    return fits[0] if len(fits) == 1 else ""


def convert_teacher(
    tensors: Tensors, variant: str | Variant | None = None, *, source: str
) -> tuple[dict[str, Any], str | Variant]:
    """`load_teacher` for tensors that are read already; `source` names them in errors."""
    try:
        naming, unused, pairs = _layout(tensors)
    except KeyError:
        names = ", ".join(list(tensors)[:3]) or "no tensors at all"
        found = weights.recognise(tensors)
        looks = f"it looks like {found}" if found else f"it holds {names}, ..."
        raise DataError(f"{source}: not weights of Depth Anything; {looks}") from None
    found = recognise(tensors)
    if variant is None and not found:
        raise DataError(
            f"{source}: weights of Depth Anything in no known size, or a damaged file; known: {', '.join(VARIANTS)}."
            " Name the variant to see which tensors do not fit"
        )
    chosen = found if variant is None else variant
    if isinstance(chosen, str):
        check_name("variant", chosen, VARIANTS)
    if found and isinstance(chosen, str) and chosen != found:
        raise DataError(f"{source}: not weights of {chosen}; it looks like {found}")
    whole = template(chosen)
    split = {"params": _split(whole, pairs)}
    params = weights.assemble(tensors, split, naming, source=source, ignored=unused)["params"]
    return _join(params, whole, pairs), chosen


def load_teacher(path: str | pathlib.Path, variant: str | None = None) -> tuple[dict[str, Any], str]:
    """Reads a Depth Anything file of either layout (.pth, .safetensors).

    Args:
      path: the file.
      variant: one of `VARIANTS`; None = by the shapes.

    Returns:
      Parameters of `DepthAnything(variant)`, float32 NumPy arrays, and the variant's name.

    Raises:
      DataError: the file cannot be read, or its tensors are not exactly those of the variant; lists every missing,
        unexpected, misshapen and non-finite tensor.
      ConfigError: unknown variant.
    """
    if variant is not None:
        check_name("variant", variant, VARIANTS)
    params, chosen = convert_teacher(weights.load_tensors(path), variant, source=str(path))
    assert isinstance(chosen, str)
    return params, chosen


def to_official_names(params: Mapping[str, Any], *, unused: bool = False) -> dict[str, np.ndarray]:
    """Parameters in the official layout: names and axis order of the official state dict, dtypes as given.

    Args:
      params: parameters of a `DepthAnything`.
      unused: also zeros for the tensors that the official code declares without using them, so that its strict
        loading accepts the result.

    Returns:
      Contiguous arrays by name; `convert_teacher` gives back exactly `params` (if they are float32).
    """
    tensors = {}
    for path, value in flax.traverse_util.flatten_dict(dict(params)).items():
        array = np.asarray(value)
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim) if path[-1] == "kernel" else None
        tensors[official_name(path)] = np.ascontiguousarray(array if axes is None else array.transpose(axes))
    if unused:
        unit = "depth_head.scratch.refinenet4.resConfUnit"
        for name in [n for n in tensors if n.startswith(f"{unit}2.")]:
            tensors[name.replace(f"{unit}2.", f"{unit}1.")] = np.zeros_like(tensors[name])
        tensors["pretrained.mask_token"] = np.zeros_like(tensors["pretrained.cls_token"][0])
    return tensors


def to_safetensors(params: Mapping[str, Any], *, half: bool = False) -> bytes:
    """Content of a .safetensors file in the official layout; `half` = float16 (what overflows there is refused)."""
    tensors = to_official_names(params, unused=True)
    if half:
        largest = max(float(np.abs(tensor).max()) for tensor in tensors.values())
        if not largest < float(np.finfo(np.float16).max):
            raise DataError(f"a parameter of {largest:g} does not fit float16; write float32")
        tensors = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    return safetensors.numpy.save(tensors)
