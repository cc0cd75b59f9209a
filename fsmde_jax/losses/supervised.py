"""Supervision from sparse LiDAR: SILog on depths and a chamfer term on bin centers (docs/method.md, section 3).

Both take a mask of valid labels, compute in float32, and give a finite value and gradient for every mask, also for one
without a single valid pixel.
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = Any  # jax.Array


def silog(pred: Array, target: Array, mask: Array, *, lam: float = 0.85) -> Array:
    """Scale-invariant log error, per rig and then averaged over rigs.

    The valid pixels of all cameras of a rig are pooled: e = log pred - log target,
    sqrt(mean e^2 - lam (mean e)^2). Pooling keeps the cameras on one common scale, which a term per view would not.
    Rigs without a valid pixel are left out of the mean; where the root is zero its gradient is zero.

    Source: Eigen et al., NeurIPS 2014, with the square root and lam = .85 of AdaBins (CVPR 2021).

    Args:
      pred: [B, N, H, W] metres, positive where `mask` is set (elsewhere it is not looked at).
      target: [B, N, H, W] metres, positive where `mask` is set.
      mask: [B, N, H, W] bool, True = valid label.
      lam: 1 ignores a common scale of the rig altogether, 0 gives the plain RMS log error.

    Returns:
      Scalar float32.
    """
    if not pred.shape == target.shape == mask.shape or pred.ndim != 4:
        raise ValueError(f"silog: expected equal [B, N, H, W] shapes, got {pred.shape}, {target.shape}, {mask.shape}")
    mask = mask.astype(bool)
    pred = jnp.where(mask, pred.astype(jnp.float32), 1.0)
    target = jnp.where(mask, target.astype(jnp.float32), 1.0)
    error = jnp.log(pred) - jnp.log(target)  # zero where masked
    axes = (1, 2, 3)
    count = mask.sum(axes, dtype=jnp.float32)
    safe_count = jnp.maximum(count, 1.0)
    mean = error.sum(axes) / safe_count
    # mean e^2 - lam (mean e)^2 as two terms that cannot be negative: no cancellation in float32
    centred = jnp.where(mask, error - mean[:, None, None, None], 0.0)
    inner = jnp.square(centred).sum(axes) / safe_count + (1.0 - lam) * jnp.square(mean)
    positive = ~(inner <= 0) & (count > 0)  # written so that a NaN stays a NaN
    root = jnp.where(positive, jnp.sqrt(jnp.where(positive, inner, 1.0)), 0.0)
    return root.sum() / jnp.maximum((count > 0).sum(), 1)


def bin_chamfer(view_bin_centers: Array, target: Array, mask: Array) -> Array:
    """Chamfer distance between a view's bin centers and its labels, squared, on log depth.

    Per view: mean over centers of the squared distance to the nearest label, plus mean over valid labels of the squared
    distance to the nearest center; then the mean over views that have a label. The K x H x W distances are never
    formed: labels are sorted into the intervals between centers (binary search), where only an interval's smallest and
    largest label can be nearest to a center.

    Source: AdaBins, section 3.2, with log depth in place of depth.

    Args:
      view_bin_centers: [B, N, K] metres, positive, in any order.
      target: [B, N, H, W] metres, positive where `mask` is set.
      mask: [B, N, H, W] bool, True = valid label.

    Returns:
      Scalar float32; differentiable with respect to the centers.
    """
    if target.ndim != 4 or mask.shape != target.shape or view_bin_centers.shape[:2] != target.shape[:2]:
        raise ValueError(
            "bin_chamfer: expected [B, N, K] and twice [B, N, H, W], got"
            f" {view_bin_centers.shape}, {target.shape}, {mask.shape}"
        )
    views = target.shape[0] * target.shape[1]
    valid = mask.astype(bool).reshape(views, -1)
    labels = jnp.log(jnp.where(valid, target.astype(jnp.float32).reshape(views, -1), 1.0))
    centers = jnp.log(jnp.sort(view_bin_centers.astype(jnp.float32).reshape(views, -1), axis=-1))
    per_view = jax.vmap(_chamfer_of_view)(centers, jax.lax.stop_gradient(labels), valid)
    has_labels = valid.any(-1)
    return jnp.where(has_labels, per_view, 0.0).sum() / jnp.maximum(has_labels.sum(), 1)


def _chamfer_of_view(centers: Array, labels: Array, valid: Array) -> Array:
    """One view: ascending log centers [K], log labels [P], valid [P]; finite but meaningless without a label."""
    count = centers.shape[0]
    fixed = jax.lax.stop_gradient(centers)
    interval = jnp.searchsorted(fixed, labels)  # label lies in (center[interval - 1], center[interval]]

    # label -> nearest center: one of its interval's two ends
    below, above = jnp.maximum(interval - 1, 0), jnp.minimum(interval, count - 1)
    nearest = jnp.where(labels - fixed[below] <= fixed[above] - labels, below, above)
    nearest = jnp.where(interval == 0, 0, jnp.where(interval == count, count - 1, nearest))
    to_center = jnp.where(valid, jnp.square(centers[nearest] - labels), 0.0).sum() / jnp.maximum(valid.sum(), 1)

    # center -> nearest label: the largest label of all intervals below it or the smallest of all above it
    empty = jnp.full((count + 1,), jnp.inf, jnp.float32)
    largest = (-empty).at[interval].max(jnp.where(valid, labels, -jnp.inf))
    smallest = empty.at[interval].min(jnp.where(valid, labels, jnp.inf))
    lower = jax.lax.cummax(largest)[:-1]
    upper = jax.lax.cummin(smallest, reverse=True)[1:]
    label = jnp.where(fixed - lower <= upper - fixed, lower, upper)
    label = jax.lax.stop_gradient(jnp.where(jnp.isfinite(label), label, fixed))
    return jnp.square(centers - label).mean() + to_center
