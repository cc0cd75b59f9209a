"""The training losses as functions of model outputs and batch: the sum of the terms, and the terms by name."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from fsmde_jax.losses import relative, supervised

Array = Any  # jax.Array


def label_mask(batch: Mapping[str, Array], *, min_depth: float, max_depth: float) -> Array:
    """Pixels [B, N, H, W] bool whose label may train: depth strictly in range, not the ego body, camera present."""
    depth = batch["depth"]
    in_range = (depth > min_depth) & (depth < max_depth)
    return in_range & batch["ego_mask"].astype(bool) & batch["view_mask"].astype(bool)[:, :, None, None]


def supervised_loss(
    outputs: Mapping[str, Array],
    batch: Mapping[str, Array],
    *,
    min_depth: float,
    max_depth: float,
    silog_lambda: float,
    chamfer_weight: float,
) -> tuple[Array, dict[str, Array]]:
    """L_sup = SILog(pred_depth, depth) + chamfer_weight * chamfer(view_bin_centers, depth).

    Args:
      outputs: of the student: `pred_depth` [B, N, H, W] metres and `view_bin_centers` [B, N, K] metres.
      batch: `depth` [B, N, H, W] metres (0 = none), `ego_mask` [B, N, H, W] bool (True = not the ego body), `view_mask`
        [B, N] bool.
      min_depth: labels outside (min_depth, max_depth), metres, are not used.
      max_depth: likewise.
      silog_lambda: see `supervised.silog`.
      chamfer_weight: 0 leaves the chamfer term out of the program altogether.

    Returns:
      (loss, terms): a float32 scalar, and scalars for the log: `loss`, `silog`, `chamfer` (where used) and
      `valid_pixels`, the number of labels that counted.
    """
    pred_depth, depth = outputs["pred_depth"], batch["depth"]
    if pred_depth.shape != depth.shape or batch["ego_mask"].shape != depth.shape:
        raise ValueError(
            f"supervised_loss: pred_depth {pred_depth.shape}, depth {depth.shape} and ego_mask"
            f" {batch['ego_mask'].shape} must agree"
        )
    mask = label_mask(batch, min_depth=min_depth, max_depth=max_depth)
    terms = {"silog": supervised.silog(pred_depth, depth, mask, lam=silog_lambda)}
    loss = terms["silog"]
    if chamfer_weight:
        terms["chamfer"] = supervised.bin_chamfer(outputs["view_bin_centers"], depth, mask)
        loss = loss + chamfer_weight * terms["chamfer"]
    terms["loss"] = loss
    terms["valid_pixels"] = mask.sum(dtype=jnp.float32)
    return loss, terms


def relative_depth_loss(
    outputs: Mapping[str, Array], batch: Mapping[str, Array], *, gradient_weight: float
) -> tuple[Array, dict[str, Array]]:
    """Scale-and-shift-invariant loss of a relative network (`relative.relative_loss`).

    Args:
      outputs: `rel_inv_depth` [B, N, H, W], larger = nearer.
      batch: `dense_depth` [B, N, H, W] metres, where 0 is sky and counts as infinitely far; without it the sparse
        `depth`, where 0 says nothing; `ego_mask` [B, N, H, W] and `view_mask` [B, N] bool.
      gradient_weight: see `relative.relative_loss`.

    Returns:
      (loss, terms).
    """
    dense = "dense_depth" in batch
    visible = batch["ego_mask"].astype(bool) & batch["view_mask"].astype(bool)[:, :, None, None]
    target, valid = relative.inverse_depth_target(
        batch["dense_depth" if dense else "depth"], visible, zero_is_far=dense
    )
    return relative.relative_loss(outputs["rel_inv_depth"], target, valid, gradient_weight=gradient_weight)
