"""Teacher signals inside the step: distributions and their invariances, masks, gradients, dtypes, the learned head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fsmde_jax import teacher_signal
from fsmde_jax.errors import ConfigError
from fsmde_jax.losses import total
from fsmde_jax.models.depth_anything import DepthAnything, Variant
from fsmde_jax.models.teacher_head import TeacherBins
from fsmde_jax.models.teacher_images import resize_for_teacher
from fsmde_jax.teacher_signal import TeacherMaps, run_teacher, teacher_distribution
from tests import random_teacher
from tests.toy_teacher import CHANNELS, ToyModule, params

B, N, H, W, K = 2, 3, 32, 64, 16
SIZE, HEAD = (28, 56), (16, 32)
NETWORK = Variant(16, 4, 2, "mlp", (0, 1, 2, 3), (4, 8, 8, 8), 8, 0)


def _images(seed=0):
    coarse = np.random.default_rng(seed).normal(size=(B, N, 5, 9, 3))
    return jnp.asarray(jax.image.resize(coarse, (B, N, H, W, 3), "cubic"), jnp.float32)


def _ego():
    mask = np.ones((B, N, H, W), bool)
    mask[:, ::2, -6:, 10:40] = False
    return jnp.asarray(mask)


@functools.partial(jax.jit, static_argnames=("kind", "num_bins", "tau_bin", "max_depth"))
def _signal(p, images, mask, view_mask=None, centers=None, *, kind="soft_assign", num_bins=K, tau_bin=0.0,
            max_depth=None):  # fmt: skip
    maps = run_teacher(ToyModule(max_depth), p, images, size=SIZE)
    return teacher_distribution(
        maps, mask, kind=kind, head_size=HEAD, num_bins=num_bins, tau_bin=tau_bin, centers=centers, view_mask=view_mask
    )


def _p(logits):
    return np.asarray(jax.nn.softmax(logits, -1))


@functools.cache
def _network():
    """A real network of toy size with random parameters, and its run in two dtypes (params are an argument)."""
    module = DepthAnything(NETWORK)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *SIZE, 3)))["params"]
    rng = np.random.default_rng(0)

    def fill(leaf):
        width = np.sqrt(2 / np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 0.1
        return rng.normal(0, width, leaf.shape).astype(np.float32)

    p = jax.tree.map(fill, shapes)
    p["depth_head"]["scratch"]["output_conv2_2"]["bias"] += 3.0
    count = {"traces": 0}

    @functools.partial(jax.jit, static_argnames="dtype")
    def run(p, images, dtype="float32"):
        count["traces"] += 1
        return run_teacher(DepthAnything(NETWORK, dtype=jnp.dtype(dtype)), p, images, size=SIZE)

    return p, run, count


def test_maps_are_those_of_the_network_on_the_folded_resized_images():
    p, run, count = _network()
    images = _images()
    maps = run(p, images)
    assert maps.rel_inv_depth.shape == (B, N, *SIZE) and maps.rel_inv_depth.dtype == jnp.float32
    assert maps.depth is None and maps.tokens.shape == (B, N, 2, 4, 16) and maps.features.shape == (B, N, 16, 32, 8)
    assert float(maps.rel_inv_depth.std()) > 1e-3
    other = jax.tree.map(lambda leaf: 1.1 * leaf, p)
    again = run(other, images)
    assert count["traces"] == 1 and not np.allclose(again.rel_inv_depth, maps.rel_inv_depth)


def test_permuted_cameras_give_permuted_maps():
    p, run, _ = _network()
    order = np.array([2, 0, 1])
    images = _images()
    a, b = run(p, images), run(p, images[:, order])
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(one)[:, order], other, rtol=1e-4, atol=1e-5)
    logits = [_signal(params(), x, _ego()[:, o])[0] for x, o in ((images, slice(None)), (images[:, order], order))]
    np.testing.assert_allclose(np.asarray(logits[0])[:, order], logits[1], atol=1e-4)


def test_bfloat16_stays_near_float32():
    p, run, _ = _network()
    exact, rough = run(p, _images()), run(p, _images(), dtype="bfloat16")
    assert rough.tokens.dtype == jnp.bfloat16 and rough.rel_inv_depth.dtype == jnp.float32
    spread = float(exact.rel_inv_depth.max() - exact.rel_inv_depth.min())
    assert float(jnp.abs(rough.rel_inv_depth - exact.rel_inv_depth).mean()) < 0.005 * spread
    options = {"kind": "soft_assign", "head_size": HEAD, "num_bins": K, "tau_bin": 0.0}
    a, b = (_p(teacher_distribution(m, _ego(), **options)[0]) for m in (exact, rough))
    distance = 0.5 * np.abs(a - b).sum(-1)  # total variation
    assert 1e-6 < distance.mean() < 0.05


def test_no_gradient_reaches_the_teacher_or_its_images():
    p = params()

    def total_of(p, images):
        maps = run_teacher(ToyModule(), p, images, size=SIZE)
        logits, _, _ = teacher_distribution(
            maps, _ego(), kind="soft_assign", head_size=HEAD, num_bins=K, tau_bin=0.3
        )  # fmt: skip
        return jnp.sum(logits[..., 2]) + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(maps))

    gradients = jax.jit(jax.grad(total_of, argnums=(0, 1)))(p, _images())
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradients))


def test_parameters_are_not_baked_into_the_program():
    p, module = random_teacher.params(), DepthAnything("tiny")
    images = jnp.zeros((1, 1, 28, 28, 3))

    def constants(function, *args):
        return sum(np.size(c) for c in jax.make_jaxpr(function)(*args).consts)

    assert constants(lambda p, x: run_teacher(module, p, x, size=(28, 28)), p, images) < 10_000
    closed = jax.tree.map(jnp.asarray, p)
    assert constants(lambda x: run_teacher(module, closed, x, size=(28, 28)), images) > 5_000_000  # what it looks like


@pytest.mark.parametrize("scale,shift", [(1e-3, 0.0), (1e-3, 10.0), (1e-3, -10.0), (0.3, 10.0), (1e3, -10.0)])
def test_affine_maps_of_the_teacher_change_nothing(scale, shift):
    """From the images to the distribution; the map's spread is some thousands, so that float32 holds s r + t."""
    before = _signal(params(gain=1500.0), _images(), _ego(), num_bins=64)
    after = _signal(params(gain=1500.0, scale=scale, shift=shift), _images(), _ego(), num_bins=64)
    assert np.asarray(before[1]).all() and np.asarray(after[1]).all()
    assert np.abs(_p(before[0]) - _p(after[0])).max() < 1e-4
    turned = _signal(params(gain=1500.0, scale=-1.0), _images(), _ego(), num_bins=64)
    assert np.abs(_p(before[0]) - _p(turned[0])).max() > 0.1


