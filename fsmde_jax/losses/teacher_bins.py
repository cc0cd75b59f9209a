"""Bin distributions of a frozen teacher, made inside the step: what the student's bin head learns from.

Pure functions in float32, to be called inside jit. The order is fixed: the teacher's map is resized to the student's
head resolution, THEN normalised per view, THEN binned. Bins run from nearest to farthest, as the student's do.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fsmde_jax import interpolate

Array = Any  # jax.Array

PERCENTS = (2, 98)  # of a view's unmasked pixels: the ends of the normalised range
MIN_TEACHER_DEPTH = 1e-3  # metres; a metric teacher's sigmoid may underflow to 0, whose inverse is not finite
LABEL_PERCENTS = (5, 95)  # of a view's labels: where a map of unknown scale and shift is tied to them
MIN_LABELS = 10  # of a view: the alignment to fewer is not trusted
_ROUNDING = 1e-6  # about 8 units in the last place of float32


def resize_rel_inv_depth(r: Array, h: int, w: int) -> Array:
    """Teacher map [B, N, H, W] -> [B, N, h, w] float32; per axis area weights when it shrinks, bilinear otherwise.

    For relative inverse depth and for a metric teacher's depth alike.
    """
    if r.ndim != 4:
        raise ValueError(f"resize_rel_inv_depth: expected [B, N, H, W], got {r.shape}")
    x = r.astype(jnp.float32)[..., None]
    x = interpolate.resize_taps(x, h, x.shape[-2], "area" if h < x.shape[-3] else "bilinear")
    return interpolate.resize_taps(x, h, w, "area" if w < x.shape[-2] else "bilinear")[..., 0]


def resize_mask(mask: Array, h: int, w: int) -> Array:
    """Mask [B, N, H, W] bool (True = visible) -> [B, N, h, w] bool: True where every contributing pixel is visible.

    The weights are those of `resize_rel_inv_depth`: a map of the mask's size has nothing of the car's own body left
    there. As in the data pipeline, a partly hidden pixel counts as hidden.
    """
    return resize_rel_inv_depth(~mask.astype(bool), h, w) < 1e-3  # not 0: area weights may overlap by a rounding error


def inverse_depth(depth: Array) -> Array:
    """Metric teacher: depth [...] in metres -> r = 1 / depth [...] float32, 1/m; finite for depth 0."""
    return 1.0 / jnp.maximum(depth.astype(jnp.float32), MIN_TEACHER_DEPTH)


def masked_percentiles(values: Array, mask: Array, percents: Sequence[int]) -> Array:
    """Percentiles over the last axis, of the unmasked entries only, with linear interpolation as `numpy.percentile`.

    Shapes are static and rows may have any number of unmasked entries; a row without one gives 0.

    Args:
      values: [..., P]; what is masked is not looked at.
      mask: [..., P] bool, True = counts.
      percents: whole numbers in [0, 100]; whole, so that positions are exact integers and not rounded in float32.

    Returns:
      [..., len(percents)] float32.
    """
    mask = mask.astype(bool)
    ordered = jnp.sort(jnp.where(mask, values.astype(jnp.float32), jnp.inf), axis=-1)
    count = mask.sum(-1, keepdims=True)
    hundredths = jnp.maximum(count - 1, 0) * jnp.asarray(percents, jnp.int32)  # of a position, [..., len(percents)]
    below = hundredths // 100
    above = jnp.minimum(below + 1, jnp.maximum(count - 1, 0))
    low, high = (jnp.where(count > 0, jnp.take_along_axis(ordered, i, axis=-1), 0.0) for i in (below, above))
    return low + (hundredths % 100).astype(jnp.float32) / 100.0 * (high - low)


def soft_assign(rel_inv_depth: Array, *, num_bins: int, tau_bin: float, mask: Array) -> tuple[Array, Array]:
    """Bin logits of a teacher's map: scale-invariant, without training (docs/method.md, section 2).

    Per view u = clip((r - q_lo) / (q_hi - q_lo), 0, 1) with q the 2nd and 98th percentile (linear) of the unmasked
    pixels; logits -|u - a_k| / tau_bin at the anchors a_k = 1 - (k + .5) / K. Nothing changes under r -> s r + t with
    s > 0, beyond what float32 rounds off when |t| exceeds the spread of s r many times. There is no eps in the
    division: a view whose spread is zero has no distribution and is reported by `view_valid`. So is one whose spread is
    within float32's rounding of r, since a constant map is not quite constant after resizing.

    Args:
      rel_inv_depth: r [B, N, h, w] at head resolution, larger = nearer, any float dtype; a metric teacher's depth goes
        through `inverse_depth` first.
      num_bins: K.
      tau_bin: temperature in units of u; 1 / K spreads a pixel over a few bins.
      mask: [B, N, h, w] bool, True = neither ego body nor padding. Sky stays in.

    Returns:
      (logits [B, N, h, w, K] float32, nearest bin first; view_valid [B, N] bool). Masked pixels and the views that are
      not valid have logits 0 (a uniform distribution that says nothing) and gradient 0: losses leave them out.
    """
    if rel_inv_depth.ndim != 4 or mask.shape != rel_inv_depth.shape:
        raise ValueError(f"soft_assign: expected equal [B, N, h, w] shapes, got {rel_inv_depth.shape}, {mask.shape}")
    if num_bins < 2 or not tau_bin > 0:
        raise ValueError(f"soft_assign: num_bins must be at least 2 and tau_bin positive, got {num_bins}, {tau_bin}")
    u, view_valid = _normalised(rel_inv_depth, mask.astype(bool))
    anchors = 1.0 - (np.arange(num_bins, dtype=np.float32) + 0.5) / num_bins
    logits = -jnp.abs(u[..., None] - anchors) / tau_bin
    says = mask.astype(bool) & view_valid[..., None, None]
    return jnp.where(says[..., None], logits, 0.0), view_valid


def varies(rel_inv_depth: Array, mask: Array) -> Array:
    """Views [B, N] bool whose teacher says anything: those that `soft_assign` has a distribution for."""
    return _normalised(rel_inv_depth, mask.astype(bool))[1]


def _normalised(rel_inv_depth: Array, mask: Array) -> tuple[Array, Array]:
    """u [B, N, h, w] of `soft_assign`, and its view_valid [B, N]."""
    flat_mask = mask.reshape(*mask.shape[:2], -1)
    r = rel_inv_depth.astype(jnp.float32).reshape(flat_mask.shape)
    any_pixel = flat_mask.any(-1, keepdims=True)
    # The smallest value goes first: the difference is exact where r varies little about a large value. u does not
    # depend on it, so neither does its gradient.
    lowest = jnp.min(jnp.where(flat_mask, r, jnp.inf), -1, keepdims=True)
    lowest = jax.lax.stop_gradient(jnp.where(any_pixel, lowest, 0.0))
    x = jnp.where(flat_mask, r - lowest, 0.0)
    quantiles = masked_percentiles(x, flat_mask, PERCENTS)
    q_lo, q_hi = quantiles[..., :1], quantiles[..., 1:]
    spread = q_hi - q_lo
    magnitude = jnp.max(jnp.abs(lowest + quantiles), -1, keepdims=True)
    view_valid = ~(spread <= _ROUNDING * magnitude)  # written so that a NaN stays a NaN
    u = jnp.clip((x - q_lo) / jnp.where(view_valid, spread, 1.0), 0.0, 1.0).reshape(mask.shape)
    return u, view_valid[..., 0]


def align_to_labels(
    rel_inv_depth: Array, depth: Array, mask: Array, *, min_depth: float, max_depth: float, shift: bool = True
) -> tuple[Array, Array]:
    """A teacher's map in metres, per view, in closed form; clipped to the range.

    With `shift`, for a map of unknown scale and shift: 1 / (s r + t), s and t such that over the labels the 5th and the
    95th percentile of s r + t are those of the labels' inverse depth. Nothing changes under r -> a r + b with a > 0.
    Percentiles, since least squares of the relative error, D (s r + t) - 1, lets a few far labels bend the whole view,
    and shrinks the contrast of the map by its correlation with what it is fitted to (docs/method.md has figures). Which
    pixel is nearer is the teacher's word alone: a map of depth instead of inverse depth is not noticed. Labels that lie
    in a small part of the map's range alone, or a wrong one among few, stretch or bend the rest of the view.

    Without, for a map that is inverse depth up to a scale: s / r, s the median of D r over the labels. Nothing changes
    under r -> a r.

    Args:
      rel_inv_depth: r [B, N, h, w] at head resolution, larger = nearer; positive without `shift`.
      depth: labels D [B, N, H, W] metres.
      mask: [B, N, H, W] bool, True = valid label. What is masked is not looked at.
      min_depth, max_depth: metres.
      shift: whether r has an unknown shift as well as an unknown scale.

    Returns:
      (depth [B, N, h, w] float32 metres; view_valid [B, N] bool: False where fewer than `MIN_LABELS` labels say where
      the view is, or r or the labels do not vary over them). Neither carries a gradient.
    """
    if rel_inv_depth.ndim != 4 or depth.shape != mask.shape or depth.shape[:2] != rel_inv_depth.shape[:2]:
        raise ValueError(
            "align_to_labels: expected r [B, N, h, w] and labels with their mask [B, N, H, W], got"
            f" {rel_inv_depth.shape}, {depth.shape}, {mask.shape}"
        )
    mask = mask.astype(bool)
    r = jax.lax.stop_gradient(rel_inv_depth.astype(jnp.float32))
    r = jnp.where(jnp.isfinite(r), r, jnp.nan)  # clipping would make a depth of an infinite value
    d = jnp.where(mask, depth.astype(jnp.float32), 1.0)
    inverse, fits = (_with_shift if shift else _scaled)(r, d, mask)
    view_valid = fits & (mask.sum((2, 3), keepdims=True) >= MIN_LABELS)
    inverse = jnp.where(view_valid, inverse, 1.0 / max_depth)
    return 1.0 / jnp.clip(inverse, 1.0 / max_depth, 1.0 / min_depth), view_valid[..., 0, 0]


def _at_labels(r: Array, mask: Array) -> Array:
    return interpolate.resize_taps(r[..., None], mask.shape[2], mask.shape[3], "bilinear")[..., 0]


def _over_labels(values: Array, mask: Array, percents: Sequence[int]) -> list[Array]:
    """Percentiles [B, N, 1, 1] of values [B, N, H, W], each."""
    views = mask.shape[:2]
    found = masked_percentiles(values.reshape(*views, -1), mask.reshape(*views, -1), percents)
    return [found[..., i, None, None] for i in range(len(percents))]


def _scaled(r: Array, d: Array, mask: Array) -> tuple[Array, Array]:
    """Inverse depth r / s, and which views have an s."""
    (middle,) = _over_labels(d * _at_labels(r, mask), mask, (50,))
    fits = ~(middle <= 0)  # written so that a NaN stays a NaN
    return r / jnp.where(fits, middle, 1.0), fits


def _with_shift(r: Array, d: Array, mask: Array) -> tuple[Array, Array]:
    """Inverse depth s r + t, and which views have such a map."""
    axes = (2, 3)
    largest = jnp.max(jnp.abs(r), axes, keepdims=True)
    r = r - r.min(axes, keepdims=True)  # exact where r varies little about a large value
    low, high = _over_labels(_at_labels(r, mask), mask, LABEL_PERCENTS)
    far, near = _over_labels(1.0 / d, mask, LABEL_PERCENTS)
    # Written so that a NaN stays a NaN.
    fits = ~((high - low <= _ROUNDING * largest) | (near - far <= _ROUNDING * near))
    return far + (near - far) / jnp.where(fits, high - low, 1.0) * (r - low), fits


def assign_depth(depth: Array, anchors: Array, *, tau_bin: float) -> Array:
    """Bin logits -|log d - log a_k| / (tau_bin x bin width) of depth at anchors that are evenly spaced in log-depth.

    Args:
      depth: [B, N, h, w] metres, positive.
      anchors: [B, N, K] metres, ascending; K at least 2.
      tau_bin: temperature in units of a bin's width in log-depth.

    Returns:
      [B, N, h, w, K] float32, nearest bin first.
    """
    if depth.ndim != 4 or anchors.shape[:2] != depth.shape[:2] or anchors.ndim != 3 or anchors.shape[-1] < 2:
        raise ValueError(f"assign_depth: expected [B, N, h, w] and [B, N, K], got {depth.shape}, {anchors.shape}")
    if not tau_bin > 0:
        raise ValueError(f"assign_depth: tau_bin must be positive, got {tau_bin}")
    log_anchors = jnp.log(anchors.astype(jnp.float32))[:, :, None, None, :]
    width = (log_anchors[..., -1:] - log_anchors[..., :1]) / (anchors.shape[-1] - 1)
    return -jnp.abs(jnp.log(depth.astype(jnp.float32))[..., None] - log_anchors) / (tau_bin * width)


def two_hot(depth: Array, centers: Array, *, smoothing: float = 0.01) -> Array:
    """Bin probabilities of a metric teacher's depth on the student's own centers.

    A depth between two centers is split over them so that sum_k p_k c_k is the depth (linear in depth whatever the
    spacing of the centers); outside the centers it belongs to the end bin. Then p (1 - smoothing) + smoothing / K. The
    centers are data here (`stop_gradient`): this term must not move them.

    Source: two-hot targets of distributional value learning (Schrittwieser et al., MuZero, 2020), label smoothing of
    Szegedy et al. (2016). The uniform part pulls the expectation towards the mean center, so it is small here.

    Args:
      depth: [B, N, h, w] metres at head resolution, finite.
      centers: metres, ascending (equal neighbours allowed), [B, N, 1, 1, K] or [B, N, h, w, K].
      smoothing: in [0, 1); positive where the logarithm of p is taken.

    Returns:
      p [B, N, h, w, K] float32; logits are log p.
    """
    if depth.ndim != 4 or centers.ndim != 5 or centers.shape[:2] != depth.shape[:2]:
        raise ValueError(f"two_hot: expected [B, N, h, w] and [B, N, 1, 1, K], got {depth.shape}, {centers.shape}")
    if centers.shape[2:4] not in ((1, 1), depth.shape[2:]):
        raise ValueError(f"two_hot: centers {centers.shape} fit neither one view nor pixels of depth {depth.shape}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"two_hot: smoothing must be in [0, 1), got {smoothing}")
    d = depth.astype(jnp.float32)[..., None]
    c = jax.lax.stop_gradient(centers.astype(jnp.float32))
    gap = c[..., 1:] - c[..., :-1]
    # How far the depth has gone through each interval between centers: 1, ..., 1, a fraction, 0, ..., 0.
    offset = d - c[..., :-1]
    fraction = jnp.where(gap > 0, offset / jnp.where(gap > 0, gap, 1.0), jnp.where(offset < 0, 0.0, 1.0))
    passed = jnp.clip(fraction, 0.0, 1.0)
    edge = jnp.ones_like(d)
    p = jnp.concatenate([edge, passed], -1) - jnp.concatenate([passed, 0.0 * edge], -1)
    return p * (1.0 - smoothing) + smoothing / p.shape[-1]
