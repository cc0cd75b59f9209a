"""The student: images of a rig and their calibration in, metric depth of every view out."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fsmde_jax.errors import ConfigError
from fsmde_jax.expectation import expected_depth
from fsmde_jax.models import decoder, depth_bins, efficientnet_lite, resnet
from fsmde_jax.models.batch_norm import fold
from fsmde_jax.models.cross_view import CrossView

Dtype = Any
Array = Any

IMAGE_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB in [0, 1]: what the pretrained encoders expect
IMAGE_STD = (0.229, 0.224, 0.225)
STRIDE = 32  # image sizes are multiples of it
ENCODER_SCOPE, DECODER_SCOPE = "backbone", "decoder"  # their entries in params and batch_stats


def normalise_images(images: Array, dtype: Dtype = jnp.float32) -> Array:
    """uint8 RGB [..., 3] -> (x / 255 - mean) / std of ImageNet, computed in float32."""
    scale = 1.0 / (255.0 * np.asarray(IMAGE_STD))
    shift = -np.asarray(IMAGE_MEAN) / np.asarray(IMAGE_STD)
    return (images.astype(jnp.float32) * scale.astype(np.float32) + shift.astype(np.float32)).astype(dtype)


def make_encoder(encoder: str, dtype: Dtype = jnp.float32, name: str | None = None) -> nn.Module:
    """The encoder module called `encoder`; its call gives five taps, its `channels` their widths."""
    if encoder in resnet.VARIANTS:
        return resnet.resnet(encoder, dtype, name)
    return efficientnet_lite.EfficientNetLite(variant=encoder, dtype=dtype, name=name)


def fold_batch_norm(encoder: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    """{"params", "batch_stats"} of a student with this encoder -> the same function without statistics.

    Every BatchNorm's scale is multiplied into the convolution before it (`batch_norm.fold`), in float64.
    """
    of_encoder = resnet.EPSILON if encoder in resnet.VARIANTS else efficientnet_lite.EPSILON
    epsilons = {ENCODER_SCOPE: of_encoder, DECODER_SCOPE: decoder.EPSILON}
    return {"params": fold(variables["params"], variables["batch_stats"], epsilons), "batch_stats": {}}


class Student(nn.Module):
    """Encoder, optional cross-view mixing, light decoder and depth-bin head, shared by all cameras of a rig.

    Nothing depends on the number or the order of the cameras. Build it with `registry.build_student`, which checks
    the names.

    Attributes:
      encoder: a key of `registry.ENCODERS`.
      decoder_channels: at strides 2, 4, 8, 16, 32.
      bins, probabilities, num_bins: of the head (`depth_bins.DepthBins`).
      expectation: how depth comes from the bins, log | depth (`expectation.expected_depth`).
      min_depth, max_depth: metres that every camera within `focal_range` must be able to reach.
      focal_canonical: f_0, pixels at network width 640.
      focal_range: smallest and largest fx, pixels at network width 640, augmentation included.
      cross_view_blocks: attention blocks over adjacent views at stride 32; 0 = off.
      dtype: compute dtype of encoder, mixing and decoder; parameters and the head are float32.
    """

    encoder: str = "resnet18"
    decoder_channels: tuple[int, ...] = (16, 32, 64, 128, 256)
    bins: str = "log"
    probabilities: str = "softmax"
    expectation: str = "log"
    num_bins: int = 64
    min_depth: float = 0.1
    max_depth: float = 80.0
    focal_canonical: float = 500.0
    focal_range: tuple[float, float] = (300.0, 600.0)
    cross_view_blocks: int = 0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        images: Array,
        intrinsics: Array,
        cam_to_ego: Array | None = None,
        *,
        train: bool,
        view_mask: Array | None = None,
    ) -> dict[str, Any]:
        """Predicts depth.

        Args:
          images: [B, N, H, W, 3] float, normalised (`normalise_images`); H and W multiples of 32.
          intrinsics: [B, N, 3, 3] pixels at H x W.
          cam_to_ego: [B, N, 4, 4]; needed for cross-view mixing only.
          train: normalise by the batch and update `batch_stats`.
          view_mask: [B, N] bool, False = view dropped: it touches neither batch statistics nor other views. Its own
            outputs are there, but mean nothing.

        Returns:
          `pred_depth` [B, N, H, W] metres, never clipped; `bin_logits` [B, N, H/2, W/2, K]; `bin_centers`
          [B, N, 1, 1, K], or [B, N, H/2, W/2, K] for `attractor`, metres, nearest first; `view_bin_centers` [B, N, K]
          metres; all float32. `features` [B, N, H/8, W/8, C] of the decoder and `taps`, the encoder's features at
          strides 2, 4, 8, 16, 32, in the compute dtype.

        Raises:
          ConfigError: the image size is no multiple of 32, or cross-view mixing lacks `cam_to_ego`.
        """
        b, n, h, w, _ = images.shape
        if h % STRIDE or w % STRIDE:
            raise ConfigError(f"data.image_size: height and width must be multiples of {STRIDE}, got {h}x{w}")
        if intrinsics.shape != (b, n, 3, 3):
            raise ValueError(f"intrinsics have shape {intrinsics.shape}, expected {(b, n, 3, 3)}")
        mask = None
        if view_mask is not None and train:
            # With every view dropped the statistics of nothing would be NaN: take all of them then.
            mask = (view_mask | ~jnp.any(view_mask)).reshape(b * n, 1, 1, 1)

        def unfold(x: Array) -> Array:
            return x.reshape(b, n, *x.shape[1:])

        x = images.reshape(b * n, h, w, 3)
        taps = make_encoder(self.encoder, self.dtype, ENCODER_SCOPE)(x, train=train, mask=mask)
        deepest = taps[-1]
        if self.cross_view_blocks:
            if cam_to_ego is None:
                raise ConfigError("model.cross_view_blocks > 0 needs the camera poses (cam_to_ego)")
            mixed = CrossView(self.cross_view_blocks, STRIDE, self.dtype, name="cross_view")(
                unfold(deepest), intrinsics, cam_to_ego, view_mask
            )
            deepest = mixed.reshape(deepest.shape)
        levels = decoder.Decoder(self.decoder_channels, self.dtype, name=DECODER_SCOPE)(
            (*taps[:-1], deepest), train=train, mask=mask
        )
        depth_range = depth_bins.canonical_range(self.min_depth, self.max_depth, self.focal_canonical, self.focal_range)
        head = depth_bins.DepthBins(self.bins, self.probabilities, self.num_bins, depth_range, name="depth_bins")
        ratio = depth_bins.focal_ratio(intrinsics.astype(jnp.float32), w, self.focal_canonical).reshape(b * n)
        descriptor = jnp.mean(levels[-1].astype(jnp.float32), (1, 2))
        out = head(levels[0], descriptor, ratio, levels[3::-1] if self.bins == "attractor" else ())
        depth = expected_depth(jax.nn.softmax(out["bin_logits"], -1), out["bin_centers"], self.expectation)
        out["pred_depth"] = depth_bins.resize_depth(depth, h, w)
        out["features"] = levels[2]
        return {**{key: unfold(value) for key, value in out.items()}, "taps": tuple(unfold(tap) for tap in taps)}
