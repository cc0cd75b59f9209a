"""Bin distributions of a teacher against NumPy in float64, their invariance, and what happens to views without one."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax import interpolate
from fsmde_jax.losses import teacher_bins

B, N, H, W, K = 2, 3, 11, 13, 16


def _case(seed=0):
    """r [B, N, H, W] between 0 and about 8, and a mask that hides something else in every view."""
    rng = np.random.default_rng(seed)
    r = rng.gamma(2.0, 1.0, (B, N, H, W)).astype(np.float32)
    mask = rng.random((B, N, H, W)) < 0.8
    mask[0, 0] = True
    mask[1, 2, 4:] = False
    return r, mask


def _reference(r, mask, num_bins, tau):
    """Logits of METHOD's formula in float64, view by view; masked pixels 0."""
    logits = np.zeros((*r.shape, num_bins))
    anchors = 1 - (np.arange(num_bins) + 0.5) / num_bins
    for view in np.ndindex(*r.shape[:2]):
        values, seen = r[view].astype(np.float64), mask[view]
        low, high = np.percentile(values[seen], [2, 98])
        u = np.clip((values - low) / (high - low), 0, 1)
        logits[view] = np.where(seen[..., None], -np.abs(u[..., None] - anchors) / tau, 0.0)
    return logits


_soft_assign = jax.jit(teacher_bins.soft_assign, static_argnames=("num_bins", "tau_bin"))


def _assign(r, mask, num_bins=K, tau=None):
    return _soft_assign(jnp.asarray(r), num_bins=num_bins, tau_bin=tau or 1 / num_bins, mask=jnp.asarray(mask))


def _softmax(logits):
    return np.asarray(jax.nn.softmax(logits, -1), np.float64)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.03])
@pytest.mark.parametrize("percents", [(2, 98), (0, 50, 100), (33,)])
def test_percentiles_are_numpys_over_the_unmasked(share, percents):
    rng = np.random.default_rng(3)
    values = rng.normal(size=(4, 5, 157)).astype(np.float32)
    mask = rng.random(values.shape) < share
    mask[..., 7] = True  # at least one, in some rows the only one
    hidden = np.where(mask, values, np.where(rng.random(values.shape) < 0.5, np.nan, -1e9)).astype(np.float32)
    found = np.asarray(jax.jit(lambda v, m: teacher_bins.masked_percentiles(v, m, percents))(hidden, mask))
    for row in np.ndindex(4, 5):
        expected = np.percentile(values[row][mask[row]].astype(np.float64), percents)
        np.testing.assert_allclose(found[row], expected, rtol=1e-6, atol=1e-6)


def test_percentiles_of_a_large_row_stay_exact_in_position():
    """The 98th percentile of 0, 1, ..., P - 1 is .98 (P - 1), which float32 positions would miss."""
    size = 300_001
    values = jnp.arange(size, dtype=jnp.float32)[::-1]
    found = np.asarray(teacher_bins.masked_percentiles(values, values >= 0, (2, 98)))
    np.testing.assert_allclose(found, [6000.0, 294000.0], rtol=1e-7)


@pytest.mark.parametrize("tau", [1 / K, 0.3])
def test_logits_follow_the_formula(tau):
    r, mask = _case()
    logits, view_valid = _assign(r, mask, tau=tau)
    assert logits.shape == (B, N, H, W, K) and logits.dtype == jnp.float32
    assert np.asarray(view_valid).all() and view_valid.shape == (B, N)
    np.testing.assert_allclose(logits, _reference(r, mask, K, tau), atol=3e-5)


def test_masked_values_do_not_matter_at_all():
    r, mask = _case(1)
    rubbish = np.where(mask, r, np.where(np.arange(W) % 2, np.nan, 1e30)).astype(np.float32)
    logits, view_valid = _assign(rubbish, mask)
    assert np.asarray(view_valid).all()
    np.testing.assert_array_equal(logits, _assign(r, mask)[0])
    assert (np.asarray(logits)[~mask] == 0).all() and (np.asarray(logits)[mask] != 0).any(-1).all()


