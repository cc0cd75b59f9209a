"""The training losses as functions of model outputs and batch: the sum of the terms, and the terms by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from fsmde_jax.losses import baselines, distill, relational, relative, supervised

Array = Any  # jax.Array
Terms = dict[str, Array]

RELATIONS = ("tokens", "gram", "bins")
OF_LABELS = ("silog", "chamfer", "ckd_cross")  # terms that are 0 where `valid_pixels` is, whatever the student says


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
) -> tuple[Array, Terms]:
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


@dataclasses.dataclass(frozen=True)
class DistillWeights:
    """Weights and variants of what a teacher teaches (docs/method.md, sections 4 to 6); weight 0 leaves a term out.

    Attributes:
      w_ckd: of L_CKD = w_prob L_prob + w_cross L_cross; tau: temperature of L_prob.
      w_vr: of L_VRKD; relation: one of `RELATIONS`; tau_r: its temperature; tokens: grid of a view, rows x columns;
        center: see `relational.normalise_tokens`; intra: relations within a view, too.
      expectation: how the student's depth comes from its bins (`expectation.expected_depth`).
      baseline: another method, a key of `baselines.BASELINES`, "" = none; w_baseline: its weight.
    """

    w_ckd: float = 0.0
    w_prob: float = 1.0
    w_cross: float = 1.0
    tau: float = 1.0
    expectation: str = "log"
    w_vr: float = 0.0
    relation: str = "tokens"
    tau_r: float = 0.1
    tokens: tuple[int, int] = (6, 10)
    center: str = "rig"
    intra: bool = False
    baseline: str = ""
    w_baseline: float = 1.0


class Signal(NamedTuple):
    """What a teacher says about a batch, at the student's head resolution h x w; nothing of it takes a gradient.

    `fsmde_jax.distillation` makes it. A pytree; None = not needed.
    """

    mask: Array  # [B, N, h, w] bool: pixels whose logits say something
    visible: Array  # [B, N, h, w] bool: not the ego body, camera present, the teacher's map of the view not constant
    logits: Array | None = None  # [B, N, h, w, K], nearest bin first
    tokens: Array | None = None  # [B, N, h', w', C] feature map of one tap
    rel_inv_depth: Array | None = None  # [B, N, h', w'], larger = nearer


def distillation_loss(
    outputs: Mapping[str, Array],
    batch: Mapping[str, Array],
    signal: Signal,
    weights: DistillWeights,
    *,
    min_depth: float,
    max_depth: float,
    silog_lambda: float,
) -> tuple[Array, Terms]:
    """w_ckd L_CKD + w_vr L_VRKD + w_baseline L_baseline: what the teacher adds to `supervised_loss`.

    Args:
      outputs: of the student: `bin_logits` [B, N, h, w, K], `bin_centers`, `pred_depth`, `features`
        [B, N, h', w', C]; for a baseline with a projector `projected` [B, N, h', w', C of the teacher].
      batch: as `supervised_loss`, and `cam_to_ego`, `intrinsics`.
      signal: of the teacher.
      weights: `DistillWeights`.
      min_depth, max_depth, silog_lambda: as `supervised_loss`.

    Returns:
      (loss, terms): a float32 scalar, and unweighted scalars for the log: `ckd`, `ckd_prob`, `ckd_cross`, `vrkd` and
      the baseline's name, each where used.
    """
    loss = jnp.zeros((), jnp.float32)
    terms: Terms = {}
    if weights.w_ckd:
        value, terms = distill.ckd_loss(
            outputs["bin_logits"], outputs["bin_centers"], signal.logits, signal.mask, batch["depth"],
            label_mask(batch, min_depth=min_depth, max_depth=max_depth), w_prob=weights.w_prob,
            w_cross=weights.w_cross, tau=weights.tau, expectation=weights.expectation,
            silog_lambda=silog_lambda,
        )  # fmt: skip
        loss = loss + weights.w_ckd * value
    if weights.w_vr:
        terms["vrkd"] = _relation(outputs, batch, signal, weights)
        loss = loss + weights.w_vr * terms["vrkd"]
    if weights.baseline and weights.w_baseline:
        terms[weights.baseline] = _baseline(outputs, batch, signal, weights)
        loss = loss + weights.w_baseline * terms[weights.baseline]
    return loss, terms


def _relation(
    outputs: Mapping[str, Array], batch: Mapping[str, Array], signal: Signal, weights: DistillWeights
) -> Array:
    width = batch["images"].shape[3]
    pairs = relational.adjacent_pairs(
        batch["cam_to_ego"], batch["intrinsics"], width, batch["view_mask"], intra=weights.intra
    )
    grid, pixels = weights.tokens, signal.mask if weights.relation == "bins" else signal.visible
    mask = relational.token_mask(pixels, grid)
    if weights.relation == "bins":
        student, teacher = (relational.bin_tokens(z, pixels, grid) for z in (outputs["bin_logits"], signal.logits))
    else:
        student, teacher = (relational.tokens_of(x, grid) for x in (outputs["features"], signal.tokens))
    if weights.relation == "gram":
        return relational.gram_loss(student, teacher, pairs, mask, center=weights.center)
    return relational.relation_loss(student, teacher, pairs, mask, tau_r=weights.tau_r, center=weights.center)


def _baseline(
    outputs: Mapping[str, Array], batch: Mapping[str, Array], signal: Signal, weights: DistillWeights
) -> Array:
    method = baselines.baseline(weights.baseline)
    if method.needs == "logits":
        return method.loss(outputs["bin_logits"], signal.logits, signal.mask)
    if method.needs == "rel_inv_depth":
        visible = batch["ego_mask"].astype(bool) & batch["view_mask"].astype(bool)[:, :, None, None]
        return method.loss(outputs["pred_depth"], signal.rel_inv_depth, visible)
    # CIRKD's relations are between tokens, as view-relational distillation's.
    options = {"grid": weights.tokens, "tau": weights.tau_r} if weights.baseline == "cirkd" else {}
    features = outputs["projected" if method.projector else "features"]
    return method.loss(features, signal.tokens, signal.visible, **options)


def relative_depth_loss(
    outputs: Mapping[str, Array], batch: Mapping[str, Array], *, gradient_weight: float
) -> tuple[Array, Terms]:
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
