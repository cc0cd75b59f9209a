"""View-relational knowledge distillation, VRKD (docs/method.md, section 5).

What the paper's abstract states: structural relationships among adjacent camera views are encoded and transferred from
teacher to student. Everything more exact is our reading: views are cut into tokens, and for each directed pair of
adjacent views every token of the one holds a distribution over the tokens of the other; the student's follows the
teacher's. Float32 throughout; finite value and gradient for every mask; no gradient reaches the teacher; any number
of cameras. In short::

    mask = token_mask(pixels_the_teacher_speaks_of, (6, 10))
    pairs = adjacent_pairs(batch["cam_to_ego"], batch["intrinsics"], width, batch["view_mask"])
    loss = relation_loss(tokens_of(student_features, (6, 10)), tokens_of(teacher_taps, (6, 10)), pairs, mask, tau_r=0.1)
"""

from typing import Any

import jax
import jax.numpy as jnp

from fsmde_jax import geometry, interpolate

Array = Any  # jax.Array

CENTERS = ("rig", "view", "none")
_ROUNDING = 1e-6  # about 8 units in the last place of float32: a smaller part of a token is none
_EXCLUDED = -1e30  # a logit whose exponential is 0, but whose differences are finite


def adjacent_pairs(
    cam_to_ego: Array, intrinsics: Array, width: Array, view_mask: Array | None = None, *, intra: bool = False
) -> Array:
    """Directed pairs of views whose relation counts: adjacent ones (`geometry.adjacency`), on request each with itself.

    Args:
      cam_to_ego: [B, N, 4, 4]; intrinsics: [B, N, 3, 3] at image `width`, augmentation included.
      view_mask: [B, N] bool, False = view dropped, which leaves all its pairs; None = all are there.
      intra: adds the pairs (i, i): relations inside a view.

    Returns:
      [B, N, N] bool, symmetric.
    """
    pairs = geometry.adjacency(cam_to_ego, intrinsics, width, view_mask)
    if not intra:
        return pairs
    own = jnp.eye(pairs.shape[-1], dtype=bool)
    return pairs | (own if view_mask is None else own & view_mask.astype(bool)[..., None])


def tokens_of(features: Array, grid: tuple[int, int], mask: Array | None = None) -> Array:
    """Features [B, N, H', W', C] -> tokens [B, N, gh, gw, C] float32: means over exactly equal rectangles.

    Teacher and student cover the same rectangles, whatever the sizes of their features.

    Args:
      features: of any size not below the grid's.
      grid: (gh, gw).
      mask: [B, N, H', W'] bool: the mean over unmasked pixels only, 0 where there is none. None = over all.

    Raises:
      ValueError: a grid finer than the features (its tokens would be copies of each other), or a misfitting mask.
    """
    if features.ndim != 5 or features.shape[2] < grid[0] or features.shape[3] < grid[1]:
        raise ValueError(f"tokens_of: cannot pool features {features.shape} ([B, N, H', W', C]) to a grid of {grid}")
    x = features.astype(jnp.float32)
    if mask is None:
        return interpolate.resize(x, *grid, "area")
    if mask.shape != features.shape[:-1]:
        raise ValueError(f"tokens_of: mask {mask.shape} does not fit features {features.shape}")
    seen = mask.astype(bool)[..., None]
    share = interpolate.resize(seen.astype(jnp.float32), *grid, "area")
    total = interpolate.resize(jnp.where(seen, x, 0.0), *grid, "area")
    return total / jnp.where(share > 0, share, 1.0)


def bin_tokens(logits: Array, mask: Array, grid: tuple[int, int]) -> Array:
    """Tokens of the variant `bins`: bin distributions softmax(logits), pooled over the unmasked pixels of each cell.

    Args:
      logits: [B, N, h, w, K]; what is masked is not looked at.
      mask: [B, N, h, w] bool.
      grid: (gh, gw).

    Returns:
      [B, N, gh, gw, K] float32.
    """
    z = jnp.where(mask.astype(bool)[..., None], logits.astype(jnp.float32), 0.0)
    return tokens_of(jax.nn.softmax(z, -1), grid, mask)


def token_mask(pixel_mask: Array, grid: tuple[int, int]) -> Array:
    """Tokens [B, N, gh, gw] bool that count: those of which at most half is masked.

    Args:
      pixel_mask: [B, N, h, w] bool, True = counts (not the car's own body, camera present).
      grid: (gh, gw).
    """
    share = interpolate.resize(pixel_mask.astype(jnp.float32)[..., None], *grid, "area")[..., 0]
    return share > 0.5 - 1e-4  # exactly half stays, also after rounding


