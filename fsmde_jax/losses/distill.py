"""Cross-interaction knowledge distillation, CKD (docs/method.md, section 4).

What the paper's abstract states: the student learns the scale-invariant depth bin probabilities of a foundation model,
while ground-truth depth guides it to metric bin centers. The equations below are our reading of that. They compute in
float32, take masks as arguments, and give a finite value and gradient for every mask. No gradient reaches the teacher.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fsmde_jax import interpolate
from fsmde_jax.expectation import expected_depth
from fsmde_jax.losses.supervised import silog

Array = Any  # jax.Array


def probability_loss(student_logits: Array, teacher_logits: Array, mask: Array, *, tau: float = 1.0) -> Array:
    """L_prob = tau^2 mean_pixels KL(p^T || p^S), p = softmax(logits / tau), summed over bins: dense distillation.

    Per rig the mean over its unmasked pixels, all cameras pooled, then the mean over rigs that have one.

    Source: the abstract for "probabilities of bins are distilled"; KL, temperature and tau^2 (which keeps the size of
    the gradient independent of tau) are Hinton et al., 2015.

    Args:
      student_logits: [B, N, h, w, K], nearest bin first.
      teacher_logits: [B, N, h, w, K], likewise; -inf is a bin of probability 0.
      mask: [B, N, h, w] bool, True = the teacher says something here (`teacher_signal.teacher_distribution`). What is
        masked is not looked at.
      tau: temperature on both sides, positive.

    Returns:
      Scalar float32.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.ndim != 5:
        raise ValueError(
            "probability_loss: expected equal [B, N, h, w, K] logits, got student"
            f" {student_logits.shape}, teacher {teacher_logits.shape}"
        )
    if mask.shape != student_logits.shape[:-1]:
        raise ValueError(f"probability_loss: mask {mask.shape} does not fit logits {student_logits.shape}")
    if not tau > 0:
        raise ValueError(f"probability_loss: tau must be positive, got {tau}")
    mask = mask.astype(bool)
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    log_p, log_q = (
        jax.nn.log_softmax(jnp.where(mask[..., None], logits.astype(jnp.float32), 0.0) / tau, -1)
        for logits in (teacher_logits, student_logits)
    )
    p = jnp.exp(log_p)
    # 0 log 0 = 0, also for a bin that the teacher excludes altogether; written so that a NaN stays a NaN
    # As a dot product, since XLA's CPU backend takes thirty times as long for the sum of a product.
    excess = jnp.where(p <= 0, 0.0, log_p - log_q)
    divergence = jnp.einsum("...k,...k->...", p, excess, precision=jax.lax.Precision.HIGHEST)
    axes = (1, 2, 3)
    count = mask.sum(axes)
    per_rig = jnp.where(mask, divergence, 0.0).sum(axes) / jnp.maximum(count, 1)
    return tau**2 * per_rig.sum() / jnp.maximum((count > 0).sum(), 1)


def crossing_depth(teacher_logits: Array, student_centers: Array, size: tuple[int, int], expectation: str) -> Array:
    """Teacher probabilities x student centers: E_sg(p^T)[c^S] at temperature 1, resized as the student's depth.

    Source: our reading of the abstract's "cross-interaction".

    Args:
      teacher_logits: [B, N, h, w, K], finite; no gradient.
      student_centers: metres, [B, N, 1, 1, K] or [B, N, h, w, K], nearest first.
      size: (H, W) of the result.
      expectation: as the student's (`expectation.expected_depth`).

    Returns:
      Depth [B, N, H, W] float32, metres; bilinear with half-pixel centres, of DEPTH.
    """
    shape = teacher_logits.shape
    if teacher_logits.ndim != 5 or student_centers.shape not in ((*shape[:2], 1, 1, shape[-1]), shape):
        raise ValueError(
            "crossing_depth: expected logits [B, N, h, w, K] and centers [B, N, 1, 1, K] or [B, N, h, w, K], got"
            f" {shape}, {student_centers.shape}"
        )
    p = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits).astype(jnp.float32), -1)
    depth = expected_depth(p, student_centers, expectation)
    return interpolate.resize_taps(depth[..., None], *size, "bilinear")[..., 0]