@pytest.mark.parametrize("num_bins", [16, 64])
@pytest.mark.parametrize("scale", [2.0**-10, 3 * 2.0**-11, 0.25, 1.0, 12.0, 1000.0])
@pytest.mark.parametrize("shift", [-10.0, 0.0, 10.0])
def test_affine_maps_of_the_teacher_change_nothing(num_bins, scale, shift):
    """On a grid of values for which s r + t itself is exact in float32, over the whole range of s and t."""
    _, mask = _case()
    r = np.random.default_rng(5).integers(0, 2**12, (B, N, H, W)) * 2.0**-9
    mapped = r * scale + shift
    assert (mapped.astype(np.float32) == mapped).all()
    before = _assign(r.astype(np.float32), mask, num_bins)[0]
    after, view_valid = _assign(mapped.astype(np.float32), mask, num_bins)
    assert np.asarray(view_valid).all()
    assert np.abs(_softmax(after) - _softmax(before)).max() < 1e-4


@pytest.mark.parametrize(
    "scale,shift", [(1e-3, 0.0), (1e-3, 0.01), (0.37, -10.0), (0.37, 10.0), (1e3, 7.7), (1e3, -10)]
)
def test_affine_maps_of_any_values_change_nothing(scale, shift):
    """Values that are rounded to float32, as a network's are; the shift is at most some times the spread."""
    r, mask = _case(2)
    mapped = (r.astype(np.float64) * scale + shift).astype(np.float32)
    assert np.abs(_softmax(_assign(mapped, mask, 64)[0]) - _softmax(_assign(r, mask, 64)[0])).max() < 1e-4


def test_a_negative_scale_is_another_distribution():
    r, mask = _case(2)
    assert np.abs(_softmax(_assign(-r, mask)[0]) - _softmax(_assign(r, mask)[0])).max() > 0.1


def test_larger_values_are_nearer_bins():
    """A ramp of relative inverse depth: the bin of highest probability goes from the last (far) to the first (near)."""
    r = np.broadcast_to(np.linspace(0.0, 1.0, 101, dtype=np.float32), (1, 1, 5, 101))
    best = np.asarray(_assign(r, np.ones(r.shape, bool))[0])[0, 0, 0].argmax(-1)
    assert best[0] == K - 1 and best[-1] == 0
    assert (np.diff(best) <= 0).all() and set(best) == set(range(K))


