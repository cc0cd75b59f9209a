"""The student as a whole: shapes, symmetries of a rig, masks, focal lengths, dtypes, and the registry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax.errors import ConfigError
from fsmde_jax.models import depth_bins, registry
from fsmde_jax.models.cross_view import CrossView
from fsmde_jax.models.student import ENCODER_SCOPE, normalise_images
from tests.random_network import random_variables

H, W = 64, 96
CHANNELS = (4, 8, 8, 16, 16)


def rig(n, seed=0, b=1):
    """Random pictures from a ring of n cameras that each see about 69 degrees."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(b, n, H, W, 3)).astype(np.float32)
    intrinsics = np.zeros((b, n, 3, 3), np.float32)
    intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = 70.0 * rng.uniform(0.98, 1.02, size=(b, n))
    intrinsics[..., 0, 2], intrinsics[..., 1, 2], intrinsics[..., 2, 2] = (W - 1) / 2, (H - 1) / 2, 1.0
    cam_to_ego = np.tile(np.eye(4, dtype=np.float32), (b, n, 1, 1))
    for i in range(n):
        yaw = 2 * np.pi * i / n
        forward, right = np.array([np.cos(yaw), np.sin(yaw), 0]), np.array([np.sin(yaw), -np.cos(yaw), 0])
        cam_to_ego[:, i, :3, :3] = np.stack([right, [0, 0, -1], forward], -1)
        cam_to_ego[:, i, :3, 3] = forward
    return jnp.asarray(images), jnp.asarray(intrinsics), jnp.asarray(cam_to_ego)


class Built:
    """A student with its parameters; `run` is compiled once per shape."""

    def __init__(self, **fields):
        self.module = registry.build_student(decoder_channels=CHANNELS, num_bins=8, **fields)
        self.variables = random_variables(self.module, *rig(1))
        self._run = jax.jit(lambda v, i, k, t, m: self.module.apply(v, i, k, t, train=False, view_mask=m))

    def run(self, images, intrinsics, cam_to_ego, mask=None, variables=None):
        mask = jnp.ones(images.shape[:2], bool) if mask is None else mask
        return jax.device_get(self._run(variables or self.variables, images, intrinsics, cam_to_ego, mask))


@pytest.fixture(scope="module")
def plain():
    return Built()


@pytest.fixture(scope="module")
def crossed():
    return Built(cross_view_blocks=1)


