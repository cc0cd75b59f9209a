"""DINOv2 vision transformer (Oquab et al., TMLR 2024), as the backbone of a dense prediction head.

Sub-modules are called as in the official state dict (`blocks_3/attn/qkv` = `blocks.3.attn.qkv`), so that loading
weights is a walk over the parameter paths (`fsmde_jax.teacher_weights`). Patches are 14 x 14 pixels; the position
embedding is a grid of 37 x 37 (518 pixels) that is interpolated for any other size.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fsmde_jax import interpolate

Dtype = Any
Array = Any

PATCH = 14  # pixels
GRID = 37  # patches along one side of the position embedding

_INIT = nn.initializers.truncated_normal(0.02)  # the official initialisation of all projections


class PatchProjection(nn.Module):
    """Linear map of each 14 x 14 patch, written as one matrix product; [M, H, W, 3] -> [M, H / 14, W / 14, features].

    A convolution with this kernel and stride gives the same numbers, but its gradient is slow.
    """

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        m, height, width, channels = images.shape
        kernel = self.param("kernel", _INIT, (PATCH, PATCH, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        h, w = height // PATCH, width // PATCH
        x = images.astype(self.dtype).reshape(m, h, PATCH, w, PATCH, channels).swapaxes(2, 3)
        x = x.reshape(m, h, w, PATCH * PATCH * channels)
        return x @ kernel.astype(self.dtype).reshape(-1, self.features) + bias.astype(self.dtype)


class PatchEmbed(nn.Module):
    """Holds the projection under its official name, `patch_embed.proj`."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        return PatchProjection(self.features, self.dtype, name="proj")(images)