def normalise_tokens(tokens: Array, mask: Array, *, center: str = "rig") -> Array:
    """Tokens as directions: the mean per channel removed, then divided by their length.

    A token that the mean leaves nothing of, beyond rounding, becomes 0 with gradient 0 (its cosines are all 0). There
    is no eps, so a common factor of all tokens changes nothing.

    Args:
      tokens: [B, N, T, C]; what is masked is not looked at.
      mask: [B, N, T] bool.
      center: over what the mean is taken. `rig`: all unmasked tokens of a rig (a change of one view then moves all
        others a little). `view`: those of the view alone. `none`: nothing is removed.

    Returns:
      [B, N, T, C] float32: unit vectors, 0 where masked.
    """
    if center not in CENTERS:
        raise ValueError(f"normalise_tokens: center = {center!r}, expected one of {CENTERS}")
    if tokens.ndim != 4 or mask.shape != tokens.shape[:-1]:
        raise ValueError(f"normalise_tokens: expected [B, N, T, C] and [B, N, T], got {tokens.shape}, {mask.shape}")
    seen = mask.astype(bool)[..., None]
    x = jnp.where(seen, tokens.astype(jnp.float32), 0.0)
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), (1, 2, 3), keepdims=True)
    x = x / jnp.where(largest == 0, 1.0, largest)  # directions stay; squares and their roots' slopes stay finite
    if center != "none":
        axes = (1, 2) if center == "rig" else (2,)
        count = jnp.maximum(seen.sum(axes, keepdims=True), 1)
        for _ in range(2):  # the second time takes away what the first left by rounding
            x = jnp.where(seen, x - x.sum(axes, keepdims=True) / count, 0.0)
    square = jnp.sum(jnp.square(x), -1, keepdims=True)
    directed = ~(square <= _ROUNDING**2)  # written so that a NaN stays a NaN
    return x * jnp.where(directed, jax.lax.rsqrt(jnp.where(directed, square, 1.0)), 0.0)


def cosines(tokens: Array) -> Array:
    """Cosines of all tokens of all pairs of views: `normalise_tokens`' [B, N, T, C] -> [B, N, N, T, T]."""
    return jnp.einsum("bitc,bjsc->bijts", tokens, tokens, precision=jax.lax.Precision.HIGHEST)


def relation_pairs(
    student_tokens: Array, teacher_tokens: Array, pairs: Array, mask: Array, *, tau_r: float, center: str = "rig"
) -> tuple[Array, Array]:
    """Per directed pair of views, the mean over its rows of KL(softmax_rows S^T || softmax_rows S^S).

    Args, shapes and source: see `relation_loss`.

    Returns:
      (values [B, N, N] float32, rows [B, N, N] int32): entry (i, j) has tokens of view i as rows and those of view j as
      columns; `rows` is how many counted, 0 for what is no pair.
    """
    _check(student_tokens, teacher_tokens, pairs, mask)
    if not tau_r > 0:
        raise ValueError(f"relation loss: tau_r must be positive, got {tau_r}")
    b, n = mask.shape[:2]
    mask = mask.astype(bool).reshape(b, n, -1)
    t = mask.shape[-1]
    # A token's likeness to itself (pairs of a view with itself) is 1 on both sides and would take most of the row.
    itself = jnp.eye(n, dtype=bool)[:, :, None, None] & jnp.eye(t, dtype=bool)
    columns = mask[:, None, :, None, :] & ~itself
    rows = pairs.astype(bool)[..., None] & mask[:, :, None, :] & columns.any(-1)

    def log_relation(tokens: Array) -> Array:
        directions = normalise_tokens(tokens.reshape(b, n, t, -1), mask, center=center)
        return jax.nn.log_softmax(jnp.where(columns, cosines(directions) / tau_r, _EXCLUDED), -1)

    log_p, log_q = log_relation(jax.lax.stop_gradient(teacher_tokens)), log_relation(student_tokens)
    divergence = jnp.where(columns, jnp.exp(log_p) * (log_p - log_q), 0.0).sum(-1)
    count = rows.sum(-1)
    return jnp.where(rows, divergence, 0.0).sum(-1) / jnp.maximum(count, 1), count


