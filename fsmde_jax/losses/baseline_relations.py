"""Distillation baselines that compare relations between views: SP, RKD and CIRKD (docs/method.md, section 6).

Relations do not see feature channels, so student and teacher may have different numbers of them and none of these
losses needs a projector. SP and RKD couple the views of the whole batch, across rigs; CIRKD stays within rigs.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fsmde_jax.losses import masked
from fsmde_jax.losses.masked import HIGHEST

Array = Any  # jax.Array


def similarity_preserving(student: Array, teacher: Array, mask: Array, *, grid: tuple[int, int] | None = None) -> Array:
    """SP: ||G^T - G^S||_F^2 / M^2 with G the row-normalised F F^T over the M views of the batch.

    F [M, gh gw C] are the flattened features of every view. Couples a batch: G relates views of different rigs, so the
    value depends on which rigs come together. M counts the views with a valid cell; masked cells are 0 in F.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, equations 2-4.

    Args:
      student: [B, N, h, w, C], any float dtype.
      teacher: [B, N, h', w', C'], any float dtype; no gradient.
      mask: [B, N, h'', w''] bool, True = counts.
      grid: see `masked.common_grid`.

    Returns:
      Scalar float32.
    """
    student, teacher, valid = masked.common_grid(student, teacher, mask, grid)
    views = valid.shape[0] * valid.shape[1]

    def gram(x: Array) -> Array:
        x = x.reshape(views, -1)
        return masked.unit(jnp.einsum("id,jd->ij", x, x, precision=HIGHEST), -1)[0]

    count = jnp.maximum(valid.any((2, 3)).sum(), 1)  # rows and columns of the other views are 0
    return jnp.square(gram(teacher) - gram(student)).sum() / jnp.square(count.astype(jnp.float32))


def smooth_l1(x: Array) -> Array:
    """x^2 / 2 for |x| < 1, |x| - 1/2 beyond: the Huber loss with threshold 1."""
    size = jnp.abs(x)
    return jnp.where(size < 1.0, 0.5 * jnp.square(x), size - 0.5)


def _offsets(x: Array, pairs: Array) -> tuple[Array, Array, Array]:
    """Of embeddings [M, C] and pairs [M, M] bool: distances [M, M], directions [M, M, C] from row to column, apart.

    Distance and direction of two embeddings that agree to float32's rounding are 0, without gradient; `apart` [M, M]
    bool is False there and where there is no pair.
    """
    offset = x[None, :] - x[:, None]
    magnitude = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
    direction, known = masked.unit(jnp.where(pairs[..., None], offset, 0.0), -1, magnitude)
    apart = known[..., 0] & pairs
    squares = jnp.square(offset).sum(-1)
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0), direction, apart


def relational(
    student: Array, teacher: Array, mask: Array, *, distance_weight: float = 25.0, angle_weight: float = 50.0
) -> Array:
    """RKD: smooth-L1 on distances of pairs of views divided by their mean, and on the cosines in triplets of views.

    L = distance_weight mean_{i != j} l(d_ij / mean d) + angle_weight mean_{i, j, k distinct} l(cos angle at j of i, j,
    k), each l a smooth-L1 between student and teacher. The embedding of a view is the mean of its features over the
    valid cells. Couples a batch: pairs and triplets are of all M = B N views; memory grows with M^3. Triplets in which
    two of the teacher's embeddings coincide have no angle and are left out, as is everything if all coincide.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019, equations 5-11 and the weights of its section
    4.2. Means are over tuples of distinct views as written there; the authors' code also counts the tuples that repeat
    a view, whose difference is 0.

    Args:
      student: [B, N, h, w, C], any float dtype.
      teacher: [B, N, h', w', C'], any float dtype; no gradient.
      mask: [B, N, h'', w''] bool, True = counts.
      distance_weight, angle_weight: a 0 leaves the term out of the program.

    Returns:
      Scalar float32.
    """
    student, teacher, valid = masked.common_grid(student, teacher, mask)
    views = valid.shape[0] * valid.shape[1]
    cells = valid.reshape(views, -1).sum(-1)
    present = cells > 0
    distinct = ~jnp.eye(views, dtype=bool)
    pairs = present[:, None] & present[None] & distinct

    def embed(x: Array) -> Array:
        return x.reshape(views, -1, x.shape[-1]).sum(1) / jnp.maximum(cells, 1)[:, None]

    (distance_s, direction_s, _), (distance_t, direction_t, apart) = (
        _offsets(embed(x), pairs) for x in (student, teacher)
    )
    loss = jnp.zeros((), jnp.float32)
    if distance_weight:
        count = jnp.maximum(pairs.sum(), 1)

        def relative(distance: Array) -> Array:
            mean = distance.sum() / count
            return distance / jnp.where(mean > 0, mean, 1.0)

        error = smooth_l1(relative(distance_s) - relative(distance_t))
        error = jnp.where(pairs & apart.any(), error, 0.0)
        loss = loss + distance_weight * error.sum() / count
    if angle_weight:
        cosine_s, cosine_t = (jnp.einsum("jic,jkc->jik", x, x, precision=HIGHEST) for x in (direction_s, direction_t))
        triplets = apart[:, :, None] & apart[:, None, :] & distinct[None]
        error = jnp.where(triplets, smooth_l1(cosine_s - cosine_t), 0.0)
        loss = loss + angle_weight * error.sum() / jnp.maximum(triplets.sum(), 1)
    return loss


def cross_view(
    student: Array,
    teacher: Array,
    mask: Array,
    *,
    grid: tuple[int, int] | None = (6, 10),
    tau: float = 0.1,
    remove_mean: bool = True,
) -> Array:
    """CIRKD: pixel-to-pixel relations of ALL pairs of views of a rig, a view with itself included.

    Features f pooled to `grid` and L2-normalised per cell; S_ij = f_i f_j^T / tau; per row KL(softmax S^T_ij ||
    softmax S^S_ij), averaged over pairs and rows of a rig, then over rigs. Nothing couples the rigs of a batch, and
    nothing asks who is adjacent, which is what view-relational distillation (section 5) adds.

    Source: Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic Segmentation", CVPR 2022, equations
    3-5 (mini-batch pixel-to-pixel distillation, tau .1), with the views of a rig as the images of the mini-batch. The
    paper does not remove the mean; section 5's tokens do. As there, a cell's relation to itself stays in its row, which
    section 5 leaves out.

    Args:
      student: [B, N, h, w, C], any float dtype.
      teacher: [B, N, h', w', C'], any float dtype; no gradient.
      mask: [B, N, h'', w''] bool, True = counts. Cells more than half masked leave rows and columns.
      grid: (gh, gw) tokens of a view; None as in `masked.common_grid`. Memory grows with (N gh gw)^2.
      tau: temperature.
      remove_mean: subtract every channel's mean over the valid cells of the rig first.

    Returns:
      Scalar float32.
    """
    student, teacher, valid = masked.common_grid(student, teacher, mask, grid)
    b, n = valid.shape[:2]
    valid = valid.reshape(b, n, -1)

    def log_relations(x: Array) -> Array:
        x = x.reshape(*valid.shape, x.shape[-1])
        magnitude: Array | float = 0.0
        if remove_mean:
            magnitude = jax.lax.stop_gradient(jnp.max(jnp.abs(x), (1, 2, 3), keepdims=True))
            mean = x.sum((1, 2), keepdims=True) / jnp.maximum(valid.sum((1, 2)), 1)[:, None, None, None]
            x = jnp.where(valid[..., None], x - mean, 0.0)
        token = masked.unit(x, -1, magnitude)[0]
        similarity = jnp.einsum("bipc,bjqc->bijpq", token, token, precision=HIGHEST) / tau
        return masked.log_softmax(similarity, valid[:, None, :, None, :], -1)

    divergence = masked.kl(log_relations(teacher), log_relations(student), valid[:, None, :, None, :], -1)
    rows = valid[:, :, None, :] & valid.any(-1)[:, None, :, None]
    return masked.mean_over_rigs(divergence, rows)