def interpolate_positions(positions: Array, h: int, w: int, offset: float = 0.1) -> Array:
    """Position embedding of a grid of h x w patches: [1, 1 + 37 * 37, C] -> [1, 1 + h * w, C], float32.

    Bicubic without antialias. The official code asks PyTorch for the scale (h + 0.1) / 37 instead of h / 37 (and so for
    the width), which moves every sample a little; the weights were trained with that. transformers 5 asks for the size
    instead, which is `offset` = 0. Both leave the grid alone at its own size.
    """
    positions = positions.astype(jnp.float32)
    if (h, w) == (GRID, GRID):
        return positions
    grid = positions[0, 1:].reshape(GRID, GRID, -1)
    rows, columns = (interpolate.resize_matrix(GRID, n, "bicubic", (n + offset) / GRID) for n in (h, w))
    grid = jnp.einsum("hwc,Hh,Ww->HWc", grid, rows, columns, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([positions[:, :1], grid.reshape(1, h * w, -1)], 1)


def _attend_by_heads(qkv: Array) -> Array:
    """Attention image after image, its heads side by side: on a CPU, few scores at a time stay near the cache, and
    heads of their own keep all cores busy. All at once took twice as long, head after head a quarter longer."""

    def one_head(query: Array, key: Array, value: Array) -> Array:  # [T, width] each
        scores = jnp.einsum("tc,sc->ts", query * query.shape[-1] ** -0.5, key, preferred_element_type=jnp.float32)
        scores = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        out = jnp.einsum("ts,sc->tc", scores.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return (out / scores.sum(-1, keepdims=True)).astype(value.dtype)

    def one_image(qkv: Array) -> Array:  # [T, 3, heads, width]
        return jnp.stack([one_head(*(qkv[:, i, head] for i in range(3))) for head in range(qkv.shape[2])], 1)

    return jax.lax.map(one_image, qkv)


def _attend_fused(qkv: Array, implementation: str) -> Array:
    query, key, value = (qkv[:, :, i] for i in range(3))
    return jax.nn.dot_product_attention(query, key, value, implementation=implementation)  # type: ignore[call-overload]


def _flash_runs() -> bool:
    """Whether the devices here are NVIDIA GPUs that cuDNN's flash attention supports."""
    devices = jax.devices()
    if "cuda" not in devices[0].client.platform_version:
        return False
    return all(float(device.compute_capability) >= 8 for device in devices)


def attend(qkv: Array, implementation: str | None = None) -> Array:
    """Softmax attention of each head over all tokens: [M, T, 3, heads, width] -> [M, T, heads, width].

    Scores and softmax are float32 in any compute dtype. The form is chosen for the platform that the program is
    compiled for: image after image on CPU, cuDNN's flash attention on NVIDIA GPUs from compute capability 8.0 (Ampere)
    in 16-bit dtypes, XLA's elsewhere.

    Args:
      qkv: queries, keys and values.
      implementation: of `jax.nn.dot_product_attention`, "xla" or "cudnn", for every platform; None = as said above.
    """
    if implementation is not None:
        return _attend_fused(qkv, implementation)
    forms: dict[str, Any] = {"cpu": _attend_by_heads, "default": functools.partial(_attend_fused, implementation="xla")}
    if qkv.dtype in (jnp.bfloat16, jnp.float16) and _flash_runs():
        forms["cuda"] = functools.partial(_attend_fused, implementation="cudnn")
    return jax.lax.platform_dependent(qkv, **forms)


class Attention(nn.Module):
    """Multi-head self-attention; [M, T, C] -> [M, T, C]."""

    heads: int
    dtype: Dtype = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        m, tokens, channels = x.shape
        qkv = nn.Dense(3 * channels, dtype=self.dtype, kernel_init=_INIT, name="qkv")(x)
        out = attend(qkv.reshape(m, tokens, 3, self.heads, channels // self.heads), self.implementation)
        return nn.Dense(channels, dtype=self.dtype, kernel_init=_INIT, name="proj")(out.reshape(x.shape))


def gelu(x: Array) -> Array:
    """x Phi(x) by the error function, as PyTorch's default; float32 inside."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 2**-0.5))).astype(x.dtype)


class Mlp(nn.Module):
    """Two layers with exact GELU and four times the width between them."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = gelu(nn.Dense(4 * x.shape[-1], dtype=self.dtype, kernel_init=_INIT, name="fc1")(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=_INIT, name="fc2")(y)


class SwiGlu(nn.Module):
    """SiLU-gated layer of the giant model (Shazeer 2020); two thirds of the Mlp's inner width, in steps of 8."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inner = (4 * x.shape[-1] * 2 // 3 + 7) // 8 * 8
        y = nn.Dense(2 * inner, dtype=self.dtype, kernel_init=_INIT, name="w12")(x)
        y = nn.silu(y[..., :inner]) * y[..., inner:]
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=_INIT, name="w3")(y)


FFN: dict[str, type[Mlp] | type[SwiGlu]] = {"mlp": Mlp, "swiglu": SwiGlu}


class LayerScale(nn.Module):
    """Multiplies every channel by a learned number (Touvron et al., ICCV 2021)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return x * self.param("gamma", nn.initializers.ones, (x.shape[-1],))


def _norm(dtype: Dtype, name: str) -> nn.LayerNorm:
    # Statistics are float32; the two-pass variance does not cancel where activations are far from zero.
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)


class Block(nn.Module):
    """Pre-norm attention and feed-forward layers, each scaled and added; [M, T, C] float32 -> [M, T, C] float32.

    The sum stays float32: rounded to bfloat16 after every layer, the last tap was twice as far from float32.
    """

    heads: int
    ffn: str = "mlp"
    dtype: Dtype = jnp.float32
    attention: str | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = Attention(self.heads, self.dtype, self.attention, name="attn")(_norm(self.dtype, "norm1")(x))
        x = x + LayerScale(name="ls1")(y)
        y = FFN[self.ffn](self.dtype, name="mlp")(_norm(self.dtype, "norm2")(x))
        return x + LayerScale(name="ls2")(y)


class DinoV2(nn.Module):
    """The backbone.

    Attributes:
      embed_dim: channels.
      depth: number of blocks.
      heads: attention heads of each block.
      ffn: feed-forward layer, one of `FFN`.
      taps: indices of the blocks whose outputs are returned.
      dtype: compute dtype; parameters, statistics and the residual sum are float32.
      remat: forget what happens inside the blocks and compute it again for the gradient.
      position_offset: see `interpolate_positions`.
      attention: see `attend`.
    """

    embed_dim: int = 384
    depth: int = 12
    heads: int = 6
    ffn: str = "mlp"
    taps: tuple[int, ...] = (2, 5, 8, 11)
    dtype: Dtype = jnp.float32
    remat: bool = False
    position_offset: float = 0.1
    attention: str | None = None

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, ...]:
        """Runs the backbone.

        Args:
          images: [M, H, W, 3], normalised; H and W multiples of 14.

        Returns:
          One token map [M, H / 14, W / 14, C] for each tap, after the final norm, without the class token.

        Raises:
          ValueError: H or W is not a positive multiple of 14.
        """
        m, height, width, _ = images.shape
        if min(height, width) < PATCH or height % PATCH or width % PATCH:
            raise ValueError(f"images are {height} x {width}; both sides must be multiples of {PATCH} pixels")
        h, w, channels = height // PATCH, width // PATCH, self.embed_dim
        class_token = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, channels))
        positions = self.param("pos_embed", _INIT, (1, 1 + GRID * GRID, channels))
        patches = PatchEmbed(channels, self.dtype, name="patch_embed")(images).reshape(m, h * w, channels)
        x = jnp.concatenate([jnp.broadcast_to(class_token, (m, 1, channels)), patches.astype(jnp.float32)], 1)
        x = x + interpolate_positions(positions, h, w, self.position_offset)
        block = nn.remat(Block) if self.remat else Block
        norm = _norm(self.dtype, "norm")
        taps = []
        for i in range(max(self.taps) + 1):
            x = block(self.heads, self.ffn, self.dtype, self.attention, name=f"blocks_{i}")(x)
            if i in self.taps:
                taps.append(norm(x)[:, 1:].reshape(m, h, w, channels))
        return tuple(taps)
