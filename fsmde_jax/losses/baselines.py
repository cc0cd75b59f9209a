"""Distillation baselines by name, and those that compare views one by one (docs/method.md, section 6).

Every loss is a pure function (student, teacher, mask, **options) -> scalar float32, without gradient into the teacher.
Bins KD is the probability term of cross-interaction distillation and lives with it; SP, RKD and CIRKD, which compare
views with each other, are in `baseline_relations`. Each value is a mean over rigs (the valid pixels of all cameras of a
rig pooled, rigs without any left out), except for SP and RKD, which couple the batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fsmde_jax.losses import baseline_relations, masked, teacher_bins
from fsmde_jax.names import check_name

Array = Any  # jax.Array


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A baseline's loss and what it needs.

    Attributes:
      loss: (student, teacher, mask, **options) -> scalar.
      needs: what student and teacher are. `features`: student features [B, N, h, w, C] and teacher features or tokens
        [B, N, h', w', C'], each at its own size. `logits`: bin logits [B, N, h, w, K] of both. `rel_inv_depth`: the
        student's depth [B, N, h, w] in metres and the teacher's relative inverse depth [B, N, h', w'].
      projector: student features go through a `models.projector.Projector` to C' channels first.
      couples_batch: the value depends on which rigs come together in a batch.
    """

    loss: Callable[..., Array]
    needs: Literal["features", "logits", "rel_inv_depth"]
    projector: bool = False
    couples_batch: bool = False


def response(pred_depth: Array, rel_inv_depth: Array, mask: Array) -> Array:
    """Response KD: L1 between the student's inverse depth and the teacher's map after an affine alignment per view.

    Per view (s, t) = argmin sum (s r + t - 1/d)^2 over the valid pixels under s >= 0, the alignment of the relative
    evaluation protocol; then the mean of |1/d - (s r + t)|. s and t are data (`stop_gradient`): otherwise the target
    would follow the student. Unchanged by r -> a r + b, a > 0. Views with fewer than two valid pixels or a constant map
    have no alignment and are left out.

    Source: scale-and-shift alignment of MiDaS (Ranftl et al., TPAMI 2022, equation 4), as a distillation target as in
    the student training of Depth Anything V2 (NeurIPS 2024) with metric depth in place of relative.

    Args:
      pred_depth: d [B, N, h, w] metres, positive where `mask` is set (elsewhere it is not looked at).
      rel_inv_depth: r [B, N, h', w'], larger = nearer; resized to h x w (area or bilinear); no gradient.
      mask: [B, N, h, w] bool, True = counts.

    Returns:
      Scalar float32, 1/m.
    """
    if pred_depth.ndim != 4 or mask.shape != pred_depth.shape or rel_inv_depth.shape[:2] != mask.shape[:2]:
        raise ValueError(
            "response: expected depth and mask [B, N, h, w] and a map [B, N, h', w'], got"
            f" {pred_depth.shape}, {mask.shape}, {rel_inv_depth.shape}"
        )
    mask = mask.astype(bool)
    count = jnp.maximum(mask.sum((2, 3), keepdims=True), 1)

    def centred(x: Array) -> tuple[Array, Array]:
        x = jnp.where(mask, x, 0.0)
        mean = x.sum((2, 3), keepdims=True) / count
        return jnp.where(mask, x - mean, 0.0), mean

    inverse = jnp.where(mask, 1.0 / jnp.where(mask, pred_depth.astype(jnp.float32), 1.0), 0.0)
    r = teacher_bins.resize_rel_inv_depth(jax.lax.stop_gradient(rel_inv_depth), *mask.shape[2:])
    (x, _), (y, mean) = centred(r), centred(jax.lax.stop_gradient(inverse))
    magnitude = jnp.max(jnp.abs(jnp.where(mask, r, 0.0)), (2, 3), keepdims=True)
    direction, varies = masked.unit(x, (2, 3), magnitude)
    slope = jnp.maximum((direction * y).sum((2, 3), keepdims=True), 0.0)
    error = jnp.abs(inverse - (slope * direction + mean))
    return masked.mean_over_rigs(error, mask & varies)  # one valid pixel does not vary