@pytest.mark.parametrize("n", [1, 3, 6])
def test_shapes_for_any_number_of_cameras(plain, n):
    out = plain.run(*rig(n, b=2))
    assert out["pred_depth"].shape == (2, n, H, W)
    assert out["bin_logits"].shape == (2, n, H // 2, W // 2, 8)
    assert out["bin_centers"].shape == (2, n, 1, 1, 8)
    assert out["view_bin_centers"].shape == (2, n, 8)
    assert out["features"].shape == (2, n, H // 8, W // 8, CHANNELS[2])
    widths = registry.ENCODERS["resnet18"].channels
    assert [tap.shape for tap in out["taps"]] == [
        (2, n, H // s, W // s, c) for s, c in zip((2, 4, 8, 16, 32), widths, strict=True)
    ]
    assert all(np.isfinite(leaf).all() and leaf.dtype == np.float32 for leaf in jax.tree.leaves(out))


def test_depth_is_the_expected_center_resized(plain):
    out = plain.run(*rig(2))
    z = out["bin_logits"].astype(np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    depth = np.exp((p / p.sum(-1, keepdims=True) * np.log(out["bin_centers"])).sum(-1))[0, 0]
    # Bilinear, half-pixel centres, factor 2: output 2i+1 lies a quarter of the way from i to i+1.
    rows = 0.75 * depth[:-1] + 0.25 * depth[1:]
    np.testing.assert_allclose(
        out["pred_depth"][0, 0, 1:-1:2, 1:-1:2], 0.75 * rows[:, :-1] + 0.25 * rows[:, 1:], rtol=1e-4
    )


def test_doubled_focal_length_doubles_the_depth(plain):
    images, intrinsics, poses = rig(3)
    one = plain.run(images, intrinsics, poses)
    two = plain.run(images, intrinsics * jnp.asarray([[2.0], [1], [1]]), poses)
    np.testing.assert_array_equal(one["bin_logits"], two["bin_logits"])
    np.testing.assert_allclose(2 * one["pred_depth"], two["pred_depth"], rtol=1e-5)


def assert_close(one, other):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * (np.abs(b).max() + 1e-6)), one, other
    )


def test_permuted_cameras_permute_the_outputs(crossed):
    order = np.array([4, 0, 5, 2, 1, 3])
    batch = rig(6)
    expected = jax.tree.map(lambda leaf: leaf[:, order], crossed.run(*batch))
    assert_close(crossed.run(*(array[:, order] for array in batch)), expected)


def test_cross_view_mixing_reaches_adjacent_views_only(crossed):
    images, intrinsics, poses = rig(6)
    before = crossed.run(images, intrinsics, poses)["pred_depth"]
    after = crossed.run(images.at[:, 0].set(-images[:, 0]), intrinsics, poses)["pred_depth"]
    change = np.abs(np.log(after / before)).max((0, 2, 3))
    assert (change[[0, 1, 5]] > 1e-4).all() and (change[[2, 3, 4]] < 1e-6).all()
    # A view that is dropped reaches nobody.
    mask = jnp.ones((1, 6), bool).at[0, 0].set(False)
    before = crossed.run(images, intrinsics, poses, mask)["pred_depth"]
    after = crossed.run(images.at[:, 0].set(-images[:, 0]), intrinsics, poses, mask)["pred_depth"]
    np.testing.assert_allclose(after[:, 1:], before[:, 1:], rtol=1e-6)


def test_fresh_cross_view_mixing_is_the_identity(plain, crossed):
    batch = rig(3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, H // 32, W // 32, 512)), jnp.float32)
    mixed, fresh = CrossView(1).init_with_output(jax.random.key(0), x, *batch[1:])
    np.testing.assert_array_equal(mixed, x)
    params = {**plain.variables["params"], "cross_view": fresh["params"]}
    assert_close(crossed.run(*batch, variables={**plain.variables, "params": params}), plain.run(*batch))
    assert "cross_view" not in plain.variables["params"]


def test_lone_and_two_camera_rigs_work_with_cross_view_mixing(crossed):
    for n in (1, 2):  # two cameras back to back: nobody is adjacent
        batch = rig(n)
        assert np.isfinite(crossed.run(*batch)["pred_depth"]).all()


def test_training_has_finite_gradients_moves_statistics_and_ignores_dropped_views():
    module = registry.build_student(decoder_channels=CHANNELS, num_bins=8, bins="attractor", cross_view_blocks=1)
    images, intrinsics, poses = rig(3)
    variables = random_variables(module, images, intrinsics, poses)
    mask = jnp.asarray([[True, True, False]])

    @jax.jit
    def step(params, stats, images, mask):
        def loss(params):
            out, updates = module.apply(
                {"params": params, "batch_stats": stats}, images, intrinsics, poses, train=True, view_mask=mask,
                mutable=["batch_stats"],
            )  # fmt: skip
            kept = mask[:, :, None, None]
            silog = jnp.sum(jnp.where(kept, jnp.log(out["pred_depth"]) ** 2, 0.0)) / jnp.maximum(kept.sum() * H * W, 1)
            return silog + jnp.mean(jnp.log(out["view_bin_centers"])[:, :2] ** 2), (out["pred_depth"], updates)

        return jax.value_and_grad(loss, has_aux=True)(params)

    stats = variables["batch_stats"]
    (value, (depth, updates)), gradients = step(variables["params"], stats, images, mask)
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    zero = [keys for keys, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0] if not np.any(leaf)]
    assert not zero, f"parameters without any gradient: {[jax.tree_util.keystr(keys) for keys in zero]}"
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), updates["batch_stats"], stats)
    assert all(jax.tree.leaves(moved))
    other = step(variables["params"], stats, images.at[:, 2].set(100.0), mask)[0][1]
    np.testing.assert_allclose(other[0][:, :2], depth[:, :2], rtol=1e-4)
    assert_close(jax.device_get(other[1]), jax.device_get(updates))
    nothing = step(variables["params"], stats, images, jnp.zeros((1, 3), bool))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nothing))


def test_bfloat16_gives_float32_depth_near_the_float32_one(plain):
    module = registry.build_student(decoder_channels=CHANNELS, num_bins=8, dtype="bfloat16", probabilities="softmax")
    batch = rig(2)
    out = jax.device_get(jax.jit(functools.partial(module.apply, train=False))(plain.variables, *batch))
    for key in ("pred_depth", "bin_logits", "bin_centers", "view_bin_centers"):
        assert out[key].dtype == np.float32
    assert out["features"].dtype == jnp.bfloat16 and all(tap.dtype == jnp.bfloat16 for tap in out["taps"])
    expected = plain.run(*batch)["pred_depth"]
    assert np.abs(np.log(out["pred_depth"] / expected)).mean() < 0.05


