"""SILog and chamfer against plain float64 loops; values and gradients where labels are few or absent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax.losses import supervised, total

B, N, H, W, K = 3, 4, 6, 7, 9


def _silog_reference(pred, target, mask, lam):
    values = []
    for b in range(pred.shape[0]):
        e = [np.log(float(pred[b][i])) - np.log(float(target[b][i])) for i in np.ndindex(*pred.shape[1:]) if mask[b][i]]
        if e:
            values.append(np.sqrt(max(np.mean(np.square(e)) - lam * np.mean(e) ** 2, 0.0)))
    return np.mean(values) if values else 0.0


def _chamfer_reference(centers, target, mask):
    values = []
    for b, n in np.ndindex(*centers.shape[:2]):
        c = np.log(centers[b, n].astype(np.float64))
        p = np.log(target[b, n][mask[b, n]].astype(np.float64))
        if p.size:
            distance = (c[:, None] - p[None]) ** 2
            values.append(distance.min(1).mean() + distance.min(0).mean())
    return np.mean(values) if values else 0.0


def _masks(shape, rng):
    none = np.zeros(shape, bool)
    one = none.copy()
    one[1, 2, 3, 4] = True
    some = rng.random(shape) < 0.3
    camera_out = some.copy()
    camera_out[:, 1] = False
    rig_out = some.copy()
    rig_out[0] = False
    return {"none": none, "one": one, "some": some, "camera_out": camera_out, "rig_out": rig_out, "all": ~none}


def _case(name, seed=0):
    rng = np.random.default_rng(seed)
    pred = np.exp(rng.uniform(-2, 5, (B, N, H, W))).astype(np.float32)
    target = np.exp(rng.uniform(-2, 5, (B, N, H, W))).astype(np.float32)
    centers = np.sort(np.exp(rng.uniform(-3, 6, (B, N, K))), -1).astype(np.float32)
    mask = _masks(target.shape, rng)[name]
    target = np.where(mask, target, 0.0).astype(np.float32)
    return pred, target, mask, centers


NAMES = ["none", "one", "some", "camera_out", "rig_out", "all"]


@pytest.mark.parametrize("lam", [0.0, 0.85, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_silog_value_and_gradient(name, lam):
    pred, target, mask, _ = _case(name)
    pred[~mask] = np.where(np.arange((~mask).sum()) % 2, 0.0, np.nan)  # what is masked must not matter at all
    value, gradient = jax.jit(jax.value_and_grad(lambda p: supervised.silog(p, target, mask, lam=lam)))(pred)
    np.testing.assert_allclose(value, _silog_reference(pred, target, mask, lam), rtol=1e-5, atol=1e-5)
    assert value.dtype == jnp.float32
    assert np.all(np.isfinite(gradient))
    assert np.all(np.asarray(gradient)[~mask] == 0)


def test_silog_gradient_is_that_of_float64_differences():
    pred, target, mask, _ = _case("camera_out")
    gradient = np.asarray(jax.grad(lambda p: supervised.silog(p, target, mask))(pred))
    for index in [tuple(i) for i in np.argwhere(mask)[::7]]:
        h = 1e-5 * float(pred[index])
        up, down = pred.astype(np.float64), pred.astype(np.float64)
        up[index] += h
        down[index] -= h
        expected = (_silog_reference(up, target, mask, 0.85) - _silog_reference(down, target, mask, 0.85)) / (2 * h)
        np.testing.assert_allclose(gradient[index], expected, rtol=2e-3, atol=1e-7)


def test_silog_of_a_perfect_prediction_is_zero_with_zero_gradient():
    _, target, mask, _ = _case("some")
    pred = np.where(mask, target, 3.0).astype(np.float32)
    for lam in (0.85, 1.0):
        value, gradient = jax.value_and_grad(lambda p, lam=lam: supervised.silog(p, target, mask, lam=lam))(pred)
        assert float(value) == 0.0
        assert np.all(np.asarray(gradient) == 0)


def test_silog_of_a_broken_prediction_is_not_hidden():
    target = jnp.full((1, 2, 2, 2), 5.0)
    pred = jnp.full((1, 2, 2, 2), 4.0).at[0, 1, 0, 0].set(jnp.nan)
    assert np.isnan(supervised.silog(pred, target, target > 0))
    assert np.isfinite(supervised.silog(pred, target, (target > 0).at[0, 1, 0, 0].set(False)))


def test_silog_pools_the_cameras_of_a_rig():
    """Two cameras, each off by its own constant factor: per view silog with lam = 1 would be 0, per rig it is not."""
    target = np.full((1, 2, 4, 5), 10.0, np.float32)
    pred = target * np.array([0.5, 2.0], np.float32)[None, :, None, None]
    np.testing.assert_allclose(supervised.silog(pred, target, target > 0, lam=1.0), np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(supervised.silog(target * 3.0, target, target > 0, lam=1.0), 0.0, atol=1e-6)


def test_silog_has_no_cancellation_in_float32():
    """A large common factor with a tiny spread: e^2 and the square of its mean agree to six digits."""
    rng = np.random.default_rng(1)
    target = np.full((1, 2, 40, 50), 20.0, np.float32)
    pred = (target * 4.0 * np.exp(rng.normal(0, 1e-3, target.shape))).astype(np.float32)
    expected = _silog_reference(pred, target, target > 0, 1.0)
    np.testing.assert_allclose(supervised.silog(pred, target, target > 0, lam=1.0), expected, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_chamfer_value_and_gradient(name):
    _, target, mask, centers = _case(name)
    value, gradient = jax.jit(jax.value_and_grad(lambda c: supervised.bin_chamfer(c, target, mask)))(centers)
    np.testing.assert_allclose(value, _chamfer_reference(centers, target, mask), rtol=1e-5, atol=1e-5)
    assert np.all(np.isfinite(gradient))
    for index in [(0, 0, 0), (1, 2, 4), (2, 3, K - 1), (0, 1, 3)]:
        h = 1e-6 * float(centers[index])
        up, down = centers.astype(np.float64), centers.astype(np.float64)
        up[index] += h
        down[index] -= h
        expected = (_chamfer_reference(up, target, mask) - _chamfer_reference(down, target, mask)) / (2 * h)
        np.testing.assert_allclose(gradient[index], expected, rtol=1e-3, atol=1e-6)


def test_chamfer_ignores_the_order_of_centers_and_what_is_masked():
    _, target, mask, centers = _case("some", seed=3)
    shuffled = np.random.default_rng(0).permuted(centers, axis=-1)
    rubbish = np.where(mask, target, np.nan).astype(np.float32)
    np.testing.assert_allclose(
        supervised.bin_chamfer(shuffled, rubbish, mask), _chamfer_reference(centers, target, mask), rtol=1e-5
    )


@pytest.mark.parametrize("depths", [[5.0], [0.01], [500.0], [2.0, 2.0], [2.0, 8.0]])
def test_chamfer_with_labels_outside_between_and_on_centers(depths):
    centers = np.array([[[1.0, 2.0, 4.0, 8.0]]], np.float32)
    target = np.zeros((1, 1, 3, 3), np.float32)
    target[0, 0].flat[: len(depths)] = depths
    value = supervised.bin_chamfer(centers, target, target > 0)
    np.testing.assert_allclose(value, _chamfer_reference(centers, target, target > 0), rtol=1e-5, atol=1e-7)


def test_chamfer_is_lean_in_memory():
    """K x H x W distances of six views at 176x320 with 64 centers would take 86 MB; the program may use a fifth."""
    shape = (1, 6, 176, 320)
    arguments = (
        jax.ShapeDtypeStruct((1, 6, 64), jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.bool_),
    )
    compiled = jax.jit(jax.value_and_grad(supervised.bin_chamfer)).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 86e6 / 5


def test_shapes_are_checked():
    pred, target, mask, centers = _case("some")
    with pytest.raises(ValueError, match="silog"):
        supervised.silog(pred[..., None], target[..., None], mask[..., None])
    with pytest.raises(ValueError, match="silog"):
        supervised.silog(pred[:, :1], target, mask)
    with pytest.raises(ValueError, match="bin_chamfer"):
        supervised.bin_chamfer(centers[:, :2], target, mask)


def _batch(target):
    rng = np.random.default_rng(5)
    return {
        "depth": target,
        "ego_mask": rng.random(target.shape) < 0.8,
        "view_mask": np.array([[True] * N, [True, False] * (N // 2), [True] * N]),
    }


def test_supervised_loss_is_the_weighted_sum_over_valid_labels():
    pred, target, _, centers = _case("all")
    batch = _batch(target)
    options = {"min_depth": 1.0, "max_depth": 60.0, "silog_lambda": 0.85}
    valid = (target > 1.0) & (target < 60.0) & batch["ego_mask"] & batch["view_mask"][:, :, None, None]
    outputs = {"pred_depth": jnp.asarray(pred), "view_bin_centers": jnp.asarray(centers)}
    loss, terms = total.supervised_loss(outputs, batch, chamfer_weight=0.1, **options)
    silog, chamfer = _silog_reference(pred, target, valid, 0.85), _chamfer_reference(centers, target, valid)
    np.testing.assert_allclose(loss, silog + 0.1 * chamfer, rtol=1e-5)
    np.testing.assert_allclose([terms["silog"], terms["chamfer"], terms["loss"]], [silog, chamfer, loss], rtol=1e-5)
    assert float(terms["valid_pixels"]) == valid.sum()
    loss, terms = total.supervised_loss(outputs, batch, chamfer_weight=0.0, **options)
    np.testing.assert_allclose(loss, silog, rtol=1e-5)
    assert "chamfer" not in terms


def test_range_limits_are_strict():
    depth = np.array([1.0, 1.5, 80.0, 0.0], np.float32).reshape(1, 1, 1, 4)
    batch = {"depth": depth, "ego_mask": np.ones(depth.shape, bool), "view_mask": np.ones((1, 1), bool)}
    assert total.label_mask(batch, min_depth=1.0, max_depth=80.0).ravel().tolist() == [False, True, False, False]


@pytest.mark.parametrize("name", NAMES)
def test_supervised_loss_is_finite_for_every_mask(name):
    pred, target, mask, centers = _case(name)
    batch = _batch(target) | {"ego_mask": mask}

    def loss(p, c):
        outputs = {"pred_depth": p, "view_bin_centers": c}
        return total.supervised_loss(
            outputs, batch, min_depth=0.1, max_depth=200.0, silog_lambda=0.85, chamfer_weight=0.1
        )[0]

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(jnp.asarray(pred), jnp.asarray(centers))
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g)) for g in gradients)


def test_disagreeing_shapes_are_refused():
    pred, target, _, centers = _case("all")
    with pytest.raises(ValueError, match="must agree"):
        total.supervised_loss(
            {"pred_depth": pred[..., :-1], "view_bin_centers": centers}, _batch(target),
            min_depth=0.1, max_depth=80.0, silog_lambda=0.85, chamfer_weight=0.1,
        )  # fmt: skip
