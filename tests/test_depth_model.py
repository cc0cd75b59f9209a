"""What a student called from Python takes and refuses."""

import numpy as np
import pytest

import fsmde_jax
from fsmde_jax.errors import DataError
from tests.exported import inputs
from tests.sample_factory import ring_cam_to_ego


@pytest.fixture(scope="module")
def model():
    return fsmde_jax.load_model("lite0", image_size=(32, 64))


def changed(array, at, value):
    """A copy with one view's entry replaced."""
    array = np.array(array, np.float64)
    array[at] = value
    return array


def turned(degrees):
    """A rotation [3, 3] about z."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        ((1, 0, 0), np.nan, r"image 1, intrinsics: expected finite"),
        ((2, 0, 2), np.inf, r"image 2, intrinsics: expected finite"),
        ((1, 0, 0), -50.0, r"image 1, intrinsics: .*fx, fy > 0"),
        ((0, 1, 1), 0.0, r"image 0, intrinsics: .*fx, fy > 0"),
    ],
)
def test_intrinsics_that_cannot_be_used_are_refused(model, at, value, message):
    images, intrinsics = inputs(3)
    with pytest.raises(DataError, match=message):
        model.batch(images, changed(intrinsics, at, value), ring_cam_to_ego(3))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        ((1, 0, 3), np.nan, r"image 1, cam_to_ego: .*not finite"),
        ((2, slice(3), slice(3)), 2 * turned(30), r"image 2, cam_to_ego: not a rigid transform"),
        ((0, slice(3), slice(3)), turned(30) @ np.diag([1, -1, 1]), r"image 0, cam_to_ego: .*det R = -1.000"),
        ((1, slice(3), slice(3)), 0.0, r"image 1, cam_to_ego: not a rigid transform"),
        ((1, 3), [0, 0, 1, 1], r"image 1, cam_to_ego: .*last row 0 0 0 1"),
        ((2, 3), [0, 0, 0, 2], r"image 2, cam_to_ego: .*last row 0 0 0 1"),
    ],
)
def test_poses_that_are_no_rigid_transforms_are_refused(model, at, value, message):
    images, intrinsics = inputs(3)
    with pytest.raises(DataError, match=message):
        model.batch(images, intrinsics, changed(ring_cam_to_ego(3), at, value))


def test_poses_in_single_precision_are_rigid_enough(model):
    images, intrinsics = inputs(3)
    poses = ring_cam_to_ego(3)
    poses[0, :3, :3] = poses[0, :3, :3] @ turned(17.3)
    batch = model.batch(images, intrinsics, poses.astype(np.float32))
    assert batch["cam_to_ego"].dtype == np.float32
    np.testing.assert_allclose(batch["cam_to_ego"][0], poses, atol=1e-6)
