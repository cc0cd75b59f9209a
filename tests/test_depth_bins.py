"""The depth-bin head: closed forms for centers and probabilities, and what must hold for every variant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax.expectation import EXPECTATIONS, expected_depth
from fsmde_jax.models import depth_bins
from fsmde_jax.models.depth_bins import DepthBins

LO, HI = 0.2, 150.0
K = 12
LEVEL_SIZES = ((2, 3, 9), (4, 6, 7), (8, 12, 6), (16, 24, 5))  # h, w, C, coarse to fine
VARIANTS = [(bins, kind) for bins in depth_bins.BINS for kind in depth_bins.PROBABILITIES]

# Largest and smallest focal length in pixels, native width, and depth range of the two real rigs.
RIGS = {"nuscenes": ((1263.0, 809.0), 1600, (0.1, 80.0)), "ddad": ((2181.0, 1057.0), 1936, (0.1, 200.0))}


def inputs(views=2, seed=0):
    rng = np.random.default_rng(seed)
    levels = [jnp.asarray(rng.normal(size=(views, *size)), jnp.float32) for size in LEVEL_SIZES]
    return levels[-1], jnp.asarray(rng.normal(size=(views, 10)), jnp.float32), jnp.asarray([0.7, 1.6][:views]), levels


def run(head, perturb, seed=0, data=None):
    """Outputs of a head at its start (`perturb` 0) or with noise on all its parameters."""
    features, descriptor, ratio, levels = data or inputs()
    levels = levels if head.bins == "attractor" else ()
    variables = head.init(jax.random.key(seed), features, descriptor, ratio, levels)
    leaves, tree = jax.tree.flatten(variables)
    rng = np.random.default_rng(seed)
    leaves = [leaf + perturb * jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return jax.jit(head.apply)(jax.tree.unflatten(tree, leaves), features, descriptor, ratio, levels)


def head_of(bins="log", probabilities="softmax", **fields):
    return DepthBins(bins, probabilities, **{"num_bins": K, "depth_range": (LO, HI), "hidden": 16, **fields})


@pytest.mark.parametrize("bins,kind", VARIANTS)
@pytest.mark.parametrize("perturb", [0.0, 0.5])
def test_probabilities_sum_to_one_and_centers_ascend_within_reach(bins, kind, perturb):
    out = run(head_of(bins, kind), perturb)
    ratio = np.array([0.7, 1.6])
    h, w, _ = LEVEL_SIZES[-1]
    assert out["bin_logits"].shape == (2, h, w, K)
    assert out["bin_centers"].shape == ((2, h, w, K) if bins == "attractor" else (2, 1, 1, K))
    assert out["view_bin_centers"].shape == (2, K)
    assert all(value.dtype == jnp.float32 for value in out.values())
    np.testing.assert_allclose(jax.nn.softmax(out["bin_logits"], -1).sum(-1), 1.0, atol=1e-5)
    for centers in (np.asarray(out["view_bin_centers"])[:, None, None], np.asarray(out["bin_centers"])):
        steps = np.diff(centers, axis=-1)
        strict = bins != "attractor" or centers.shape[1] == 1
        assert steps.min() > 0 if strict else (steps >= -1e-5 * centers[..., 1:]).all()
        canonical = centers / ratio[:, None, None, None]
        assert canonical.min() >= LO * (1 - 1e-5) and canonical.max() <= HI * (1 + 1e-5)


@pytest.mark.parametrize("bins", depth_bins.BINS)
def test_bins_are_exactly_uniform_at_the_start(bins):
    """Midpoints of K equal parts, in depth (linear, uniform) or in log-depth, whatever the picture."""
    out = run(head_of(bins), 0.0)
    middle = (np.arange(K) + 0.5) / K
    canonical = LO + (HI - LO) * middle if bins in ("linear", "uniform") else LO * (HI / LO) ** middle
    expected = np.array([[0.7], [1.6]]) * canonical
    np.testing.assert_allclose(out["view_bin_centers"], expected, rtol=2e-6)


def test_widths_follow_the_formula():
    """normalize(softplus + 1e-3), edges by cumulative sum in log-depth, centers midway; from the head's own numbers."""
    head = head_of("log")
    features, descriptor, ratio, _ = inputs()
    variables = head.init(jax.random.key(0), features, descriptor, ratio)
    rng = np.random.default_rng(5)
    variables["params"]["widths_out"]["kernel"] = jnp.asarray(rng.normal(size=(16, K)), jnp.float32)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    hidden = np.maximum(np.asarray(descriptor) @ p["widths_hidden"]["kernel"] + p["widths_hidden"]["bias"], 0)
    width = np.log1p(np.exp(hidden @ p["widths_out"]["kernel"] + p["widths_out"]["bias"])) + 1e-3
    width /= width.sum(-1, keepdims=True)
    edges = np.log(LO) + np.log(HI / LO) * np.concatenate([np.zeros((2, 1)), np.cumsum(width, -1)], -1)
    expected = np.exp(0.5 * (edges[:, 1:] + edges[:, :-1])) * np.array([[0.7], [1.6]])
    out = head.apply(variables, features, descriptor, ratio)
    np.testing.assert_allclose(out["view_bin_centers"], expected, rtol=2e-5)
    assert np.abs(np.diff(np.log(expected), axis=-1)).std() > 0.01  # the widths really differ