def test_the_distribution_is_resized_first_then_normalised_by_visible_pixels():
    """Against NumPy: area weights to half the size (exact means of 2x2), percentiles, anchors."""
    rng = np.random.default_rng(3)
    r = rng.uniform(0, 5, (1, 2, 8, 12)).astype(np.float32)
    mask = np.ones(r.shape, bool)
    mask[0, 0, 5:, :4] = False
    maps = TeacherMaps(jnp.asarray(r))
    logits, valid, visible = teacher_distribution(
        maps, jnp.asarray(mask), kind="soft_assign", head_size=(4, 6), num_bins=8, tau_bin=0.0
    )
    small = r.astype(np.float64).reshape(1, 2, 4, 2, 6, 2).mean((3, 5))
    seen = mask.reshape(1, 2, 4, 2, 6, 2).all((3, 5))
    np.testing.assert_array_equal(visible, seen)
    anchors = 1 - (np.arange(8) + 0.5) / 8
    for i in range(2):
        low, high = np.percentile(small[0, i][seen[0, i]], [2, 98])
        u = np.clip((small[0, i] - low) / (high - low), 0, 1)
        expected = -np.abs(u[..., None] - anchors) * 8
        expected[~seen[0, i]] = 0
        np.testing.assert_allclose(logits[0, i], expected, atol=1e-4)
    assert np.asarray(valid).all()


