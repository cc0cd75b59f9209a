"""What relations are made of: pooled tokens, their masks and directions, and which views are pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax.losses import relational
from tests.test_losses_relational import GRID, B, T, _nan_where_masked, _ring


@pytest.mark.parametrize("center", ["rig", "view"])
def test_no_direction_is_made_of_rounding(center):
    """Tokens that are all alike, of many channels: what one subtraction of the mean leaves is no direction."""
    rng = np.random.default_rng(11)
    channels = rng.uniform(-1, 1, (40, 1, 1, 1024)).astype(np.float32)
    tokens = np.broadcast_to(channels, (40, 6, T, 1024))
    mask = rng.random(tokens.shape[:-1]) < 0.9
    assert not np.any(relational.normalise_tokens(tokens, mask, center=center))
    # one token that differs is a direction, and so are the others: they lie opposite to it
    tokens = tokens[:1].copy()
    tokens[0, 2, 5] += 1e-2 * rng.normal(size=1024).astype(np.float32)
    found = np.asarray(relational.normalise_tokens(tokens, np.ones_like(mask[:1]), center="rig"))[0]
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(found[0, 0] @ found[2, 5], -1.0, rtol=1e-3)


def _cells(size, cells):
    """Overlap [cells, size] of equal cells with pixels, summing to 1."""
    out = np.zeros((cells, size))
    for c, p in np.ndindex(cells, size):
        out[c, p] = max(0.0, min((c + 1) * size / cells, p + 1) - max(c * size / cells, p))
    return out / out.sum(1, keepdims=True)


def test_tokens_are_means_over_the_same_rectangles_and_masks_go_with_them():
    rng = np.random.default_rng(9)
    features, mask = rng.normal(size=(B, 3, 5, 7, 4)).astype(np.float32), rng.random((B, 3, 5, 7)) < 0.5
    mask[0, 1] = False
    rows, columns = _cells(5, GRID[0]), _cells(7, GRID[1])
    plain = np.einsum("bnhwc,Hh,Ww->bnHWc", features.astype(np.float64), rows, columns)
    share = np.einsum("bnhw,Hh,Ww->bnHW", mask.astype(np.float64), rows, columns)
    total = np.einsum("bnhwc,Hh,Ww->bnHWc", features * mask[..., None].astype(np.float64), rows, columns)
    np.testing.assert_allclose(relational.tokens_of(features, GRID), plain, rtol=1e-5, atol=1e-6)
    seen = relational.tokens_of(_nan_where_masked(features, mask), GRID, mask)
    expected = np.where(share[..., None] > 0, total / np.maximum(share, 1e-9)[..., None], 0)
    np.testing.assert_allclose(seen, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(relational.token_mask(mask, GRID), share > 0.5 - 1e-6)
    # the same field at two resolutions gives the same tokens
    fine = np.repeat(np.repeat(features, 2, 2), 3, 3)
    np.testing.assert_allclose(relational.tokens_of(fine, GRID), plain, rtol=1e-5, atol=1e-6)


def test_a_token_half_masked_stays_and_one_more_than_half_masked_goes():
    mask = np.zeros((1, 1, 6, 10), bool)
    mask[0, 0, :3, :5] = True  # half of the left cell
    mask[0, 0, 3:, 5:] = True
    mask[0, 0, 3, 5] = False
    np.testing.assert_array_equal(relational.token_mask(mask, (1, 2)), [[[[True, False]]]])


def test_bin_tokens_are_pooled_distributions():
    rng = np.random.default_rng(10)
    logits, mask = rng.normal(0, 2, (B, 3, 4, 6, 8)).astype(np.float32), rng.random((B, 3, 4, 6)) < 0.8
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    pixels = (p * mask[..., None]).reshape(B, 3, 2, 2, 3, 2, 8).sum((3, 5))
    count = mask.reshape(B, 3, 2, 2, 3, 2).sum((3, 5))[..., None]
    found = relational.bin_tokens(_nan_where_masked(logits, mask), mask, GRID)
    np.testing.assert_allclose(found, pixels / np.maximum(count, 1), rtol=1e-5, atol=1e-7)

    def loss(z):  # the whole variant: finite, also from logits masked as NaN
        tokens = relational.bin_tokens(z, mask, GRID)
        return relational.relation_loss(tokens, found[..., ::-1], _ring(3), relational.token_mask(mask, GRID))

    gradient = np.asarray(jax.jit(jax.grad(loss))(_nan_where_masked(logits, mask)))
    assert np.isfinite(gradient).all() and gradient.any() and (gradient[~mask] == 0).all()


def test_adjacent_pairs_of_a_ring_without_dropped_views():
    yaw = np.deg2rad([0, 60, 120, 180, 240, 300])
    cam_to_ego = np.tile(np.eye(4), (B, 6, 1, 1))
    for i, a in enumerate(yaw):  # x right, y down, z forward; ego x forward, y left, z up
        cam_to_ego[:, i, :3, :3] = np.array([[np.sin(a), 0, np.cos(a)], [-np.cos(a), 0, np.sin(a)], [0, -1, 0]])
    focal = 50 / np.tan(np.deg2rad(35))  # 70 degrees at width 100
    intrinsics = np.tile([[focal, 0, 49.5], [0, focal, 30], [0, 0, 1]], (B, 6, 1, 1))
    view_mask = np.ones((B, 6), bool)
    view_mask[1, 2] = False
    arguments = [jnp.asarray(x, jnp.float32) for x in (cam_to_ego, intrinsics)]
    for intra in (False, True):
        expected = _ring(6, intra)
        run = jax.jit(functools.partial(relational.adjacent_pairs, intra=intra))
        np.testing.assert_array_equal(run(*arguments, 100), expected)
        expected[1, 2] = expected[1, :, 2] = False
        np.testing.assert_array_equal(run(*arguments, 100, view_mask), expected)