def crossing_mask(mask: Array, size: tuple[int, int]) -> Array:
    """Where the crossing's depth is known: mask [B, N, h, w] bool -> [B, N, H, W] bool.

    True where every head pixel that the bilinear resize reads is unmasked. (Our choice. Interpolating among the
    unmasked ones only would keep a few labels more at the rim of the car's body, at depths that are not its own.)
    """
    hidden = interpolate.resize_taps((~mask.astype(bool)).astype(jnp.float32)[..., None], *size, "bilinear")[..., 0]
    return hidden == 0  # exact: weights are not negative, and a sum of zeros is zero


def crossing_loss(
    teacher_logits: Array,
    student_centers: Array,
    mask: Array,
    depth: Array,
    label_mask: Array,
    *,
    expectation: str = "log",
    silog_lambda: float = 0.85,
) -> Array:
    """L_cross = SILog(E_sg(p^T)[c^S], D*): metric scale enters through the student's centers alone.

    A label counts only where the teacher says all that its pixel's depth is interpolated from (`crossing_mask`).
    The teacher's probabilities must not depend on the student's centers, or the term says nothing about them: logits
    of `two_hot` are not for it.

    Args:
      teacher_logits: [B, N, h, w, K]; no gradient.
      student_centers: metres, [B, N, 1, 1, K] or [B, N, h, w, K], nearest first.
      mask: [B, N, h, w] bool, True = the teacher says something here. What is masked is not looked at.
      depth: labels D* [B, N, H, W] metres, positive where `label_mask` is set.
      label_mask: [B, N, H, W] bool, True = valid label (`total.label_mask`).
      expectation: see `crossing_depth`; silog_lambda: see `supervised.silog`.

    Returns:
      Scalar float32.
    """
    if mask.shape != teacher_logits.shape[:-1] or depth.ndim != 4 or depth.shape[:2] != mask.shape[:2]:
        raise ValueError(
            "crossing_loss: expected logits [B, N, h, w, K], mask [B, N, h, w] and depth [B, N, H, W], got"
            f" {teacher_logits.shape}, {mask.shape}, {depth.shape}"
        )
    size = depth.shape[2:]
    logits = jnp.where(mask.astype(bool)[..., None], teacher_logits, 0.0)  # 0 x NaN would pass through the resize
    crossed = crossing_depth(logits, student_centers, size, expectation)
    return silog(crossed, depth, label_mask.astype(bool) & crossing_mask(mask, size), lam=silog_lambda)


def ckd_loss(
    student_logits: Array,
    student_centers: Array,
    teacher_logits: Array,
    mask: Array,
    depth: Array,
    label_mask: Array,
    *,
    w_prob: float = 1.0,
    w_cross: float = 1.0,
    tau: float = 1.0,
    expectation: str = "log",
    silog_lambda: float = 0.85,
) -> tuple[Array, dict[str, Array]]:
    """L_CKD = w_prob L_prob + w_cross L_cross; with w_cross = 0 it is Hinton's distillation on bins.

    A weight of 0 leaves its term out of the program altogether.

    Args:
      student_logits: [B, N, h, w, K] `bin_logits`.
      student_centers: metres, [B, N, 1, 1, K] or [B, N, h, w, K] `bin_centers`.
      teacher_logits: [B, N, h, w, K] of `teacher_signal.teacher_distribution`; no gradient.
      mask: [B, N, h, w] bool, from the same function: True = the teacher says something here.
      depth: labels [B, N, H, W] metres; label_mask: [B, N, H, W] bool, True = valid label.
      w_prob, w_cross: weights; tau: of `probability_loss`; expectation, silog_lambda: of `crossing_loss`.

    Returns:
      (loss, terms): a float32 scalar, and unweighted scalars for the log: `ckd`, the loss itself; `ckd_prob` and
      `ckd_cross` where used.
    """
    loss = jnp.zeros((), jnp.float32)
    terms: dict[str, Array] = {}
    if w_prob:
        terms["ckd_prob"] = probability_loss(student_logits, teacher_logits, mask, tau=tau)
        loss = loss + w_prob * terms["ckd_prob"]
    if w_cross:
        terms["ckd_cross"] = crossing_loss(
            teacher_logits, student_centers, mask, depth, label_mask, expectation=expectation,
            silog_lambda=silog_lambda,
        )  # fmt: skip
        loss = loss + w_cross * terms["ckd_cross"]
    terms["ckd"] = loss
    return loss, terms