@pytest.mark.parametrize("expectation", EXPECTATIONS)
def test_one_hot_probabilities_give_exactly_their_center(expectation):
    centers = run(head_of("attractor"), 0.5)["bin_centers"]
    for k in range(K):
        logits = jnp.where(jnp.arange(K) == k, 200.0, -200.0) * jnp.ones_like(centers)
        depth = expected_depth(jax.nn.softmax(logits, -1), centers, expectation)
        np.testing.assert_allclose(depth, centers[..., k], rtol=0 if expectation == "depth" else 2e-6)


def test_the_mean_in_log_depth_is_the_geometric_one_and_never_above_the_other():
    rng = np.random.default_rng(7)
    p = rng.dirichlet(np.ones(K), size=(3, 5)).astype(np.float32)
    centers = np.sort(rng.uniform(0.5, 80, (3, 1, K)), -1).astype(np.float32)
    log, depth = (np.asarray(expected_depth(p, centers, kind)) for kind in ("log", "depth"))
    np.testing.assert_allclose(log, np.prod(centers.astype(np.float64) ** p, -1), rtol=1e-5)
    np.testing.assert_allclose(depth, np.sum(centers.astype(np.float64) * p, -1), rtol=1e-5)
    assert (log < depth).all()
    with pytest.raises(ValueError, match="expectation"):
        expected_depth(p, centers, "mean")


@pytest.mark.parametrize("bins,kind", VARIANTS)
def test_doubled_focal_length_doubles_the_centers_and_leaves_the_probabilities(bins, kind):
    features, descriptor, ratio, levels = inputs()
    one = run(head_of(bins, kind), 0.3, data=(features, descriptor, ratio, levels))
    two = run(head_of(bins, kind), 0.3, data=(features, descriptor, 2 * ratio, levels))
    np.testing.assert_array_equal(one["bin_logits"], two["bin_logits"])
    np.testing.assert_allclose(2 * one["bin_centers"], two["bin_centers"], rtol=1e-6)
    np.testing.assert_allclose(2 * one["view_bin_centers"], two["view_bin_centers"], rtol=1e-6)


@pytest.mark.parametrize("bins,kind", VARIANTS)
def test_gradients_are_finite_and_float32_for_bfloat16_features(bins, kind):
    head = head_of(bins, kind)
    features, descriptor, ratio, levels = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), inputs())
    levels = levels if bins == "attractor" else ()
    variables = head.init(jax.random.key(0), features, descriptor, ratio, levels)

    def loss(params, scale):
        out = head.apply(params, features * scale, descriptor, ratio, levels)
        depth = expected_depth(jax.nn.softmax(out["bin_logits"], -1), out["bin_centers"], "log")
        assert depth.dtype == jnp.float32
        return jnp.mean(jnp.log(depth)) + jnp.mean(jnp.log(out["view_bin_centers"]))

    for scale in (1.0, 1e4):
        gradients = jax.jit(jax.grad(loss))(variables, jnp.bfloat16(scale))
        assert all(np.isfinite(leaf).all() and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))


def test_log_binomial_is_scipys_binomial():
    stats = pytest.importorskip("scipy.stats")
    q = np.array([0.02, 0.3, 0.5, 0.97])
    logits = depth_bins.log_binomial_logits(jnp.asarray(np.log(q / (1 - q)), jnp.float32), jnp.ones(4), K)
    expected = stats.binom.pmf(np.arange(K), K - 1, q[:, None])
    np.testing.assert_allclose(jax.nn.softmax(logits, -1), expected, atol=2e-6)
    sharper = depth_bins.log_binomial_logits(jnp.asarray(np.log(q / (1 - q)), jnp.float32), jnp.full(4, 0.5), K)
    expected = expected**2 / (expected**2).sum(-1, keepdims=True)
    np.testing.assert_allclose(jax.nn.softmax(sharper, -1), expected, atol=5e-6)


def test_attractors_pull_by_zoedepths_rule():
    rng = np.random.default_rng(0)
    centers = np.sort(rng.uniform(size=(3, K)), -1)
    attractors = rng.uniform(size=(3, 4))
    difference = attractors[:, :, None] - centers[:, None, :]
    expected = centers + (difference / (1 + 300 * difference**2)).mean(1)
    moved = np.asarray(depth_bins.attract(jnp.asarray(centers, jnp.float32), jnp.asarray(attractors, jnp.float32)))
    np.testing.assert_allclose(moved, expected, atol=1e-6)
    assert (np.diff(moved) >= 0).all() and moved.min() >= 0 and moved.max() <= 1


