"""Teachers with random weights, as files in the official layout."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from fsmde_jax import teacher_weights


def params(variant: str = "tiny") -> Any:
    """Random parameters in which every one of them matters."""
    flat, tree = jax.tree.flatten(teacher_weights.template(variant))
    rng = np.random.default_rng(0)
    widths = [np.sqrt(2 / np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.1 for leaf in flat]
    drawn = [rng.normal(0, w, leaf.shape).astype(np.float32) for w, leaf in zip(widths, flat, strict=True)]
    made = jax.tree.unflatten(tree, drawn)
    made["depth_head"]["scratch"]["output_conv2_2"]["bias"] += 3.0  # else the final ReLU may leave nothing
    return made


def write_pth(path: Path, tree: Any) -> None:
    """A .pth file as the official repository publishes it."""
    tensors = teacher_weights.to_official_names(tree, unused=True)
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, path)
