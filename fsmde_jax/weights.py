"""Pretrained PyTorch weights -> linen parameters: read safely, converted strictly.

Sub-modules mirror the PyTorch names, so a conversion is a walk over the module's parameter paths: every path has one
PyTorch name (a naming function per layout), and every tensor of the file must be asked for. All problems of a file are
reported together. Other models are converted with the same three pieces: `load_tensors`, `template_of`, `assemble`.
"""

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (makes NumPy know bfloat16, which safetensors files may hold)
import numpy as np

from fsmde_jax.errors import DataError
from fsmde_jax.models import registry

Tensors = Mapping[str, np.ndarray]
Path = tuple[str, ...]  # e.g. ("layer1_0", "conv1", "kernel")
Naming = Callable[[Path], str]

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# torch -> linen: convolutions OIHW -> HWIO (also ConvTranspose with transpose_kernel=True), linear layers [out, in].
_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}
COUNTERS = r"(.*\.)?num_batches_tracked"  # BatchNorm's step counter: nothing here uses it


def load_tensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a .safetensors or PyTorch (.pth, .pt, .bin) file; floating-point ones become float32.

    PyTorch files are pickles; they are read with `weights_only=True`, which runs no code from the file, and need torch
    installed. A state dict inside `state_dict` or `model`, and the prefix `module.`, are unwrapped.

    Raises:
      DataError: missing, damaged or unsafe file, unknown kind of file, or torch is needed and not installed.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such weight file; expected a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        tensors = _read_safetensors(path)
    elif path.suffix in (".pth", ".pt", ".bin"):
        tensors = _read_torch(path)
    else:
        raise DataError(
            f"{path}: unknown kind of weight file {path.suffix!r}; expected .safetensors, .pth, .pt or .bin"
        )
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _float32(tensor: np.ndarray) -> np.ndarray:
    return tensor.astype(np.float32) if jnp.issubdtype(tensor.dtype, jnp.floating) else tensor


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    import safetensors
    import safetensors.numpy

    try:
        tensors = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, TypeError, OSError) as error:
        raise DataError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error
    return {name: _float32(tensor) for name, tensor in tensors.items()}


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise DataError(
            f"{path}: reading PyTorch files needs torch, which is not installed: pip install 'fsmde-jax[convert]',"
            " or give a .safetensors file instead"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: pickle, zip, index and runtime errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{path}: torch cannot read it safely as weights ({reason}); the file is damaged, or it holds"
            " Python objects besides tensors: save its state_dict, or convert it to .safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise DataError(f"{path}: expected a state dict (names -> tensors), found {type(content).__name__}")
    return {
        name: (value.detach().float() if value.is_floating_point() else value.detach()).numpy()
        for name, value in content.items()
    }


def template_of(module: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Variables of a linen `module` as nested dicts of shapes; nothing is computed and no device is taken.

    Arrays among the arguments of its call are given as `jax.ShapeDtypeStruct`; `kwargs` are not traced.
    """
    return jax.eval_shape(lambda *given: module.init(jax.random.key(0), *given, **kwargs), *args)


def leaf_name(leaf: str) -> str:
    """PyTorch name of a linen leaf: kernel, scale -> weight; mean, var -> running_mean, running_var; others as is."""
    return _LEAVES.get(leaf, leaf)


def assemble(
    tensors: Tensors, template: Mapping[str, Any], naming: Naming, *, source: str, ignored: Sequence[str] = ()
) -> dict[str, Any]:
    """Fills a template with tensors, strictly both ways.

    Args:
      tensors: PyTorch names -> arrays.
      template: variables as from `template_of`, e.g. {"params": ..., "batch_stats": ...}.
      naming: PyTorch name of a path inside a collection.
      source: file name for errors.
      ignored: regular expressions (full match) of tensors that may be there without being used.

    Returns:
      Nested dicts like `template`, of float32 NumPy arrays.

    Raises:
      DataError: lists every missing, unexpected, misshapen and non-finite tensor.
    """
    filled, used, problems = {}, set(), []
    for path, spec in flax.traverse_util.flatten_dict(dict(template)).items():
        name = naming(path[1:])
        if name not in tensors:
            problems.append(f"missing: {name}")
            continue
        used.add(name)
        tensor = np.asarray(tensors[name])
        axes = _AXES.get(len(spec.shape)) if path[-1] == "kernel" else None
        expected = tuple(spec.shape) if axes is None else tuple(spec.shape[axes.index(i)] for i in range(len(axes)))
        if tensor.shape != expected:
            problems.append(f"wrong shape: {name} is {tensor.shape}, expected {expected}")
        elif not np.all(np.isfinite(tensor)):
            problems.append(f"not finite: {name}")
        else:
            converted = tensor if axes is None else tensor.transpose(axes)
            filled[path] = np.ascontiguousarray(converted, np.float32).reshape(spec.shape)
    for name in tensors:
        if name not in used and not any(re.fullmatch(pattern, name) for pattern in ignored):
            problems.append(f"unexpected: {name}")
    if problems:
        listing = "\n  ".join(sorted(problems))
        raise DataError(f"{source}: {len(problems)} tensors do not fit:\n  {listing}")
    return flax.traverse_util.unflatten_dict(filled)


def torchvision_resnet_name(path: Path) -> str:
    """("layer1_0", "downsample_0", "kernel") -> "layer1.0.downsample.0.weight"."""
    modules = [re.sub(r"_(\d+)$", r".\1", part) for part in path[:-1]]
    return ".".join([*modules, leaf_name(path[-1])])


def transformers_resnet_name(path: Path) -> str:
    """("layer1_0", "conv2", "kernel") -> "encoder.stages.0.layers.0.layer.1.convolution.weight"."""
    kind = "normalization" if path[-2].startswith("bn") or path[-2] == "downsample_1" else "convolution"
    if len(path) == 2:
        return f"embedder.embedder.{kind}.{leaf_name(path[-1])}"
    stage, block = path[0].removeprefix("layer").split("_")
    inside = "shortcut" if path[1].startswith("downsample") else f"layer.{int(path[1][-1]) - 1}"
    return f"encoder.stages.{int(stage) - 1}.layers.{block}.{inside}.{kind}.{leaf_name(path[-1])}"


def efficientnet_lite_name(path: Path) -> str:
    """("blocks_1", "expand_conv", "kernel") -> "_blocks.1._expand_conv.weight"."""
    modules = ["_" + re.sub(r"_(\d+)$", r".\1", part) for part in path[:-1]]
    return ".".join([*modules, leaf_name(path[-1])])


# How a file of each layout is recognised, and the classifier tensors that an encoder leaves out.
_LAYOUTS: dict[str, tuple[Naming, str, tuple[str, ...]]] = {
    "torchvision": (torchvision_resnet_name, "conv1.weight", (COUNTERS, r"fc\.(weight|bias)")),
    "transformers": (transformers_resnet_name, "embedder.embedder.convolution.weight",
                     (COUNTERS, r"classifier\.1\.(weight|bias)")),
    "efficientnet-lite-pytorch": (efficientnet_lite_name, "_conv_stem.weight",
                                  (COUNTERS, r"_conv_head\.weight", r"_bn1\.\w+", r"_fc\.(weight|bias)")),
}  # fmt: skip


def _layout_of(tensors: Tensors) -> str | None:
    return next((name for name, (_, marker, _) in _LAYOUTS.items() if marker in tensors), None)


def encoder_template(encoder: str) -> dict[str, Any]:
    """Shapes of an encoder's `params` and `batch_stats`."""
    return template_of(registry.build_encoder(encoder), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32), train=False)


def recognise(tensors: Tensors) -> str:
    """Which known model the tensors look like: an encoder's name, a rough description, or "" when in doubt."""
    layout = _layout_of(tensors)
    if layout is not None:
        naming, _, ignored = _LAYOUTS[layout]
        for encoder in registry.ENCODERS:
            if encoder.startswith("efficientnet") != (layout == "efficientnet-lite-pytorch"):
                continue
            try:
                assemble(tensors, encoder_template(encoder), naming, source="", ignored=ignored)
            except DataError:
                continue
            return encoder
    descriptions = {
        "backbone.embeddings.": "a Depth Anything model (transformers layout)",
        "depth_head.": "a Depth Anything model (original layout)",
        "blocks.0.attn.": "a vision transformer",
        "_blocks.0.": "an EfficientNet of another size or family",
        "layer1.0.": "a ResNet of another depth or family",
        "encoder.stages.": "a ResNet of another depth (transformers layout)",
    }
    return next((what for start, what in descriptions.items() if any(n.startswith(start) for n in tensors)), "")


def convert_encoder(tensors: Tensors, encoder: str, *, source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """`load_encoder` for tensors that are read already; `source` names them in errors."""
    template = encoder_template(encoder)
    if all(name.startswith(("resnet.", "classifier.")) for name in tensors):  # a transformers classifier
        tensors = {name.removeprefix("resnet."): tensor for name, tensor in tensors.items()}
    layout = _layout_of(tensors)
    wanted = ["efficientnet-lite-pytorch"] if encoder.startswith("efficientnet") else ["torchvision", "transformers"]
    found = recognise(tensors) if layout not in wanted else ""
    if layout not in wanted:
        names = ", ".join(list(tensors)[:3]) or "no tensors at all"
        looks = f"it looks like {found}" if found else f"it holds {names}, ..."
        raise DataError(f"{source}: not weights of {encoder} in the layout of {' or '.join(wanted)}; {looks}")
    naming, _, ignored = _LAYOUTS[layout]
    try:
        variables = assemble(tensors, template, naming, source=source, ignored=ignored)
    except DataError as error:
        found = recognise(tensors)
        if found and found != encoder:
            raise DataError(f"{source}: not weights of {encoder}; it looks like {found}. {error}") from error
        raise
    return variables["params"], variables["batch_stats"]


def load_encoder(path: str | pathlib.Path, encoder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pretrained encoder weights: (params, batch_stats) of `registry.build_encoder(encoder)`.

    ResNets: torchvision's names (timm's are the same) or transformers' `ResNetModel`. EfficientNet-Lite: the names of
    `efficientnet-lite-pytorch`. The classifier and BatchNorm's step counters are left out; everything else must fit.

    Raises:
      DataError: the file cannot be read, or its tensors are not exactly those of the encoder.
      ConfigError: unknown encoder name.
    """
    return convert_encoder(load_tensors(path), encoder, source=str(path))
