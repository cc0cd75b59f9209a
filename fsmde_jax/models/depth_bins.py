"""The depth-bin head: hybrid regression, depth = E_p[c] over bins (docs/method.md, section 1).

Probabilities say WHERE along the range a pixel lies and never see the focal length; centers say how far that is in
metres. Centers are predicted for a canonical focal length f_0 and multiplied by fx / f_0.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fsmde_jax import interpolate

Array = Any

BINS = ("log", "linear", "uniform", "sid", "attractor")
PROBABILITIES = ("softmax", "log_binomial")
FOCAL_WIDTH = 640  # network width in pixels at which focal_canonical and focal_range are given
TEMPERATURES = (0.0212, 50.0)  # ZoeDepth's range for log_binomial; a low one makes the distribution narrow
ALPHA = 300.0  # of ZoeDepth's inverse attractor
_HIGHEST = jax.lax.Precision.HIGHEST  # accelerators round float32 products otherwise


def canonical_range(
    min_depth: float, max_depth: float, focal_canonical: float, focal_range: tuple[float, float]
) -> tuple[float, float]:
    """Depth range [lo, hi] in metres at the canonical focal length that lets every camera reach [min, max] depth.

    A center c becomes c f / f_0 for a camera of focal length f, so lo = min_depth f_0 / f_max and
    hi = max_depth f_0 / f_min.

    Args:
      min_depth: metres; max_depth: metres.
      focal_canonical: f_0; focal_range: smallest and largest f, in the same unit, augmentation included.
    """
    f_min, f_max = focal_range
    if not 0 < min_depth < max_depth:
        raise ValueError(f"expected 0 < min_depth < max_depth, got {min_depth} and {max_depth}")
    if not (0 < f_min <= f_max and focal_canonical > 0):
        raise ValueError(f"focal lengths must be positive and ordered, got {focal_range} and f_0 {focal_canonical}")
    return min_depth * focal_canonical / f_max, max_depth * focal_canonical / f_min


def focal_ratio(intrinsics: Array, width: int, focal_canonical: float) -> Array:
    """fx / f_0 [...] of intrinsics [..., 3, 3] in pixels at network `width`; f_0 is given at width 640."""
    return intrinsics[..., 0, 0] / (focal_canonical * width / FOCAL_WIDTH)


def log_anchors(
    intrinsics: Array, width: int, num_bins: int, *, depth_range: tuple[float, float], focal_canonical: float
) -> Array:
    """The centers [..., K] metres that a head with bins `log` starts from: evenly spaced in log-depth.

    Args:
      intrinsics: [..., 3, 3] pixels at network `width`.
      num_bins: K.
      depth_range: canonical [lo, hi] in metres (`canonical_range`).
      focal_canonical: f_0, pixels at width 640.
    """
    lo, hi = (math.log(depth) for depth in depth_range)
    position = (jnp.arange(num_bins, dtype=jnp.float32) + 0.5) / num_bins
    return jnp.exp(lo + (hi - lo) * position) * focal_ratio(intrinsics, width, focal_canonical)[..., None]


def reachable_depths(
    fx: Array,
    width: int,
    *,
    min_depth: float,
    max_depth: float,
    focal_canonical: float,
    focal_range: tuple[float, float],
) -> tuple[Array, Array]:
    """Nearest and farthest depth in metres (outer bin edges) for a camera of focal length fx pixels at `width`."""
    lo, hi = canonical_range(min_depth, max_depth, focal_canonical, focal_range)
    ratio = fx / (focal_canonical * width / FOCAL_WIDTH)
    return lo * ratio, hi * ratio


def check_focals(
    intrinsics: np.ndarray,
    width: int,
    names: Sequence[str],
    *,
    min_depth: float,
    max_depth: float,
    focal_canonical: float,
    focal_range: tuple[float, float],
) -> list[str]:
    """One warning per camera whose focal length lies outside `focal_range`; empty when all are inside.

    Args:
      intrinsics: [N, 3, 3] pixels at network `width`.
      names: N camera names.
    """
    warnings = []
    f_min, f_max = focal_range
    for name, fx in zip(names, np.asarray(intrinsics, np.float64)[:, 0, 0], strict=True):
        focal = float(fx) * FOCAL_WIDTH / width
        if f_min * (1 - 1e-6) <= focal <= f_max * (1 + 1e-6):  # float32 intrinsics of exactly the configured focal
            continue
        near, far = reachable_depths(
            float(fx), width, min_depth=min_depth, max_depth=max_depth, focal_canonical=focal_canonical,
            focal_range=focal_range,
        )  # fmt: skip
        warnings.append(
            f"camera {name}: focal length {focal:.1f} px (at width {FOCAL_WIDTH}) is outside model.focal_range"
            f" ({f_min:g}, {f_max:g}); it can reach {near:.3g} to {far:.4g} m of the wanted {min_depth:g} to"
            f" {max_depth:g} m"
        )
    return warnings


def resize_depth(depth: Array, height: int, width: int) -> Array:
    """Depth [..., h, w] -> [..., height, width], bilinear with half-pixel centres."""
    return interpolate.resize_taps(depth[..., None], height, width, "bilinear")[..., 0]


def log_choose(num_bins: int) -> np.ndarray:
    """log C(K-1, k) [K] float64 for k = 0 ... K-1."""
    n = num_bins - 1
    return np.array([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(num_bins)])


def log_binomial_logits(logit: Array, temperature: Array, num_bins: int) -> Array:
    """Logits [..., K] of a binomial over the bins (Bhat et al., ZoeDepth, 2023).

    log C(K-1, k) + k log q + (K-1-k) log(1-q), over the temperature; a constant over k is left out.

    Args:
      logit: [...], log(q / (1 - q)); temperature: [...], positive.
    """
    k = jnp.arange(num_bins, dtype=jnp.float32)
    return (jnp.asarray(log_choose(num_bins), jnp.float32) + k * logit[..., None]) / temperature[..., None]


def attract(positions: Array, attractors: Array, alpha: float = ALPHA) -> Array:
    """Moves positions [..., K] towards attractors [..., A]: c + mean_a (a - c) / (1 + alpha (a - c)^2).

    ZoeDepth's inverse attractor (gamma 2), mean over attractors. With both in [0, 1] the result stays there and stays
    ascending (not strictly): each term moves c at most onto a, and the map's slope is in [0, 9/8].
    """
    difference = attractors[..., :, None] - positions[..., None, :]  # [..., A, K], fused into the mean by XLA
    return positions + jnp.mean(difference / (1.0 + alpha * difference * difference), -2)


def _spread_logits(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Bias that spreads sigmoid outputs evenly over (0, 1), so that attractors start apart."""
    place = (np.arange(shape[0]) + 0.5) / shape[0]
    return jnp.asarray(np.log(place / (1 - place)), dtype)


