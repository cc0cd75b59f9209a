"""What a frozen teacher tells the student, made inside the student's jitted step: maps, tokens and bin distributions.

In short, inside the step (parameters and batch are arguments of it)::

    images = normalise_images(batch["clean_images"])  # the student's crop and flip, without its colour jitter
    maps = run_teacher(teacher_module, teacher_params, images, size=(350, 630))  # or cached_maps(batch)
    logits, view_valid, mask = teacher_distribution(
        maps, batch["ego_mask"], view_mask=batch["view_mask"], kind="soft_assign", head_size=(176, 320), num_bins=64,
        tau_bin=0.0)

No gradient reaches the teacher or its images.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsmde_jax import interpolate
from fsmde_jax.errors import ConfigError
from fsmde_jax.losses import teacher_bins
from fsmde_jax.models.teacher_images import resize_for_teacher

Array = Any  # jax.Array

KINDS = ("soft_assign", "aligned", "two_hot")  # made here; `learned` logits come from `models.teacher_head.TeacherBins`


class Labels(NamedTuple):
    """What `aligned` fits a teacher's map to, and the bins that it goes to."""

    depth: Array  # [B, N, H, W] metres
    mask: Array  # [B, N, H, W] bool, True = valid label
    anchors: Array  # [B, N, K] metres (`depth_bins.log_anchors`)
    min_depth: float
    max_depth: float
    shift: bool = True  # whether the map's shift is unknown, too (`teacher_bins.align_to_labels`)


class TeacherMaps(NamedTuple):
    """A teacher's outputs for a batch of rigs; None = not there. A pytree."""

    rel_inv_depth: Array  # [B, N, Ht, Wt] float32, larger = nearer; 1/m of a metric teacher
    depth: Array | None = None  # [B, N, Ht, Wt] float32 metres, of a metric teacher
    tokens: Array | None = None  # [B, N, gh, gw, C] of one tap, compute dtype of the teacher
    features: Array | None = None  # [B, N, hf, wf, F], the head's last feature map, for `TeacherBins`


def run_teacher(
    module: Any, params: Any, images: Array, *, size: tuple[int, int], tap: int = -1, parts: int = 1
) -> TeacherMaps:
    """Runs a frozen teacher on the student's images.

    Args:
      module: `Teacher.module(dtype)`, a `DepthAnything` or `StudentTeacher`; its compute dtype is the teacher's.
      params: the teacher's. To be an ARGUMENT of the jitted step: a closed-over array is baked into the program.
      images: [B, N, H, W, 3], normalised (`models.student.normalise_images`), with the student's crop and flip. The
        teacher should not see colour jitter: take `clean_images` of `train_dataset(clean_images=True)`.
      size: (Ht, Wt) of the teacher's input, multiples of its patch (`teacher_images.teacher_size`).
      tap: which of the four taps gives the tokens; -1 = the last.
      parts: so many parts of the batch, one after the other, each of every `parts`-th rig: less memory.

    Returns:
      `TeacherMaps`, without gradient.

    Raises:
      ConfigError: `size` is not of positive multiples of the patch.
    """
    b, n = images.shape[:2]
    if parts > 1:
        split = jnp.swapaxes(images.reshape(-1, parts, *images.shape[1:]), 0, 1)
        maps = jax.lax.map(lambda part: run_teacher(module, params, part, size=size, tap=tap), split)
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(b, *x.shape[2:]), maps)
    x = resize_for_teacher(jax.lax.stop_gradient(images), *size, module.patch)
    outputs = module.apply({"params": jax.lax.stop_gradient(params)}, x.reshape(b * n, *x.shape[2:]))

    def unfold(leaf: Array) -> Array:
        return jax.lax.stop_gradient(leaf.reshape(b, n, *leaf.shape[1:]))

    depth = unfold(outputs["depth"].astype(jnp.float32)) if "depth" in outputs else None
    r = unfold(outputs["rel_inv_depth"].astype(jnp.float32)) if depth is None else teacher_bins.inverse_depth(depth)
    return TeacherMaps(r, depth, unfold(outputs["taps"][tap]), unfold(outputs["features"]))


def cached_maps(batch: Mapping[str, Array]) -> TeacherMaps:
    """Maps of a batch that was read with a teacher cache: `teacher_rel_inv_depth` and, if there, `teacher_tokens`.

    The map is at head resolution already. Tokens are pooled already, [B, N, 6, 10, C] float16. A metric teacher's depth
    is not kept, so `two_hot` needs the teacher itself.
    """
    tokens = batch.get("teacher_tokens")
    return TeacherMaps(batch["teacher_rel_inv_depth"].astype(jnp.float32), None, tokens, None)