def relation_loss(
    student_tokens: Array, teacher_tokens: Array, pairs: Array, mask: Array, *, tau_r: float = 0.1, center: str = "rig"
) -> Array:
    """L_VRKD = mean over pairs and rows of KL(softmax_rows S^T_ij || softmax_rows S^S_ij), S_ij = f_i f_j^T / tau_r.

    The f are `normalise_tokens` of each side. Per rig the mean over the rows of all its pairs (a view with few tokens
    weighs less), then the mean over rigs that have one. Masked tokens are neither rows nor columns, on both sides.

    Source: the abstract for relations of adjacent views; the form is CIRKD's (Yang et al., CVPR 2022), there between
    pixels of different images, here restricted to adjacent views of a rig.

    Args:
      student_tokens: [B, N, gh, gw, Cs], of `tokens_of` or `bin_tokens`.
      teacher_tokens: [B, N, gh, gw, Ct]; Ct need not be Cs; no gradient.
      pairs: [B, N, N] bool, of `adjacent_pairs`.
      mask: [B, N, gh, gw] bool, of `token_mask`. What is masked is not looked at.
      tau_r: temperature of the cosines, positive.
      center: see `normalise_tokens`.

    Returns:
      Scalar float32.
    """
    values, rows = relation_pairs(student_tokens, teacher_tokens, pairs, mask, tau_r=tau_r, center=center)
    return _mean_of_rigs(values * rows, rows)


def gram_pairs(
    student_tokens: Array, teacher_tokens: Array, pairs: Array, mask: Array, *, center: str = "rig"
) -> tuple[Array, Array]:
    """Per directed pair, the squared difference of the two sides' cosines: ([B, N, N] float32, counts [B, N, N] bool).

    Args: see `gram_loss`.
    """
    _check(student_tokens, teacher_tokens, pairs, mask)
    b, n = mask.shape[:2]
    mask = mask.astype(bool).reshape(b, n, -1)
    present = mask.any(-1, keepdims=True)

    def cosines_of_views(tokens: Array) -> Array:
        x = jnp.where(mask[..., None], tokens.astype(jnp.float32).reshape(*mask.shape, -1), 0.0)
        descriptor = x.sum(2, keepdims=True) / jnp.maximum(mask.sum(-1), 1)[..., None, None]
        return cosines(normalise_tokens(descriptor, present, center=center))[..., 0, 0]

    counts = pairs.astype(bool) & present & jnp.swapaxes(present, 1, 2) & ~jnp.eye(n, dtype=bool)
    difference = cosines_of_views(student_tokens) - cosines_of_views(jax.lax.stop_gradient(teacher_tokens))
    return jnp.where(counts, jnp.square(difference), 0.0), counts


def gram_loss(student_tokens: Array, teacher_tokens: Array, pairs: Array, mask: Array, *, center: str = "rig") -> Array:
    """Variant `gram`: mean over pairs of the squared difference between teacher's and student's cosine of two views.

    A view is the mean of its unmasked tokens; a view without any leaves its pairs. Pairs of a view with itself say
    nothing here and are left out. With `center="rig"` two views alone are opposite by construction: take `none` then.
    Mean over the pairs of a rig, then over rigs that have one.

    Args:
      student_tokens, teacher_tokens, pairs, mask: see `relation_loss`.
      center: see `normalise_tokens`, with one descriptor in place of a view's tokens: `rig` or `none`.

    Returns:
      Scalar float32.
    """
    if center not in ("rig", "none"):
        raise ValueError(f"gram_loss: center = {center!r}, expected 'rig' or 'none' (a view has one descriptor)")
    return _mean_of_rigs(*gram_pairs(student_tokens, teacher_tokens, pairs, mask, center=center))


def _mean_of_rigs(values: Array, counts: Array) -> Array:
    """Sums [B, N, N] over counts [B, N, N], per rig, then the mean over rigs that have any."""
    total = counts.sum((1, 2))
    return (values.sum((1, 2)) / jnp.maximum(total, 1)).sum() / jnp.maximum((total > 0).sum(), 1)


def _check(student_tokens: Array, teacher_tokens: Array, pairs: Array, mask: Array) -> None:
    shape = mask.shape
    fits = student_tokens.shape[:-1] == teacher_tokens.shape[:-1] == shape and mask.ndim == 4
    if not fits or pairs.shape != (shape[0], shape[1], shape[1]):
        raise ValueError(
            "relations: expected tokens [B, N, gh, gw, C] of student and teacher, pairs [B, N, N] and mask"
            f" [B, N, gh, gw], got {student_tokens.shape}, {teacher_tokens.shape}, {pairs.shape}, {shape}"
        )