def test_a_metric_teacher_goes_through_its_inverse():
    depth = np.array([1.0, 2.0, 4.0, 50.0, 0.0, 1e-30], np.float32)
    value, gradient = jax.vmap(jax.value_and_grad(lambda d: teacher_bins.inverse_depth(d)))(jnp.asarray(depth))
    np.testing.assert_allclose(value, [1.0, 0.5, 0.25, 0.02, 1000.0, 1000.0], rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert teacher_bins.inverse_depth(jnp.ones((2,), jnp.bfloat16)).dtype == jnp.float32


def _degenerate():
    """Views: all masked, constant, one visible pixel, two visible pixels, constant but for masked pixels, usual."""
    rng = np.random.default_rng(9)
    r = rng.uniform(1, 2, (1, 6, H, W)).astype(np.float32)
    mask = np.ones(r.shape, bool)
    mask[0, 0] = False
    r[0, 1] = 0.7
    mask[0, 2:4] = False
    mask[0, 2, 3, 4] = True
    mask[0, 3, 3, 4:6] = True
    r[0, 4, 2:] = 1.3
    mask[0, 4, :2] = False
    return r, mask, np.array([[False, False, False, True, False, True]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_views_without_a_spread_are_flagged_and_finite(dtype):
    r, mask, expected = _degenerate()

    def total(a):
        logits, view_valid = teacher_bins.soft_assign(a, num_bins=K, tau_bin=1 / K, mask=jnp.asarray(mask))
        return jnp.sum(jax.nn.log_softmax(logits, -1)[..., 3]), (logits, view_valid)

    gradient, (logits, view_valid) = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(r, dtype))
    np.testing.assert_array_equal(view_valid, expected)
    assert logits.dtype == jnp.float32 and np.isfinite(logits).all() and np.isfinite(gradient).all()
    assert (np.asarray(logits)[~expected] == 0).all()
    gradient = np.asarray(gradient, np.float32)
    assert (gradient[~expected] == 0).all() and (gradient[~mask] == 0).all()
    assert (gradient[0, 5] != 0).any()


def test_a_constant_map_that_was_resized_is_still_flagged():
    r = jnp.full((1, 2, 35, 63), 0.1).at[0, 1, 3, 3].set(0.1001)
    small = teacher_bins.resize_rel_inv_depth(r, 11, 20)
    assert not np.asarray(_assign(small, np.ones(small.shape, bool))[1])[0, 0]


def test_a_broken_teacher_is_not_hidden():
    r, mask = _case()
    r[0, 1, 2, 2], mask[0, 1, 2, 2] = np.nan, True
    logits, view_valid = _assign(r, mask)
    assert np.isnan(logits[0, 1]).any() and view_valid[0, 1]
    assert np.isfinite(np.asarray(logits)[1]).all()


def test_gradients_are_those_of_float64_differences():
    r, mask = _case(4)
    weight = np.random.default_rng(0).normal(size=(B, N, H, W, K))

    @jax.jit
    @jax.grad
    def slope(a):
        return jnp.sum(teacher_bins.soft_assign(a, num_bins=K, tau_bin=0.2, mask=mask)[0] * weight)

    gradient = np.asarray(slope(r))

    def value(a):
        return float((_reference(a, mask, K, 0.2) * weight).sum())

    for view in np.ndindex(B, N):
        order = np.argsort(np.where(mask[view], r[view], np.inf), axis=None)[: mask[view].sum()]
        for flat in (order[0], order[1], order[len(order) // 2], order[-2]):  # percentiles depend on some of them
            index = (*view, *np.unravel_index(flat, (H, W)))
            h = 1e-6
            up, down = r.astype(np.float64), r.astype(np.float64)
            up[index] += h
            down[index] -= h
            expected = (value(up) - value(down)) / (2 * h)
            np.testing.assert_allclose(gradient[index], expected, rtol=2e-3, atol=2e-3)


def test_bfloat16_is_handled_in_float32():
    r, mask = _case(6)
    low = jnp.asarray(r, jnp.bfloat16)
    exact = np.asarray(low.astype(jnp.float32))
    np.testing.assert_allclose(_assign(low, mask, 64)[0], _reference(exact, mask, 64, 1 / 64), atol=1e-4)
    resized = teacher_bins.resize_rel_inv_depth(low, 5, 6)
    assert resized.dtype == jnp.float32
    np.testing.assert_allclose(resized, teacher_bins.resize_rel_inv_depth(jnp.asarray(exact), 5, 6), atol=1e-6)


@pytest.mark.parametrize(
    "size,filters",
    [((9, 16), ("area", "area")), ((22, 30), ("linear", "linear")), ((35, 20), ("linear", "area"))],
)
def test_resizing_is_by_area_or_bilinear_per_axis(size, filters):
    flags = {"area": cv2.INTER_AREA, "linear": cv2.INTER_LINEAR}
    r = np.random.default_rng(1).normal(size=(1, 2, 21, 29)).astype(np.float32)
    found = np.asarray(jax.jit(lambda a: teacher_bins.resize_rel_inv_depth(a, *size))(r))
    for n in range(2):
        rows = cv2.resize(r[0, n], (29, size[0]), interpolation=flags[filters[0]])
        expected = cv2.resize(rows, size[::-1], interpolation=flags[filters[1]])
        np.testing.assert_allclose(found[0, n], expected, atol=2e-5)


@pytest.mark.parametrize("size", [(7, 10), (10, 15), (9, 13), (40, 64)])
def test_a_resized_mask_keeps_only_what_saw_no_hidden_pixel(size):
    """Whatever the hidden pixels hold, the resized values that are kept are the same."""
    rng = np.random.default_rng(2)
    mask = np.ones((1, 2, 20, 30), bool)
    mask[0, 0, 14:, 8:21] = False
    mask[0, 1, 3, 5] = False
    r = rng.normal(size=mask.shape).astype(np.float32)
    kept = np.asarray(jax.jit(lambda m: teacher_bins.resize_mask(m, *size))(mask))
    assert kept.dtype == bool and kept.shape == (1, 2, *size)
    one, two = (np.asarray(teacher_bins.resize_rel_inv_depth(np.where(mask, r, x), *size)) for x in (0.0, 100.0))
    np.testing.assert_allclose(two[kept], one[kept], atol=0.1)
    assert (np.abs(two - one)[~kept] > 0.1).all()
    assert np.asarray(teacher_bins.resize_mask(np.ones((1, 1, 20, 30), bool), *size)).all()


def _two_hot_reference(depth, centers, smoothing):
    p = np.zeros((*depth.shape, centers.shape[-1]))
    for index in np.ndindex(*depth.shape):
        c, d = centers[index], float(depth[index])
        if d <= c[0]:
            p[index][0] = 1
        elif d >= c[-1]:
            p[index][-1] = 1
        else:
            k = int(np.searchsorted(c, d, side="right")) - 1
            share = (d - c[k]) / (c[k + 1] - c[k])
            p[index][k], p[index][k + 1] = 1 - share, share
    return p * (1 - smoothing) + smoothing / centers.shape[-1]


@pytest.mark.parametrize("per_pixel", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.01, 0.3])
def test_two_hot_is_numpys(per_pixel, smoothing):
    rng = np.random.default_rng(0)
    shape = (B, N, H, W) if per_pixel else (B, N, 1, 1)
    centers = np.sort(np.exp(rng.uniform(0, 4, (*shape, K))), -1).astype(np.float32)
    depth = np.exp(rng.uniform(-1, 5, (B, N, H, W))).astype(np.float32)
    if not per_pixel:
        depth[0, 0, 0, :K] = centers[0, 0, 0, 0, : depth.shape[-1]]  # exactly on centers
    found = jax.jit(lambda d, c: teacher_bins.two_hot(d, c, smoothing=smoothing))(depth, centers)
    full = np.broadcast_to(centers, (B, N, H, W, K)).astype(np.float64)
    np.testing.assert_allclose(found, _two_hot_reference(depth, full, smoothing), atol=2e-5)
    np.testing.assert_allclose(np.asarray(found).sum(-1), 1.0, atol=1e-6)
    assert found.dtype == jnp.float32


def test_two_hot_has_the_depth_as_expectation():
    centers = np.geomspace(0.5, 80.0, K).astype(np.float32).reshape(1, 1, 1, 1, K)
    depth = np.exp(np.random.default_rng(1).uniform(np.log(0.1), np.log(300), (1, 1, 40, 50))).astype(np.float32)
    p = np.asarray(teacher_bins.two_hot(depth, centers, smoothing=0.0), np.float64)
    np.testing.assert_allclose((p * centers).sum(-1), np.clip(depth, 0.5, 80.0), rtol=1e-5)
    assert ((p > 0).sum(-1) <= 2).all()


def test_two_hot_on_equal_centers_and_its_gradients():
    centers = np.array([1.0, 2.0, 2.0, 2.0, 5.0], np.float32).reshape(1, 1, 1, 1, 5)
    depth = np.array([0.5, 1.5, 2.0, 3.5, 9.0], np.float32).reshape(1, 1, 1, 5)
    p = np.asarray(teacher_bins.two_hot(depth, centers, smoothing=0.0))
    np.testing.assert_allclose((p * centers).sum(-1)[0, 0, 0], [1.0, 1.5, 2.0, 3.5, 5.0], rtol=1e-6)
    assert (p >= 0).all()
    np.testing.assert_allclose(p.sum(-1), 1.0, rtol=1e-6)

    def total(d, c):
        return jnp.sum(jnp.log(teacher_bins.two_hot(d, c, smoothing=0.05))[..., 1])

    by_depth, by_centers = jax.jit(jax.grad(total, argnums=(0, 1)))(depth, centers)
    assert np.isfinite(by_depth).all() and (np.asarray(by_centers) == 0).all()
    low = teacher_bins.two_hot(jnp.asarray(depth, jnp.bfloat16), jnp.asarray(centers, jnp.bfloat16))
    assert low.dtype == jnp.float32


def test_shapes_and_options_that_cannot_be_are_refused():
    r, mask = _case()
    with pytest.raises(ValueError, match="equal"):
        teacher_bins.soft_assign(r, num_bins=K, tau_bin=0.1, mask=mask[:, :1])
    for num_bins, tau in ((1, 0.1), (K, 0.0)):
        with pytest.raises(ValueError, match="tau_bin positive"):
            teacher_bins.soft_assign(r, num_bins=num_bins, tau_bin=tau, mask=mask)
    with pytest.raises(ValueError, match=r"expected \[B, N, H, W\]"):
        teacher_bins.resize_rel_inv_depth(r[0], 4, 4)
    with pytest.raises(ValueError, match="two_hot: centers"):
        teacher_bins.two_hot(r, np.ones((B, N, 1, W, K)))
    with pytest.raises(ValueError, match="two_hot: expected"):
        teacher_bins.two_hot(r, np.ones((B, N, K)))
    with pytest.raises(ValueError, match="smoothing"):
        teacher_bins.two_hot(r, np.ones((B, N, 1, 1, K)), smoothing=1.0)


def _labelled(seed=0, h=6, w=8):
    """r at head resolution [1, 3, h, w] and labels [1, 3, 2h, 2w] with their mask."""
    rng = np.random.default_rng(seed)
    r = rng.uniform(0.1, 1.0, (1, 3, h, w)).astype(np.float32)
    fine = np.asarray(interpolate.resize(jnp.asarray(r)[..., None], 2 * h, 2 * w, "bilinear"))[..., 0]
    depth = 1 / (0.3 * fine + 0.02) * np.exp(rng.normal(0, 0.2, fine.shape))
    return r, fine, depth.astype(np.float32), rng.random(fine.shape) < 0.4


def test_alignment_ties_two_percentiles_as_numpy_has_them():
    r, fine, depth, mask = _labelled()
    found, valid = teacher_bins.align_to_labels(r, depth, mask, min_depth=0.5, max_depth=30.0)
    assert np.asarray(valid).all()
    for view in range(3):
        x, d = (a[0, view][mask[0, view]].astype(np.float64) for a in (fine, depth))
        (low, high), (far, near) = np.percentile(x, (5, 95)), np.percentile(1 / d, (5, 95))
        s = (near - far) / (high - low)
        expected = 1 / np.clip(s * (r[0, view] - low) + far, 1 / 30.0, 1 / 0.5)
        np.testing.assert_allclose(found[0, view], expected, rtol=1e-4)


def test_alignment_finds_the_scale_and_shift_of_an_exact_map_through_bad_labels():
    """Least squares of the relative error is bent by the few far ones."""
    r, fine, _, mask = _labelled(h=24, w=32)
    depth = (1 / (0.3 * fine + 0.02)).astype(np.float32)
    truth = 1 / (0.3 * r + 0.02)
    limits = {"min_depth": 0.5, "max_depth": 80.0}
    found, _ = teacher_bins.align_to_labels(r, depth, mask, **limits)
    np.testing.assert_allclose(found, truth, rtol=1e-4)
    bad = np.random.default_rng(1).random(depth.shape) < 0.03  # e.g. points of what is hidden behind an edge
    found, _ = teacher_bins.align_to_labels(r, np.where(bad, 70.0, depth).astype(np.float32), mask, **limits)
    x, d = (a[mask].astype(np.float64) for a in (fine, np.where(bad, 70.0, depth)))
    (scale, shift), *_ = np.linalg.lstsq(np.stack([d * x, d], -1), np.ones(len(d)), rcond=None)
    off, bent = (np.median(np.abs(inverse * truth - 1)) for inverse in (1 / np.asarray(found), scale * r + shift))
    assert 0 < off < 0.05 and bent > 0.3


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shift", [-10.0, 0.0, 10.0])
def test_alignment_does_not_feel_an_affine_map(scale, shift):
    r, _, depth, mask = _labelled()
    limits = {"min_depth": 0.5, "max_depth": 80.0}
    plain, _ = teacher_bins.align_to_labels(r, depth, mask, **limits)
    if scale == 1e-3 and shift:  # float32 holds three digits of such a map
        shift *= 1e-3
    moved, valid = teacher_bins.align_to_labels(scale * r + shift, depth, mask, **limits)
    assert np.asarray(valid).all()
    np.testing.assert_allclose(moved, plain, rtol=2e-3)


def test_a_map_without_shift_is_scaled_by_the_median():
    r, fine, depth, mask = _labelled()
    mask[0, 2] = False
    mask[0, 2].flat[:11] = True  # an odd number
    found, valid = teacher_bins.align_to_labels(r, depth, mask, min_depth=0.5, max_depth=30.0, shift=False)
    assert np.asarray(valid).all()
    for view in range(3):
        scale = np.median((depth * fine)[0, view][mask[0, view]].astype(np.float64))
        np.testing.assert_allclose(found[0, view], np.clip(scale / r[0, view], 0.5, 30.0), rtol=1e-5)
    moved, _ = teacher_bins.align_to_labels(1e3 * r, depth, mask, min_depth=0.5, max_depth=30.0, shift=False)
    np.testing.assert_allclose(moved, found, rtol=1e-5)
    # A third of the labels far off: the median hardly moves, where two percentiles bend the view.
    odd = np.where(np.random.default_rng(1).random(depth.shape) < 0.3, 29.0, depth).astype(np.float32)
    robust, _ = teacher_bins.align_to_labels(r, odd, mask, min_depth=0.5, max_depth=30.0, shift=False)
    bent, straight = (
        teacher_bins.align_to_labels(r, labels, mask, min_depth=0.5, max_depth=30.0)[0] for labels in (odd, depth)
    )
    off, bent_by = (np.abs(np.log(a / b))[:, :2].max() for a, b in ((robust, found), (bent, straight)))
    assert off < 0.4 < bent_by
    few = mask.copy()
    few[0, 0] = False
    few[0, 0, 0, :9] = True  # nine labels
    hidden = np.where(few, depth, np.nan).astype(np.float32)
    found, valid = teacher_bins.align_to_labels(r, hidden, few, min_depth=0.5, max_depth=30.0, shift=False)
    assert np.asarray(valid).tolist() == [[False, True, True]] and np.isfinite(found).all()


def test_views_that_cannot_be_aligned_are_named_and_stay_finite():
    r, _, depth, mask = _labelled()
    few = mask.copy()
    few[0, 0] = False
    few[0, 0, 0, :9] = True  # nine labels
    r[0, 1] = 0.7  # says nothing
    depth[0, 2] = 7.0  # labels that do not say how depth changes
    found, valid = teacher_bins.align_to_labels(r, depth, few, min_depth=0.5, max_depth=30.0)
    assert not np.asarray(valid).any() and np.isfinite(found).all()
    hidden = np.where(mask, depth, np.nan).astype(np.float32)
    same, _ = teacher_bins.align_to_labels(_labelled()[0], hidden, mask, min_depth=0.5, max_depth=30.0)
    whole, _ = teacher_bins.align_to_labels(_labelled()[0], depth, mask, min_depth=0.5, max_depth=30.0)
    np.testing.assert_array_equal(same, whole)
    _, valid = teacher_bins.align_to_labels(_labelled()[0], depth, mask & False, min_depth=0.5, max_depth=30.0)
    assert not np.asarray(valid).any()
    with pytest.raises(ValueError, match="align_to_labels: expected"):
        teacher_bins.align_to_labels(r, depth[:, :2], mask, min_depth=0.5, max_depth=30.0)


@pytest.mark.parametrize("correlation", [0.3, 0.9, -0.5])
def test_a_view_fitted_to_the_student_has_its_range_and_the_teachers_shape(correlation):
    """Least squares would shrink the contrast by the correlation of the two, which is what the student is to learn."""
    rng = np.random.default_rng(3)
    shape = rng.normal(size=(2, 1, 1, 6, 8)).astype(np.float32)
    r = shape[0]
    student = correlation * shape[0] + np.sqrt(1 - correlation**2) * shape[1]
    depth = 1 / np.clip(0.2 + 0.03 * student, 0.05, None).astype(np.float32)
    mask = np.ones(depth.shape, bool)
    limits = {"min_depth": 0.1, "max_depth": 1e6}
    found, valid = teacher_bins.align_to_labels(r, depth, mask, **limits)
    assert np.asarray(valid).all()
    inverse, said = (1 / np.asarray(d, np.float64) for d in (found, depth))
    np.testing.assert_allclose(*(np.percentile(x, (5, 95)) for x in (inverse, said)), rtol=1e-4)
    assert np.corrcoef(inverse.ravel(), r.ravel())[0, 1] > 1 - 1e-6
    moved, _ = teacher_bins.align_to_labels(37 * r - 5, depth, mask, **limits)
    np.testing.assert_allclose(moved, found, rtol=1e-3)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_teacher_that_is_not_finite_is_not_left_out_in_silence(shift, value):
    r, _, depth, mask = _labelled()
    r[0, 1, 2, 3] = value
    found, valid = teacher_bins.align_to_labels(r, depth, mask, min_depth=0.5, max_depth=30.0, shift=shift)
    assert np.isnan(found[0, 1]).any() and np.isfinite(np.asarray(found)[0, ::2]).all()
    assert np.asarray(valid).all()


def test_depth_is_assigned_to_log_spaced_anchors():
    anchors = np.exp(np.linspace(np.log(1.0), np.log(32.0), 6))  # one octave apart
    depth = np.array([[[[1.0, 2.0, 2.0 * 2**0.25, 100.0]]]], np.float32)
    logits = np.asarray(teacher_bins.assign_depth(depth, anchors[None, None], tau_bin=0.5))
    octaves = np.abs(np.log2(depth)[..., None] - np.arange(6.0))
    np.testing.assert_allclose(logits, -octaves / 0.5, atol=1e-5)
    with pytest.raises(ValueError, match="tau_bin must be positive"):
        teacher_bins.assign_depth(depth, anchors[None, None], tau_bin=0.0)
    with pytest.raises(ValueError, match="assign_depth: expected"):
        teacher_bins.assign_depth(depth, anchors[None], tau_bin=1.0)
