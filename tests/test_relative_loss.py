"""The relative loss against plain float64 loops, its invariance, and gradients where valid pixels are few or absent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax.losses import relative

B, N, H, W = 2, 3, 19, 26
loss_of = jax.jit(relative.relative_loss)
slope_of = jax.jit(jax.value_and_grad(relative.relative_loss, has_aux=True), static_argnames="gradient_weight")
edges_of = jax.jit(relative.gradient_matching)
NAMES = ["none", "one", "two", "some", "image_out", "all"]


def _case(name, seed=0):
    """Prediction, target [B, N, H, W] and mask; what is masked is rubbish on both sides."""
    rng = np.random.default_rng(seed)
    target = 1 / rng.uniform(2, 60, (B, N, H, W))
    target[..., :4, :] = 0.0  # sky
    pred = 3 * target + 0.1 * rng.normal(size=target.shape)
    mask = np.zeros(target.shape, bool)
    if name == "one":
        mask[1, 1, 8, 9] = True
    elif name == "two":
        mask[1, 1, 8, 9:11] = True
    elif name in ("some", "image_out"):
        mask = rng.random(target.shape) < 0.7
        mask[0, 0] &= name == "some"
    elif name == "all":
        mask[:] = True
    rubbish = np.where(np.arange(W) % 2, np.nan, -1e20)
    return (np.where(mask, x, rubbish).astype(np.float32) for x in (pred, target)), mask


def _reference(pred, target, mask):
    """(ssi, gradient) of Depth Anything and MiDaS, pixel by pixel in float64, mean over images with a target spread."""
    ssi, gradient = [], []
    for image in np.ndindex(*pred.shape[:-2]):
        seen = mask[image]
        if not seen.any() or np.ptp(target[image][seen]) == 0:
            continue
        normalised = []
        for x in (pred[image].astype(np.float64), target[image].astype(np.float64)):
            centred = x - np.median(x[seen])
            scale = np.mean(np.abs(centred[seen]))
            normalised.append(centred / (scale if scale > 0 else 1.0))
        residual = normalised[0] - normalised[1]
        ssi.append(np.mean(np.abs(residual[seen])))
        total = 0.0
        for step in (1, 2, 4, 8):
            r, m = residual[::step, ::step], seen[::step, ::step]
            part = 0.0
            for y, x in np.argwhere(m):
                if x + 1 < m.shape[1] and m[y, x + 1]:
                    part += abs(r[y, x + 1] - r[y, x])
                if y + 1 < m.shape[0] and m[y + 1, x]:
                    part += abs(r[y + 1, x] - r[y, x])
            total += part / max(m.sum(), 1)
        gradient.append(total)
    return (np.mean(ssi), np.mean(gradient), len(ssi)) if ssi else (0.0, 0.0, 0)


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_value_terms_and_finite_gradient(name, weight):
    (pred, target), mask = _case(name)

    (loss, terms), slope = slope_of(pred, target, mask, gradient_weight=weight)
    ssi, gradient, images = _reference(pred, target, mask)
    np.testing.assert_allclose(terms["ssi"], ssi, rtol=2e-5, atol=1e-6)
    assert ("gradient" in terms) == (weight > 0)
    if weight:
        np.testing.assert_allclose(terms["gradient"], gradient, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(loss, ssi + weight * gradient, rtol=2e-5, atol=1e-6)
    assert float(terms["loss"]) == float(loss) and float(terms["valid_images"]) == images
    assert loss.dtype == jnp.float32
    slope = np.asarray(slope)
    assert np.isfinite(slope).all() and (slope[~mask] == 0).all()
    assert (np.abs(slope).max() > 1e-3) == (name in ("some", "image_out", "all"))  # any two pixels are affine-equal


def test_default_weight_is_that_of_depth_anything_v2():
    (pred, target), mask = _case("some")
    loss, terms = loss_of(pred, target, mask)
    np.testing.assert_allclose(loss, terms["ssi"] + 2 * terms["gradient"], rtol=1e-6)


def test_gradient_is_that_of_float64_differences():
    (pred, target), mask = _case("image_out")
    slope = np.asarray(
        jax.jit(jax.grad(lambda p: relative.relative_loss(p, target, mask, gradient_weight=0.7)[0]))(pred)
    )

    def value(p):
        ssi, gradient, _ = _reference(p, target, mask)
        return ssi + 0.7 * gradient

    median_pixels = []
    for image in np.ndindex(B, N):
        values = np.where(mask[image], pred[image], np.inf)
        middle = np.argsort(values, axis=None)[mask[image].sum() // 2]
        median_pixels.append((*image, *np.unravel_index(middle, (H, W))))
    for index in [*median_pixels[1:3], *(tuple(i) for i in np.argwhere(mask)[::311])]:
        h = 1e-7
        up, down = pred.astype(np.float64), pred.astype(np.float64)
        up[index] += h
        down[index] -= h
        np.testing.assert_allclose(slope[index], (value(up) - value(down)) / (2 * h), rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("scale,shift", [(1e-3, 0.0), (0.05, 10.0), (7.0, -10.0), (1e3, 4.0)])
def test_positive_affine_maps_of_either_side_change_nothing(scale, shift):
    (pred, target), mask = _case("some", seed=2)
    expected = float(loss_of(pred, target, mask)[0])
    mapped_pred, mapped_target = (
        (x.astype(np.float64) * scale + shift).astype(np.float32) for x in (pred, target * np.float32(20))
    )
    np.testing.assert_allclose(loss_of(mapped_pred, target, mask)[0], expected, rtol=2e-4)
    np.testing.assert_allclose(loss_of(pred, mapped_target, mask)[0], expected, rtol=2e-4)
    per_image = np.random.default_rng(0).uniform(0.5, 2, (2, B, N, 1, 1)).astype(np.float32)
    np.testing.assert_allclose(loss_of(pred * per_image[0] + per_image[1], target, mask)[0], expected, rtol=2e-4)


def test_zero_where_affine_equal_and_not_where_inverted():
    (_, target), mask = _case("some", seed=3)
    equal, _ = loss_of(target * 4 + 0.3, target, mask)
    assert 0 <= float(equal) < 1e-4
    inverted, terms = loss_of(-target, target, mask)
    assert float(terms["ssi"]) > 1.0 and float(inverted) > float(terms["ssi"])


def test_gradient_matching_sees_edges_that_the_mean_error_does_not():
    """Residuals of one size everywhere, as a step, as stripes and as a checkerboard, in closed form."""
    mask = jnp.ones((16, 16), bool)
    step = jnp.where(jnp.arange(16) < 8, 0.5, -0.5) * jnp.ones((16, 1))
    stripes = jnp.where(jnp.arange(16) % 2 == 0, 0.5, -0.5) * jnp.ones((16, 1))
    mae = [float(relative.affine_invariant_mae(r, mask)) for r in (step, stripes)]
    assert mae == [0.5, 0.5]
    # one edge per row at each scale: 1/16 + 1/8 + 1/4 + 1/2; 15 edges per row, constant when subsampled: 15/16
    np.testing.assert_allclose(edges_of(step, mask), 15 / 16, rtol=1e-6)
    np.testing.assert_allclose(edges_of(stripes, mask), 15 / 16, rtol=1e-6)
    np.testing.assert_allclose(edges_of(step.T, mask), 15 / 16, rtol=1e-6)
    fine = stripes * stripes.T * 2
    np.testing.assert_allclose(edges_of(fine, mask), 2 * 15 / 16, rtol=1e-6)
    assert float(edges_of(jnp.full((16, 16), 3.0), mask)) == 0.0


def test_gradient_matching_prefers_a_sharp_edge():
    """Target: two planes. A prediction whose edge is blurred is worse than one whose values are off elsewhere."""
    target = np.where(np.arange(32) < 16, 1.0, 0.2)[None] * np.ones((24, 1))
    blurred = np.clip((20 - np.arange(32)) / 8, 0, 1)[None] * 0.8 + 0.2 + np.zeros((24, 1))
    mask = np.ones(target.shape, bool)
    sharp, soft = (loss_of(p, target, mask)[1]["gradient"] for p in (target * 2 + 1, blurred))
    assert float(sharp) < 1e-5 < 0.05 < float(soft)


@pytest.mark.parametrize("level", [0.0, 5.0])
def test_a_constant_prediction_can_leave_its_place(level):
    """Its gradient is bounded and points towards the target; a step along that of the first term alone helps."""
    target = np.broadcast_to(np.linspace(0.1, 0.5, W, dtype=np.float32) ** 2, (1, H, W))
    mask = np.ones(target.shape, bool)
    for weight in (0.0, 2.0):
        (value, _), slope = slope_of(jnp.full(target.shape, level), target, mask, gradient_weight=weight)
        assert np.isfinite(value) and 0 < np.abs(slope).max() < 1.0
        assert float((slope * (target - target.mean())).sum()) < 0
        if not weight:
            step = 0.01 * slope / np.abs(slope).max()
            assert float(slope_of(level - step, target, mask, gradient_weight=weight)[0][0]) < 0.9 * float(value)


def test_a_constant_target_is_left_out():
    (pred, target), mask = _case("all")
    expected = float(loss_of(pred[:, 1:], target[:, 1:], mask[:, 1:])[0])
    target[:, 0] = 0.1
    loss, terms = loss_of(pred, target, mask)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert float(terms["valid_images"]) == B * (N - 1)


@pytest.mark.parametrize("side", ["pred", "target"])
def test_a_broken_value_is_not_hidden(side):
    (pred, target), mask = _case("all")
    (pred if side == "pred" else target)[0, 1, 5, 5] = np.nan
    assert np.isnan(loss_of(pred, target, mask)[0])
    mask[0, 1, 5, 5] = False
    assert np.isfinite(loss_of(pred, target, mask)[0])


def test_targets_of_dense_and_of_sparse_depth():
    depth = np.array([[[0.0, 2.0], [0.0, 8.0]]], np.float32)
    mask = np.array([[[True, True], [False, True]]])
    target, valid = relative.inverse_depth_target(depth, mask, zero_is_far=True)
    np.testing.assert_array_equal(target, [[[0.0, 0.5], [0.0, 0.125]]])
    np.testing.assert_array_equal(valid, mask)
    target, valid = relative.inverse_depth_target(depth, mask, zero_is_far=False)
    np.testing.assert_array_equal(valid, [[[False, True], [False, True]]])
    assert target.dtype == jnp.float32 and np.isfinite(target).all()


def test_bfloat16_is_handled_in_float32_and_shapes_are_checked():
    (pred, target), mask = _case("all")
    low = jnp.asarray(pred, jnp.bfloat16)
    ssi, gradient, _ = _reference(np.asarray(low.astype(jnp.float32)), target, mask)
    loss, _ = loss_of(low, target, mask)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, ssi + 2 * gradient, rtol=2e-5)
    with pytest.raises(ValueError, match="equal"):
        loss_of(pred[:1], target, mask)
    with pytest.raises(ValueError, match="must agree"):
        relative.inverse_depth_target(pred, mask[0], zero_is_far=True)
