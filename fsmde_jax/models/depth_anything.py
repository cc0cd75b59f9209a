"""Depth Anything V1 and V2 (Yang et al., CVPR 2024 and NeurIPS 2024): DINOv2 with a dense prediction head.

The relative models put out affine-invariant inverse depth, the metric ones depth in metres.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fsmde_jax.models.dpt import DPTHead
from fsmde_jax.models.vit import PATCH, DinoV2

Dtype = Any
Array = Any


@dataclasses.dataclass(frozen=True)
class Variant:
    """Sizes of one model; `VARIANTS` lists the known ones."""

    embed_dim: int
    depth: int  # blocks
    heads: int
    ffn: str  # one of `vit.FFN`
    taps: tuple[int, int, int, int]  # blocks that version 2 reads
    widths: tuple[int, int, int, int]  # of the head's levels, finest first
    fusion: int  # width of the head's fusion
    parameters: int  # trainable numbers in use

    def tapped(self, version: int) -> tuple[int, int, int, int]:
        """Blocks that are read: as listed for version 2, the last four for version 1."""
        if version not in (1, 2):
            raise ValueError(f"Depth Anything has versions 1 and 2, got {version}")
        return self.taps if version == 2 else tuple(range(self.depth - 4, self.depth))  # type: ignore[return-value]


# Small, base and large are the published sizes and giant the one of the official code; tiny is this project's own.
VARIANTS: dict[str, Variant] = {
    "tiny": Variant(192, 12, 3, "mlp", (2, 5, 8, 11), (24, 48, 96, 96), 48, 6_303_977),
    "small": Variant(384, 12, 6, "mlp", (2, 5, 8, 11), (48, 96, 192, 384), 64, 24_710_849),
    "base": Variant(768, 12, 12, "mlp", (2, 5, 8, 11), (96, 192, 384, 768), 128, 97_174_849),
    "large": Variant(1024, 24, 16, "mlp", (4, 11, 17, 23), (256, 512, 1024, 1024), 256, 334_134_465),
    "giant": Variant(1536, 40, 24, "swiglu", (9, 19, 29, 39), (1536, 1536, 1536, 1536), 384, 1_255_475_713),
}  # fmt: skip


class DepthAnything(nn.Module):
    """Depth of single images. Callers fold the camera axis into M.

    Attributes:
      variant: a name of `VARIANTS`, or sizes of one's own.
      max_depth: None = relative head (ReLU); a number of metres = metric head (sigmoid times that number).
      version: 1 or 2, which blocks are tapped; the weights' own.
      dtype: compute dtype; parameters, norms, softmax, residual sums and the last layer are float32.
      remat: compute the inside of every block again for the gradient, which saves memory on accelerators; XLA undoes it
        on a CPU.
      position_offset: 0.1 as in the official code, which the weights were trained with; 0 as in transformers 5
        (`vit.interpolate_positions`).
      attention: implementation, None = by platform (`vit.attend`).
      in_turn: one image after the other instead of all at once, for predictions on a CPU: it is faster there, as more
        of an image stays in the cache, and takes less memory. Not for training, as XLA's CPU gradients of convolutions
        inside loops are 20 times slower, nor for images that are spread over devices.
    """

    variant: str | Variant = "small"
    max_depth: float | None = None
    version: int = 2
    dtype: Dtype = jnp.float32
    remat: bool = False
    position_offset: float = 0.1
    attention: str | None = None
    in_turn: bool = False

    @property
    def patch(self) -> int:
        """Sides of its input are multiples of this, in pixels."""
        return PATCH

    @property
    def sizes(self) -> Variant:
        """The variant's numbers.

        Raises:
          ValueError: unknown name.
        """
        if isinstance(self.variant, Variant):
            return self.variant
        if self.variant not in VARIANTS:
            raise ValueError(f"unknown variant {self.variant!r}; known: {', '.join(VARIANTS)}")
        return VARIANTS[self.variant]

    @nn.compact
    def __call__(self, images: Array) -> dict[str, Any]:
        """Predicts.

        Args:
          images: [M, H, W, 3] float, normalised by ImageNet's mean and deviation; H and W multiples of 14.

        Returns:
          `rel_inv_depth` [M, H, W] float32 >= 0, larger = nearer, or `depth` [M, H, W] float32 in metres;
          `taps`: four token maps [M, H / 14, W / 14, C]; `features` [M, 8 H / 14, 8 W / 14, fusion]: the head's last
          feature map before its output convolutions.

        Raises:
          ValueError: H or W is not a multiple of 14, or the variant or version is unknown.
        """
        if not self.in_turn or images.shape[0] == 1:
            return self._predict(images)

        def one(module: "DepthAnything", carry: None, image: Array) -> tuple[None, dict[str, Any]]:
            return carry, module._predict(image[None])

        scan = nn.scan(one, variable_broadcast="params", split_rngs={"params": False})
        return jax.tree.map(lambda leaf: leaf[:, 0], scan(self, None, images)[1])

    def _predict(self, images: Array) -> dict[str, Any]:
        sizes = self.sizes
        taps = DinoV2(
            sizes.embed_dim, sizes.depth, sizes.heads, sizes.ffn, sizes.tapped(self.version), self.dtype, self.remat,
            self.position_offset, self.attention, name="pretrained",
        )(images)  # fmt: skip
        head = DPTHead(sizes.widths, sizes.fusion, PATCH, self.dtype, self.remat, name="depth_head")
        features, output = head(taps)
        if self.max_depth is None:
            result = {"rel_inv_depth": nn.relu(output)}
        else:
            result = {"depth": nn.sigmoid(output) * self.max_depth}
        return {**result, "taps": taps, "features": features}