def fitnets(student: Array, teacher: Array, mask: Array, *, grid: tuple[int, int] | None = None) -> Array:
    """FitNets: mean (r(F^S) - F^T)^2 over valid cells and channels, r the 1x1 projector.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, equation 3, as a mean instead of half a sum.

    Args:
      student: r(F^S) [B, N, h, w, C], projected already.
      teacher: F^T [B, N, h', w', C], any float dtype; no gradient.
      mask: [B, N, h'', w''] bool, True = counts.
      grid: see `masked.common_grid`.

    Returns:
      Scalar float32; a mean over rigs.
    """
    student, teacher, valid = masked.common_grid(student, teacher, mask, grid)
    _check_channels("fitnets", student, teacher)
    return masked.mean_over_rigs(jnp.square(student - teacher).mean(-1), valid)


def attention(student: Array, teacher: Array, mask: Array, *, grid: tuple[int, int] | None = None) -> Array:
    """AT: mean (Q^S - Q^T)^2 over valid cells; Q = mean_c F^2, divided by its L2 norm over the valid cells of the view.

    Sees neither a permutation or rotation of channels nor a scale per view. As Q^2 sums to 1 over a view, the value
    falls with the number of cells: the weight of this term is large (the authors take 1e3).

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1 with p = 2, as a mean
    square as in the authors' code.

    Args:
      student: [B, N, h, w, C], any float dtype.
      teacher: [B, N, h', w', C'], any float dtype; no gradient. Views where it is all 0 are left out.
      mask: [B, N, h'', w''] bool, True = counts.
      grid: see `masked.common_grid`.

    Returns:
      Scalar float32; a mean over rigs.
    """
    student, teacher, valid = masked.common_grid(student, teacher, mask, grid)
    (q_s, _), (q_t, known) = (masked.unit(jnp.square(x).mean(-1), (2, 3)) for x in (student, teacher))
    return masked.mean_over_rigs(jnp.square(q_s - q_t), valid & known)


def channel_wise(
    student: Array, teacher: Array, mask: Array, *, tau: float = 1.0, grid: tuple[int, int] | None = None
) -> Array:
    """CWD: tau^2 KL(p^T || p^S) of every channel's softmax over the valid cells of a view, mean over channels.

    Unchanged by a constant added to a channel of a view. The KL of a view is a sum over its cells; the mean is over the
    views with a valid cell of a rig, then over rigs.

    Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, equations 4-6, on
    features after a 1x1 projector. On bin logits of both, whose channels agree, it is the paper's other variant.

    Args:
      student: [B, N, h, w, C], projected already.
      teacher: [B, N, h', w', C], any float dtype; no gradient.
      mask: [B, N, h'', w''] bool, True = counts.
      tau: temperature; above 1 the softmax reaches more cells.
      grid: see `masked.common_grid`.

    Returns:
      Scalar float32.
    """
    student, teacher, valid = masked.common_grid(student, teacher, mask, grid)
    _check_channels("channel_wise", student, teacher)
    cells = valid.reshape(*valid.shape[:2], -1, 1)
    log_s, log_t = (masked.log_softmax(x.reshape(*cells.shape[:3], -1) / tau, cells, 2) for x in (student, teacher))
    divergence = masked.kl(log_t, log_s, cells, 2).mean(-1)  # [B, N]
    return tau**2 * masked.mean_over_rigs(divergence, valid.any((2, 3)))


