"""Optional mixing of views at the coarsest scale: every view attends to its neighbours on the rig."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fsmde_jax import geometry

Dtype = Any
Array = Any

FREQUENCIES = (1.0, 2.0, 4.0, 8.0)


def ray_directions(intrinsics: Array, cam_to_ego: Array, height: int, width: int, stride: int) -> Array:
    """Unit viewing rays [B, N, height, width, 3] in the ego frame through the centres of `stride` x `stride` cells.

    Args:
      intrinsics: [B, N, 3, 3] pixels at (height * stride) x (width * stride); cam_to_ego: [B, N, 4, 4].
    """
    v = (jnp.arange(height, dtype=jnp.float32) + 0.5) * stride - 0.5
    u = (jnp.arange(width, dtype=jnp.float32) + 0.5) * stride - 0.5
    grid = jnp.stack([*jnp.meshgrid(u, v), jnp.ones((height, width), jnp.float32)], -1)
    inverse = jnp.linalg.inv(intrinsics.astype(jnp.float32))
    cam_to_ego_rotation = cam_to_ego[..., :3, :3].astype(jnp.float32)
    # HIGHEST: accelerators round float32 products otherwise.
    rays = jnp.einsum("bnij,bnjk,hwk->bnhwi", cam_to_ego_rotation, inverse, grid, precision=jax.lax.Precision.HIGHEST)
    return rays / jnp.linalg.norm(rays, axis=-1, keepdims=True)


class CrossViewBlock(nn.Module):
    """Pre-norm attention over a view's own and its adjacent views' tokens, then a small MLP; both residual.

    Who is adjacent comes from the calibration (`geometry.adjacency`), so any rig works and no camera order is assumed.
    Tokens know where they look through their viewing ray in the ego frame. Both output projections start at zero: a
    fresh block is the identity. A view is always among its own keys, so that a view without neighbours stays defined.

    Attributes:
      width: inner width of the attention; heads: number of heads.
      dtype: compute dtype; parameters stay float32.
    """

    width: int = 256
    heads: int = 4
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, rays: Array, adjacency: Array) -> Array:
        """[B, N, h, w, C] -> [B, N, h, w, C].

        Args:
          x: features of the views.
          rays: [B, N, h, w, 3] unit viewing rays in the ego frame.
          adjacency: [B, N, N] bool.
        """
        b, n, h, w, c = x.shape
        tokens = x.reshape(b, n * h * w, c)
        waves = jnp.concatenate([f(k * rays) for k in FREQUENCIES for f in (jnp.sin, jnp.cos)], -1)
        place = nn.Dense(self.width, dtype=self.dtype, name="place")(waves.reshape(b, n * h * w, -1))
        visible = adjacency | jnp.eye(n, dtype=bool)
        mask = jnp.repeat(jnp.repeat(visible, h * w, -1), h * w, -2)[:, None]  # [B, 1, N h w, N h w]

        y = nn.LayerNorm(dtype=self.dtype, name="norm1")(tokens)
        query = nn.Dense(self.width, dtype=self.dtype, name="query")(y) + place
        key = nn.Dense(self.width, dtype=self.dtype, name="key")(y) + place
        value = nn.Dense(self.width, dtype=self.dtype, name="value")(y)
        split = (b, n * h * w, self.heads, self.width // self.heads)
        y = jax.nn.dot_product_attention(query.reshape(split), key.reshape(split), value.reshape(split), mask=mask)
        y = y.reshape(b, n * h * w, self.width)
        tokens = tokens + nn.Dense(c, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="out")(y)

        y = nn.LayerNorm(dtype=self.dtype, name="norm2")(tokens)
        y = nn.gelu(nn.Dense(2 * self.width, dtype=self.dtype, name="mlp_hidden")(y), approximate=False)
        tokens = tokens + nn.Dense(c, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="mlp_out")(y)
        return tokens.reshape(b, n, h, w, c)


class CrossView(nn.Module):
    """`blocks` blocks of `CrossViewBlock` on the features at `stride`; zero blocks are no parameters and no change."""

    blocks: int
    stride: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, intrinsics: Array, cam_to_ego: Array, view_mask: Array | None = None) -> Array:
        """[B, N, h, w, C] -> [B, N, h, w, C].

        Args:
          x: features; intrinsics: [B, N, 3, 3] pixels at network resolution; cam_to_ego: [B, N, 4, 4].
          view_mask: [B, N] bool, False = view dropped: nobody attends to it.
        """
        h, w = x.shape[2:4]
        adjacency = geometry.adjacency(cam_to_ego, intrinsics, w * self.stride, view_mask)
        rays = ray_directions(intrinsics, cam_to_ego, h, w, self.stride)
        for i in range(self.blocks):
            x = CrossViewBlock(dtype=self.dtype, name=f"block_{i}")(x, rays, adjacency)
        return x