def test_ego_body_pixels_change_nothing_else_and_sky_stays():
    images, mask = _images(), _ego()
    maps = run_teacher(ToyModule(), params(), images, size=SIZE)
    options = {"kind": "soft_assign", "head_size": HEAD, "num_bins": K, "tau_bin": 0.0}
    logits, _, visible = teacher_distribution(maps, mask, **options)
    # Rubbish in teacher pixels that only body pixels of the head cover: rows from 24 of 28, columns 14 to 30 of 56.
    r = maps.rel_inv_depth.at[:, ::2, 24:, 14:30].set(1e4)
    np.testing.assert_array_equal(logits, teacher_distribution(maps._replace(rel_inv_depth=r), mask, **options)[0])
    assert not np.asarray(visible)[:, ::2, -3:, 5:20].any() and (np.asarray(logits)[~np.asarray(visible)] == 0).all()
    sky = maps.rel_inv_depth.at[:, :, :6].set(-50.0)  # r of sky: the farthest there is
    logits, _, visible = teacher_distribution(maps._replace(rel_inv_depth=sky), mask, **options)
    assert np.asarray(visible)[:, :, :3].all()
    assert (np.asarray(logits)[:, :, :2].argmax(-1) == K - 1).all()


def test_absent_and_flat_views_are_reported():
    images, view_mask = _images(), jnp.asarray([[True, False, True], [True, True, True]])
    images = images.at[1, 2].set(0.0)
    images = images.at[1, 1].set(0.5)
    p = params() | {"scale": jnp.float32(0.0)}
    logits, valid, visible = _signal(params(), images, _ego(), view_mask)
    np.testing.assert_array_equal(valid, view_mask)
    assert not np.asarray(visible)[0, 1].any() and (np.asarray(logits)[0, 1] == 0).all()
    _, valid, visible = _signal(p, images, _ego(), view_mask)
    assert not np.asarray(valid).any() and not np.asarray(visible).any()
    gone = _signal(params(), images, _ego().at[0, 0].set(False))
    assert not gone[1][0, 0] and np.isfinite(gone[0]).all()


def test_a_mirrored_rig_gives_the_mirrored_distribution():
    images, mask = _images(), _ego()
    logits, _, visible = _signal(params(), images, mask)
    mirrored = _signal(params(), images[:, :, :, ::-1], mask[..., ::-1])
    np.testing.assert_array_equal(np.asarray(visible)[..., ::-1], mirrored[2])
    assert np.abs(_p(logits)[:, :, :, ::-1] - _p(mirrored[0])).max() < 1e-3


def test_two_hot_needs_metres_and_reproduces_them():
    centers = jnp.broadcast_to(jnp.geomspace(0.5, 60.0, K), (B, N, 1, 1, K))
    logits, valid, visible = _signal(params(), _images(), _ego(), centers=centers, kind="two_hot", max_depth=40.0)
    depth = run_teacher(ToyModule(40.0), params(), _images(), size=SIZE)
    small = np.asarray(teacher_signal.teacher_bins.resize_rel_inv_depth(depth.depth, *HEAD))
    p = (_p(logits) - 0.01 / K) / 0.99  # without the smoothing
    np.testing.assert_allclose((p * np.asarray(centers)).sum(-1)[visible], small[visible], rtol=1e-3)
    assert np.asarray(valid).all() and (np.asarray(logits)[~np.asarray(visible)] == 0).all()
    np.testing.assert_allclose(depth.rel_inv_depth, 1 / depth.depth, rtol=1e-6)
    with pytest.raises(ConfigError, match=r"two_hot.*needs a metric teacher"):
        _signal(params(), _images(), _ego(), centers=centers, kind="two_hot")
    with pytest.raises(ValueError, match="expected the student's centers"):
        _signal(params(), _images(), _ego(), centers=centers[..., 1:], kind="two_hot", max_depth=40.0)
    gradient = jax.grad(lambda c: _signal(params(), _images(), _ego(), centers=c, kind="two_hot", max_depth=40.0)[0]
                        .sum())(centers)  # fmt: skip
    assert (np.asarray(gradient) == 0).all()


