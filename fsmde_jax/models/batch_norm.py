"""BatchNorm, and what is left of it once its scale is folded into the convolution before it.

At inference BatchNorm is one scale and one shift per channel. `fold` multiplies the scale into the kernel and leaves
the shift; a network whose parameters were folded runs as before, without statistics, but cannot be trained.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fsmde_jax.errors import ConfigError

Array = Any
Params = Mapping[str, Any]

# A module's convolutions, and the BatchNorm that follows each: of resnet, efficientnet_lite and decoder.
_FOLLOWED_BY = (
    ("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("downsample_0", "downsample_1"),
    ("conv_stem", "bn0"), ("expand_conv", "bn0"), ("depthwise_conv", "bn1"), ("project_conv", "bn2"),
    ("conv_head", "bn1"), ("conv", "norm"),
)  # fmt: skip


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm`; with parameters of `fold`, its shift alone."""

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:  # type: ignore[override]
        """Normalises x [..., C]; `mask` broadcasts against it, False = leave out of the batch's statistics.

        Raises:
          ConfigError: folded parameters are to be trained.
        """
        if self.is_initializing() or self.has_variable("params", "scale"):
            return super().__call__(x, mask=mask)
        if not self.use_running_average:
            raise ConfigError(
                "a student whose BatchNorm is folded cannot be trained; export it without --fold_batchnorm"
            )
        return x + jnp.asarray(self.get_variable("params", "bias"), x.dtype)


def fold(params: Params, batch_stats: Params, epsilons: Mapping[str, float]) -> dict[str, Any]:
    """Parameters without BatchNorm's scales: kernel * s and bias - mean * s, with s = scale / sqrt(var + epsilon).

    Args:
      params, batch_stats: of a network.
      epsilons: BatchNorm's epsilon in each top-level module that has batch statistics.

    Returns:
      The same tree in which every BatchNorm has `bias` [C] alone; what changes is NumPy float64, the rest is as it was.

    Raises:
      ValueError: a BatchNorm follows no convolution that is known, or one that has more than a kernel.
    """
    return {
        name: _folded(entry, batch_stats[name], epsilons[name], name) if name in batch_stats else entry
        for name, entry in params.items()
    }


def _folded(params: Params, stats: Params, epsilon: float, where: str) -> dict[str, Any]:
    found = dict(params)
    left = {name for name, entry in stats.items() if "mean" in entry}
    for conv, norm in _FOLLOWED_BY:
        if conv not in params or norm not in left:
            continue
        left.remove(norm)
        if extra := sorted(params[conv].keys() - {"kernel"}):
            raise ValueError(f"{where}/{conv}: has {', '.join(extra)} beside its kernel, which folding would lose")
        mean, var = (np.asarray(stats[norm][key], np.float64) for key in ("mean", "var"))
        scale = np.asarray(params[norm]["scale"], np.float64) / np.sqrt(var + epsilon)
        found[conv] = {"kernel": np.asarray(params[conv]["kernel"], np.float64) * scale}
        found[norm] = {"bias": np.asarray(params[norm]["bias"], np.float64) - mean * scale}
    if left:
        raise ValueError(f"{where}: no convolution is known before {', '.join(sorted(left))}")
    for name, entry in stats.items():
        if "mean" not in entry:
            found[name] = _folded(params[name], entry, epsilon, f"{where}/{name}")
    return found