def correlation(student: Array, teacher: Array, mask: Array, axes: int | tuple[int, ...]) -> tuple[Array, Array]:
    """Pearson's correlation over the valid entries of some axes; unchanged by x -> a x + b, a > 0, of either side.

    Args:
      student, teacher: equal shapes, float32, of probabilities.
      mask: bool, broadcasts to them.
      axes: to correlate over.

    Returns:
      (correlation, without `axes`: 0 where a side is constant; known: False where the teacher's values stay within
      1e-6 of their mean: it says nothing there).
    """
    mask = jnp.broadcast_to(mask, student.shape)
    count = jnp.maximum(mask.sum(axes, keepdims=True), 1)

    def centred(x: Array) -> Array:
        x = jnp.where(mask, x, 0.0)
        return jnp.where(mask, x - x.sum(axes, keepdims=True) / count, 0.0)

    largest = jax.lax.stop_gradient(jnp.max(jnp.where(mask, jnp.abs(student), 0.0), axes, keepdims=True))
    (unit_s, _), (unit_t, known) = (
        masked.unit(centred(student), axes, largest),
        masked.unit(centred(teacher), axes, 1.0),
    )
    return (unit_s * unit_t).sum(axes), known.squeeze(axes)


def dist(
    student: Array, teacher: Array, mask: Array, *, beta: float = 1.0, gamma: float = 1.0, tau: float = 1.0
) -> Array:
    """DIST: beta mean_pixels (1 - pearson over bins) + gamma mean_bins (1 - pearson over pixels).

    Both are of p = softmax(z / tau).

    The second correlation is over all valid pixels of a rig, bin by bin; bins that the teacher does not use in a rig
    are left out. Both terms are means over rigs, where the authors' code correlates over the whole batch. An affine map
    of every pixel's distribution does not change the first term, one of every bin's map not the second.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, equations 8-11; tau 1 and both
    weights 1 as in its segmentation experiments.

    Args:
      student: z^S [B, N, h, w, K] bin logits.
      teacher: z^T [B, N, h, w, K], no gradient.
      mask: [B, N, h, w] bool, True = counts (`teacher_signal.teacher_distribution` gives it).
      beta, gamma: a 0 leaves the term out of the program.
      tau: temperature; the loss is multiplied by tau^2.

    Returns:
      Scalar float32.
    """
    if student.ndim != 5 or student.shape != teacher.shape or mask.shape != student.shape[:-1]:
        raise ValueError(
            "dist: expected logits [B, N, h, w, K] twice and a mask [B, N, h, w], got"
            f" {student.shape}, {teacher.shape}, {mask.shape}"
        )
    mask = mask.astype(bool)[..., None]
    p_s, p_t = (
        jax.nn.softmax(jnp.where(mask, z.astype(jnp.float32), 0.0) / tau, -1)
        for z in (student, jax.lax.stop_gradient(teacher))
    )
    loss = jnp.zeros((), jnp.float32)
    if beta:
        rho, known = correlation(p_s, p_t, mask, -1)
        loss = loss + beta * masked.mean_over_rigs(1.0 - rho, known & mask[..., 0])
    if gamma:
        rho, known = correlation(p_s, p_t, mask, (1, 2, 3))
        loss = loss + gamma * masked.mean_over_rigs(1.0 - rho, known)
    return tau**2 * loss


def _check_channels(name: str, student: Array, teacher: Array) -> None:
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"{name}: student has {student.shape[-1]} channels and teacher {teacher.shape[-1]};"
            " send the student's features through models.projector.Projector first"
        )


BASELINES: dict[str, Baseline] = {
    "response": Baseline(response, "rel_inv_depth"),
    "fitnets": Baseline(fitnets, "features", projector=True),
    "at": Baseline(attention, "features"),
    "sp": Baseline(baseline_relations.similarity_preserving, "features", couples_batch=True),
    "rkd": Baseline(baseline_relations.relational, "features", couples_batch=True),
    "cwd": Baseline(channel_wise, "features", projector=True),
    "dist": Baseline(dist, "logits"),
    "cirkd": Baseline(baseline_relations.cross_view, "features"),
}


def baseline(name: str) -> Baseline:
    """The entry of `BASELINES` called `name`.

    Raises:
      ConfigError: unknown name; names the config key and the nearest known name.
    """
    check_name("distill.baseline", name, BASELINES)
    return BASELINES[name]