def test_wrong_options_are_named():
    for options, message in (({"kind": "learnt"}, r"kind = 'learnt'.*soft_assign"),
                             ({"tau_bin": -1.0}, "tau_bin = -1.0")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            _signal(params(), _images(), _ego(), **options)
    with pytest.raises(ConfigError, match="multiples of 14"):
        run_teacher(ToyModule(), params(), _images(), size=(30, 56))


def test_tokens_are_pooled_by_exact_areas():
    tokens = np.random.default_rng(0).normal(size=(1, 2, 12, 20, 3)).astype(np.float32)
    pooled = teacher_signal.pool_tokens(jnp.asarray(tokens), (6, 10))
    np.testing.assert_allclose(pooled, tokens.reshape(1, 2, 6, 2, 10, 2, 3).mean((3, 5)), atol=1e-6)


def _labels():
    rng = np.random.default_rng(1)
    depth = rng.uniform(3, 30, (B, N, H, W)).astype(np.float32) * (rng.random((B, N, H, W)) < 0.1)
    intrinsics = np.tile(np.diag([50.0, 50.0, 1.0]).astype(np.float32), (B, N, 1, 1))
    return {"depth": depth, "ego_mask": _ego(), "view_mask": np.ones((B, N), bool), "intrinsics": intrinsics}


LOSS = {"min_depth": 0.1, "max_depth": 80.0, "silog_lambda": 0.85, "chamfer_weight": 0.1}


@pytest.mark.parametrize("bins", ["log", "attractor"])
def test_the_learned_head_learns_from_labels_and_leaves_the_backbone_alone(bins):
    head = TeacherBins(bins=bins, num_bins=K)
    batch, images = _labels(), _images()
    sizes = {"image_size": (H, W), "head_size": HEAD}
    shape = jnp.zeros((B, N, 16, 32, CHANNELS))
    start = jax.jit(functools.partial(head.init, **sizes))(jax.random.key(0), shape, batch["intrinsics"])["params"]
    optimiser = optax.adam(0.02)

    def loss(both, batch):
        x = resize_for_teacher(images, *SIZE).reshape(B * N, *SIZE, 3)
        features = ToyModule().apply({"params": both["teacher"]}, x)["features"]  # the gradient is not stopped here
        features = features.reshape(B, N, *features.shape[1:])
        outputs = head.apply({"params": both["head"]}, features, batch["intrinsics"], **sizes)
        return total.supervised_loss(outputs, batch, **LOSS)[0], outputs

    @jax.jit
    def step(both, state):
        (value, outputs), gradient = jax.value_and_grad(loss, has_aux=True)(both, batch)
        update, state = optimiser.update(gradient, state)
        return optax.apply_updates(both, update), state, value, gradient, outputs

    both = {"teacher": params(), "head": start}
    state, values = optimiser.init(both), []
    for _ in range(12):
        both, state, value, gradient, outputs = step(both, state)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient["teacher"]))
    moved = jax.tree.map(lambda leaf: float(jnp.abs(leaf).max()), gradient["head"])
    assert all(value > 0 for value in jax.tree.leaves(moved))
    assert outputs["bin_logits"].shape == (B, N, *HEAD, K) and outputs["pred_depth"].shape == (B, N, H, W)
    centers = HEAD if bins == "attractor" else (1, 1)
    assert outputs["bin_centers"].shape == (B, N, *centers, K) and outputs["view_bin_centers"].shape == (B, N, K)
    p = _p(outputs["bin_logits"])
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
    assert (np.diff(np.asarray(outputs["bin_centers"]), axis=-1) >= 0).all()


def test_the_learned_head_scales_metres_with_the_focal_length_and_not_the_logits():
    head, batch = TeacherBins(num_bins=K), _labels()
    features = jnp.asarray(np.random.default_rng(2).normal(size=(B, N, 16, 32, CHANNELS)), jnp.float32)
    sizes = {"image_size": (H, W), "head_size": HEAD}
    variables = head.init(jax.random.key(1), features, batch["intrinsics"], **sizes)
    near = head.apply(variables, features, batch["intrinsics"], **sizes)
    longer = batch["intrinsics"].copy()
    longer[..., 0, 0] *= 2
    far = head.apply(variables, features, longer, **sizes)
    np.testing.assert_array_equal(near["bin_logits"], far["bin_logits"])
    np.testing.assert_allclose(2 * near["pred_depth"], far["pred_depth"], rtol=1e-5)
    # Features of any scale and offset-free sign give the same head: the normalisation is over channels.
    scaled = head.apply(variables, 100 * features, batch["intrinsics"], **sizes)
    np.testing.assert_allclose(scaled["bin_logits"], near["bin_logits"], atol=1e-3)
