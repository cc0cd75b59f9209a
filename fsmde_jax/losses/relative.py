"""Scale-and-shift-invariant training of a relative depth network on inverse depth.

Both terms compare prediction and target after each was shifted by its median and divided by its mean absolute
deviation, image by image, so neither sees an affine map of either side. They take a mask of valid pixels, compute in
float32, and give a finite value and gradient for every mask. Images whose valid pixels hold no two different target
values have nothing to say and are left out of the mean.
"""

from typing import Any

import jax.numpy as jnp

from fsmde_jax.losses.teacher_bins import masked_percentiles

Array = Any  # jax.Array

SCALES = 4  # of gradient matching: full size, then every 2nd, 4th and 8th pixel
_ROUNDING = 1e-6  # about 8 units in the last place of float32: a smaller spread is none


def inverse_depth_target(depth: Array, mask: Array, *, zero_is_far: bool) -> tuple[Array, Array]:
    """What a relative network is trained on: inverse depth in 1/m, and where it counts.

    Args:
      depth: [..., H, W] metres, 0 = none.
      mask: [..., H, W] bool, True = may train (not the car's own body, camera present).
      zero_is_far: dense rendered depth: 0 is sky or out of range, so its inverse depth is 0 and supervises; this is
        what Depth Anything does with the sky. False for sparse depth (LiDAR), where 0 says nothing.

    Returns:
      (target [..., H, W] float32, valid [..., H, W] bool).
    """
    if depth.shape != mask.shape:
        raise ValueError(f"inverse_depth_target: depth {depth.shape} and mask {mask.shape} must agree")
    depth = depth.astype(jnp.float32)
    known = depth > 0
    target = jnp.where(known, 1.0 / jnp.where(known, depth, 1.0), 0.0)
    mask = mask.astype(bool)
    return target, mask if zero_is_far else mask & known


def normalise(values: Array, mask: Array) -> tuple[Array, Array]:
    """(x - t) / s per image, t = median(x), s = mean |x - t|, both over the valid pixels.

    Where s is 0 (constant, fewer than two pixels) it is replaced by 1: the result is 0, and the gradient is that of
    the unscaled difference, which lets a constant prediction become one that is not.

    Args:
      values: [..., H, W]; what is masked is not looked at.
      mask: [..., H, W] bool, True = valid.

    Returns:
      (normalised [..., H, W] float32, 0 where masked; varies [...] bool, False where s was 0).
    """
    mask = mask.astype(bool)
    x = jnp.where(mask, values.astype(jnp.float32), 0.0)
    flat = (*x.shape[:-2], -1)
    median = masked_percentiles(x.reshape(flat), mask.reshape(flat), (50,))[..., None]
    centred = jnp.where(mask, x - median, 0.0)
    count = jnp.maximum(mask.sum((-2, -1), keepdims=True), 1)
    scale = jnp.abs(centred).sum((-2, -1), keepdims=True) / count
    varies = ~(scale <= _ROUNDING * jnp.max(jnp.abs(x), (-2, -1), keepdims=True))  # a NaN stays a NaN
    return centred / jnp.where(varies, scale, 1.0), varies[..., 0, 0]


def affine_invariant_mae(residual: Array, mask: Array) -> Array:
    """Mean |residual| over the valid pixels of each image: [..., H, W] -> [...].

    `residual` is normalised prediction minus normalised target (`normalise`).
    """
    total = jnp.where(mask, jnp.abs(residual), 0.0).sum((-2, -1))
    return total / jnp.maximum(mask.sum((-2, -1)), 1)


def gradient_matching(residual: Array, mask: Array) -> Array:
    """Multi-scale gradient matching of each image: [..., H, W] -> [...].

    At every scale the absolute differences of horizontal and of vertical neighbours that are both valid, summed and
    divided by the number of valid pixels of that scale; the scales (every pixel, every 2nd, 4th, 8th) are added.
    """
    total = jnp.zeros(residual.shape[:-2], jnp.float32)
    for k in range(SCALES):
        r, m = residual[..., :: 2**k, :: 2**k], mask[..., :: 2**k, :: 2**k]
        across = jnp.where(m[..., :, 1:] & m[..., :, :-1], jnp.abs(r[..., :, 1:] - r[..., :, :-1]), 0.0)
        down = jnp.where(m[..., 1:, :] & m[..., :-1, :], jnp.abs(r[..., 1:, :] - r[..., :-1, :]), 0.0)
        total = total + (across.sum((-2, -1)) + down.sum((-2, -1))) / jnp.maximum(m.sum((-2, -1)), 1)
    return total


def relative_loss(
    pred: Array, target: Array, mask: Array, *, gradient_weight: float = 2.0
) -> tuple[Array, dict[str, Array]]:
    """L = L_ssi + gradient_weight L_gm, per image, averaged over the images that have something to say.

    Source: Depth Anything (CVPR 2024): affine-invariant mean absolute error on inverse depth, with the normalisation by
    median and mean absolute deviation of MiDaS (Ranftl et al., TPAMI 2022), whose gradient matching term is added with
    the weight of Depth Anything V2 (NeurIPS 2024), 2; MiDaS took .5. Nothing is trimmed: both trim because of
    labels that are wrong, and rendered depth is exact.

    Args:
      pred: [..., H, W] relative inverse depth of a network, larger = nearer.
      target: [..., H, W] inverse depth up to scale and shift (`inverse_depth_target`).
      mask: [..., H, W] bool, True = valid.
      gradient_weight: 0 leaves the term out of the program altogether.

    Returns:
      (loss, terms): a float32 scalar, and scalars for the log: `loss`, `ssi`, `gradient` (where used) and
      `valid_images`, the number of images that counted.
    """
    if not pred.shape == target.shape == mask.shape or pred.ndim < 2:
        raise ValueError(
            f"relative_loss: expected equal [..., H, W] shapes, got {pred.shape}, {target.shape}, {mask.shape}"
        )
    mask = mask.astype(bool)
    reference, counts = normalise(target, mask)
    residual = normalise(pred, mask)[0] - reference
    images = jnp.maximum(counts.sum(), 1)
    terms = {"ssi": jnp.where(counts, affine_invariant_mae(residual, mask), 0.0).sum() / images}
    loss = terms["ssi"]
    if gradient_weight:
        terms["gradient"] = jnp.where(counts, gradient_matching(residual, mask), 0.0).sum() / images
        loss = loss + gradient_weight * terms["gradient"]
    terms["loss"] = loss
    terms["valid_images"] = counts.sum(dtype=jnp.float32)
    return loss, terms