class DepthBins(nn.Module):
    """Bin probabilities and metric bin centers from features; float32 throughout.

    Attributes:
      bins: `log` | `linear` (adaptive widths), `uniform` | `sid` (fixed edges), `attractor` (adaptive, per pixel).
      probabilities: `softmax` | `log_binomial`.
      num_bins: K.
      depth_range: canonical [lo, hi] in metres (`canonical_range`).
      hidden: inner width of the networks that predict widths and attractors.
      attractors: number of attractors at each decoder level, coarse to fine.
    """

    bins: str = "log"
    probabilities: str = "softmax"
    num_bins: int = 64
    depth_range: tuple[float, float] = (0.1, 80.0)
    hidden: int = 128
    attractors: tuple[int, ...] = (16, 8, 4, 1)

    @nn.compact
    def __call__(
        self, features: Array, descriptor: Array, focal_ratio: Array, levels: Sequence[Array] = ()
    ) -> dict[str, Array]:
        """Runs the head; leading dimensions [...] are free (e.g. [B, N] or [B * N]).

        Args:
          features: [..., h, w, C] that the probabilities are predicted from.
          descriptor: [..., C'] pooled, one per view, that the widths are predicted from.
          focal_ratio: [...] fx / f_0 of each view.
          levels: features [..., h_i, w_i, C_i] of the decoder, coarse to fine, the last at h x w; `attractor` only.

        Returns:
          `bin_logits` [..., h, w, K]; `bin_centers` [..., 1, 1, K], or [..., h, w, K] for `attractor`, metres, nearest
          first; `view_bin_centers` [..., K] metres, one set per view (before attraction).
        """
        if self.bins not in BINS or self.probabilities not in PROBABILITIES:
            raise ValueError(
                f"bins {self.bins!r} / probabilities {self.probabilities!r}: expected {BINS} / {PROBABILITIES}"
            )
        features, ratio = features.astype(jnp.float32), focal_ratio.astype(jnp.float32)
        position = self._positions(descriptor.astype(jnp.float32))  # [..., K]
        view_centers = self._to_depth(position) * ratio[..., None]
        if self.bins == "attractor":
            pixel_position = self._attracted(position[..., None, None, :], levels)
            if pixel_position.shape[-3:-1] != features.shape[-3:-1]:
                raise ValueError(
                    f"the last level has size {pixel_position.shape[-3:-1]}, features {features.shape[-3:-1]}"
                )
            centers = self._to_depth(pixel_position) * ratio[..., None, None, None]
        else:
            centers = view_centers[..., None, None, :]
        return {"bin_logits": self._logits(features), "bin_centers": centers, "view_bin_centers": view_centers}

    def _positions(self, descriptor: Array) -> Array:
        """Centers [..., K] as positions in (0, 1) of the range, ascending."""
        k = self.num_bins
        if self.bins in ("uniform", "sid"):
            return jnp.broadcast_to((jnp.arange(k, dtype=jnp.float32) + 0.5) / k, (*descriptor.shape[:-1], k))
        x = nn.relu(nn.Dense(self.hidden, precision=_HIGHEST, name="widths_hidden")(descriptor))
        # Zero-initialised: equal widths at the start, whatever the picture.
        x = nn.Dense(k, precision=_HIGHEST, kernel_init=nn.initializers.zeros, name="widths_out")(x)
        width = nn.softplus(x) + 1e-3
        width = width / jnp.sum(width, -1, keepdims=True)
        return jnp.cumsum(width, -1) - 0.5 * width

    def _to_depth(self, position: Array) -> Array:
        """Position in (0, 1) of the range -> canonical depth in metres."""
        lo, hi = self.depth_range
        if self.bins in ("linear", "uniform"):
            return lo + (hi - lo) * position
        return jnp.exp(math.log(lo) + (math.log(hi) - math.log(lo)) * position)

    def _attracted(self, position: Array, levels: Sequence[Array]) -> Array:
        """Positions [..., 1, 1, K] -> [..., h, w, K], moved by each level's attractors in turn."""
        if len(levels) != len(self.attractors):
            raise ValueError(f"attractor bins need {len(self.attractors)} decoder levels, got {len(levels)}")
        for i, (count, level) in enumerate(zip(self.attractors, levels, strict=True)):
            x = nn.Dense(self.hidden, precision=_HIGHEST, name=f"attractor_{i}_hidden")(level.astype(jnp.float32))
            x = nn.Dense(
                count, precision=_HIGHEST, kernel_init=nn.initializers.zeros, bias_init=_spread_logits,
                name=f"attractor_{i}_out",
            )(nn.relu(x))  # fmt: skip
            if i > 0:
                position = interpolate.resize(position, level.shape[-3], level.shape[-2], "bilinear")
            position = attract(position, nn.sigmoid(x))
        return position

    def _logits(self, features: Array) -> Array:
        """Logits [..., h, w, K]."""
        if self.probabilities == "softmax":
            return nn.Dense(self.num_bins, precision=_HIGHEST, name="logits")(features)
        x = nn.relu(nn.Dense(2 * features.shape[-1], precision=_HIGHEST, name="binomial_hidden")(features))
        x = nn.Dense(2, precision=_HIGHEST, name="binomial_out")(x)
        low, high = TEMPERATURES
        temperature = low + (high - low) * nn.sigmoid(x[..., 1])
        return log_binomial_logits(x[..., 0], temperature, self.num_bins)