@pytest.mark.parametrize("encoder", ["efficientnet_lite2", "resnet50"])
def test_other_encoders_fit_the_decoder(encoder):
    module = registry.build_student(encoder=encoder, num_bins=8, probabilities="log_binomial")
    init = functools.partial(module.init_with_output, train=False)
    out, variables = jax.eval_shape(init, jax.random.key(0), *rig(2))
    assert out["pred_depth"].shape == (1, 2, H, W)
    assert set(variables["params"]) == {ENCODER_SCOPE, "decoder", "depth_bins"}
    assert set(variables["batch_stats"]) == {ENCODER_SCOPE, "decoder"}


@pytest.mark.slow
def test_the_real_initialisation_predicts_within_the_range():
    module = registry.build_student(encoder="efficientnet_lite0", decoder_channels=CHANNELS, num_bins=8)
    images, intrinsics, _ = rig(1)
    # The rbg generator compiles in a third of the time.
    key = jax.random.key(0, impl="rbg")
    out = jax.jit(functools.partial(module.init_with_output, train=False))(key, images, intrinsics)[0]
    near, far = depth_bins.reachable_depths(
        float(intrinsics[0, 0, 0, 0]),
        W,
        min_depth=0.1,
        max_depth=80.0,
        focal_canonical=500.0,
        focal_range=(300.0, 600.0),
    )
    depth = np.asarray(out["pred_depth"])
    assert near < depth.min() and depth.max() < far
    assert 0.2 * np.sqrt(near * far) < np.median(depth) < 0.5 * far  # between the log middle and the linear one


def test_wrong_input_is_refused_with_a_clear_message():
    images, intrinsics, _ = rig(2)
    student = registry.build_student()
    with pytest.raises(ConfigError, match=r"data\.image_size.*multiples of 32, got 50x96"):
        student.init(jax.random.key(0), images[:, :, :50], intrinsics, train=False)
    with pytest.raises(ValueError, match="intrinsics have shape"):
        student.init(jax.random.key(0), images, intrinsics[:, :1], train=False)
    with pytest.raises(ConfigError, match="cross_view_blocks > 0 needs the camera poses"):
        jax.eval_shape(
            lambda: registry.build_student(cross_view_blocks=1).init(jax.random.key(0), images, intrinsics, train=False)
        )


def test_normalise_images_is_imagenets():
    images = np.random.default_rng(0).integers(0, 256, size=(2, 3, 4, 3), dtype=np.uint8)
    expected = (images / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalise_images(jnp.asarray(images)), expected, atol=1e-6)
    assert normalise_images(jnp.asarray(images), jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", registry.ENCODERS)
def test_the_table_of_encoders_is_true(name):
    encoder, info = registry.build_encoder(name), registry.ENCODERS[name]
    taps, variables = jax.eval_shape(
        lambda: encoder.init_with_output(jax.random.key(0), jnp.zeros((1, 64, 96, 3)), train=False)
    )
    assert [tap.shape for tap in taps] == [
        (1, 64 // s, 96 // s, c) for s, c in zip((2, 4, 8, 16, 32), info.channels, strict=True)
    ]
    assert encoder.channels == info.channels
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == info.parameters


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder": "resnet81"}, r"model\.encoder.*did you mean 'resnet18'"),
        ({"encoder": "efficientnet-lite0"}, r"did you mean 'efficientnet_lite0'"),
        ({"bins": "atractor"}, r"model\.bins.*did you mean 'attractor'"),
        ({"probabilities": "soft"}, r"model\.probabilities.*did you mean 'softmax'"),
        ({"dtype": "bfloat"}, r"model\.dtype.*did you mean 'bfloat16'"),
        ({"num_bin": 3}, r"model.*'num_bin'.*did you mean 'num_bins'"),
        ({"num_bins": 1}, "at least 2"),
        ({"decoder_channels": (8, 8)}, "five positive widths"),
        ({"cross_view_blocks": -1}, "0 or more"),
        ({"focal_range": (600.0, 300.0)}, r"focal_range"),
        ({"min_depth": 0.0}, "min_depth"),
    ],
)
def test_wrong_fields_are_refused_with_the_nearest_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        registry.build_student(**fields)


def test_fields_may_be_lists_and_names():
    student = registry.build_student(decoder_channels=[4, 8, 8, 16, 16], focal_range=[200.0, 500.0], dtype="bfloat16")
    assert student.decoder_channels == CHANNELS and student.focal_range == (200.0, 500.0)
    assert student.dtype == jnp.bfloat16
    assert hash(student) == hash(student.clone())