def pool_tokens(tokens: Array, grid: tuple[int, int]) -> Array:
    """Tokens [B, N, gh, gw, C] -> [B, N, *grid, C] float32 by exact area weights: cells cover the same rectangles."""
    return interpolate.resize(tokens.astype(jnp.float32), *grid, "area")


def pixel_mask(ego_mask: Array, view_mask: Array | None, head_size: tuple[int, int]) -> Array:
    """Pixels [B, N, h, w] bool that count: not the ego body, camera present. Sky counts.

    Args:
      ego_mask: [B, N, H, W] bool, True = not the ego body.
      view_mask: [B, N] bool, True = camera present; None = all are.
      head_size: (h, w).
    """
    mask = teacher_bins.resize_mask(ego_mask, *head_size)
    return mask if view_mask is None else mask & view_mask.astype(bool)[:, :, None, None]


def teacher_distribution(
    maps: TeacherMaps,
    mask: Array,
    *,
    kind: str,
    head_size: tuple[int, int],
    num_bins: int,
    tau_bin: float,
    centers: Array | None = None,
    labels: Labels | None = None,
    view_mask: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Bin logits of the teacher at the student's head resolution: resized, THEN normalised, THEN binned.

    Args:
      maps: of `run_teacher` or `cached_maps`.
      mask: `ego_mask` [B, N, H, W] bool at any size, True = not the ego body. Sky stays in.
      kind: `soft_assign`: affine-invariant, per view (`teacher_bins.soft_assign`); `aligned`: each view fitted to its
        labels by what the map leaves open (`teacher_bins.align_to_labels`); `two_hot`: a metric teacher's depth on the
        student's centers (`teacher_bins.two_hot`), for the probability term alone.
      head_size: (h, w) of the student's bin logits.
      num_bins: K.
      tau_bin: temperature of `soft_assign`, in units of its range, 0 = 1 / K; of `aligned`, in bin widths, 0 = 1.
      centers: the student's `bin_centers`, [B, N, 1, 1, K] or [B, N, h, w, K] metres; `two_hot` only, no gradient.
      labels: `aligned` only.
      view_mask: [B, N] bool, False = camera absent; None = all are there.

    Returns:
      (logits [B, N, h, w, K] float32, nearest bin first; view_valid [B, N] bool, False also where the map is constant;
      pixel mask [B, N, h, w] bool, False also everywhere in views that are not valid). Where the pixel mask is False
      the logits are 0.

    Raises:
      ConfigError: an unknown kind, a negative `tau_bin`, or `two_hot` without a metric teacher's depth.
      ValueError: shapes that do not fit.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind = {kind!r}: expected one of {KINDS} (`learned` logits come from TeacherBins)")
    if not tau_bin >= 0:
        raise ConfigError(f"tau_bin = {tau_bin}: expected a temperature above 0, or 0 for one bin")
    visible = pixel_mask(mask, view_mask, head_size)
    r = jax.lax.stop_gradient(teacher_bins.resize_rel_inv_depth(maps.rel_inv_depth, *head_size))
    if kind == "soft_assign":
        tau = tau_bin or 1.0 / num_bins
        logits, view_valid = teacher_bins.soft_assign(r, num_bins=num_bins, tau_bin=tau, mask=visible)
        return logits, view_valid, visible & view_valid[:, :, None, None]
    if kind == "aligned":
        if labels is None or labels.anchors.shape[-1] != num_bins:
            raise ValueError(f"aligned: expected labels with {num_bins} anchors, got {labels and labels.anchors.shape}")
        depth, view_valid = teacher_bins.align_to_labels(
            r, labels.depth, labels.mask, min_depth=labels.min_depth, max_depth=labels.max_depth, shift=labels.shift
        )
        view_valid = view_valid & teacher_bins.varies(r, visible)
        logits = teacher_bins.assign_depth(depth, labels.anchors, tau_bin=tau_bin or 1.0)
        visible = visible & view_valid[:, :, None, None]
        return jnp.where(visible[..., None], logits, 0.0), view_valid, visible
    if maps.depth is None:
        raise ConfigError(
            "two_hot needs a metric teacher run in the step, but this one gives relative inverse depth"
            " (or is read from a cache); use soft_assign"
        )
    if centers is None or centers.shape[-1] != num_bins:
        found = None if centers is None else centers.shape
        raise ValueError(f"two_hot: expected the student's centers [B, N, 1, 1, {num_bins}] or per pixel, got {found}")
    depth = jax.lax.stop_gradient(teacher_bins.resize_rel_inv_depth(maps.depth, *head_size))
    logits = jnp.log(teacher_bins.two_hot(depth, centers))
    view_valid = teacher_bins.varies(r, visible)
    visible = visible & view_valid[:, :, None, None]
    return jnp.where(visible[..., None], logits, 0.0), view_valid, visible