def test_attractor_levels_must_fit():
    features, descriptor, ratio, levels = inputs()
    with pytest.raises(ValueError, match="4 decoder levels, got 3"):
        head_of("attractor").init(jax.random.key(0), features, descriptor, ratio, levels[1:])
    with pytest.raises(ValueError, match="the last level has size"):
        head_of("attractor").init(jax.random.key(0), features[:, :4], descriptor, ratio, levels)
    with pytest.raises(ValueError, match="log_binomial"):
        head_of("log", "sigmoid").init(jax.random.key(0), features, descriptor, ratio)


def test_canonical_range_is_the_closed_form():
    assert depth_bins.canonical_range(0.1, 80.0, 500.0, (250.0, 1000.0)) == pytest.approx((0.05, 160.0))
    for arguments in ((0.0, 80, 500, (1, 2)), (5, 2, 500, (1, 2)), (1, 2, 500, (3, 2)), (1, 2, 0, (1, 2))):
        with pytest.raises(ValueError, match=r"depth|focal"):
            depth_bins.canonical_range(*arguments)


@pytest.mark.parametrize("rig", RIGS)
@pytest.mark.parametrize("width", [640, 960])
def test_every_camera_of_the_real_rigs_reaches_its_whole_metric_range(rig, width):
    focals, native_width, (min_depth, max_depth) = RIGS[rig]
    at_640 = [f / native_width * 640 for f in focals]
    options = {"min_depth": min_depth, "max_depth": max_depth, "focal_canonical": 500.0,
               "focal_range": (min(at_640), max(at_640) * 1.15)}  # fmt: skip
    augmented = [f * zoom for f in focals for zoom in (1.0, 1.15)]
    intrinsics = np.stack([np.diag([f / native_width * width, 1.0, 1.0]) for f in augmented]).astype(np.float32)
    assert depth_bins.check_focals(intrinsics, width, ["a", "b", "c", "d"], **options) == []
    # The head itself: with the first and the last bin squeezed to nothing its outer centers are the reach.
    ratio = depth_bins.focal_ratio(jnp.asarray(intrinsics), width, 500.0)
    range_ = depth_bins.canonical_range(min_depth, max_depth, 500.0, options["focal_range"])
    features, descriptor, _, _ = inputs()
    features, descriptor = jnp.tile(features, (2, 1, 1, 1)), jnp.tile(descriptor, (2, 1))
    for bins in ("log", "linear"):
        head = head_of(bins, depth_range=range_)
        variables = head.init(jax.random.key(0), features, descriptor, ratio)
        bias = jnp.full(K, 40.0).at[jnp.asarray([0, K - 1])].set(-40.0)
        variables["params"]["widths_out"]["bias"] = bias
        centers = np.asarray(head.apply(variables, features, descriptor, ratio)["view_bin_centers"])
        spare = 1e-3 / (40 * (K - 2))  # half of it is what the squeezed bin keeps
        slack = (max_depth - min_depth) * 10 * spare if bins == "linear" else 0.0
        assert (centers[:, 0] <= min_depth * 1.001 + slack).all()
        assert (centers[:, -1] >= max_depth * 0.999).all()
    for i, camera in enumerate(intrinsics):
        near, far = depth_bins.reachable_depths(float(camera[0, 0]), width, **options)
        assert near <= min_depth * (1 + 1e-6) and far >= max_depth * (1 - 1e-6), i


def test_a_camera_outside_the_focal_range_is_named_with_its_reach():
    intrinsics = np.stack([np.diag([f, f, 1.0]) for f in (150.0, 200.0, 320.0)])
    warnings = depth_bins.check_focals(
        intrinsics, 320, ["wide", "inside", "tele"], min_depth=1.0, max_depth=80.0, focal_canonical=500.0,
        focal_range=(400.0, 500.0),
    )  # fmt: skip
    # At width 640 the focal lengths are 300, 400, 640; [lo, hi] = [1, 100]; reach = f / 500 times that.
    assert len(warnings) == 2
    assert "camera wide" in warnings[0] and "0.6 to 60 m" in warnings[0] and "300.0 px" in warnings[0]
    assert "camera tele" in warnings[1] and "1.28 to 128 m" in warnings[1]


def test_resize_depth_is_half_pixel_bilinear():
    torch = pytest.importorskip("torch")
    depth = np.random.default_rng(0).uniform(1, 50, size=(2, 3, 4, 6)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(depth), (8, 12), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(depth_bins.resize_depth(jnp.asarray(depth), 8, 12), expected.numpy(), rtol=1e-5)
