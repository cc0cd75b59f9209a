"""Conventions of cameras and rigid transforms, against closed forms and SciPy; the same for NumPy and JAX arrays."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from fsmde_jax import geometry
from fsmde_jax.errors import DataError
from tests import boxes

K = np.array([[100.0, 2.0, 79.5], [0.0, 110.0, 44.5], [0.0, 0.0, 1.0]])
CAMERAS = boxes.NUSCENES_CAMERAS
# Another rig: DDAD's ring, angles as published, listed in an order that is not the ring's.
DDAD_YAW = {"01": 0.0, "05": 52.0, "06": -52.0, "07": 125.0, "08": -125.0, "09": 180.0}


def random_pose(seed=0):
    rng = np.random.default_rng(seed)
    pose = np.eye(4)
    pose[:3, :3] = Rotation.random(rng=seed).as_matrix()
    pose[:3, 3] = rng.normal(0, 5, 3)
    return pose


def rig():
    poses = np.stack([boxes.camera_pose(c[0], c[2]) for c in CAMERAS.values()])
    ks = np.stack([boxes.intrinsics(c[1], (900, 1600)) for c in CAMERAS.values()])
    return poses, ks


def test_resize_follows_pixel_centres_at_integers():
    """The centres of 2x2 blocks of pixels are the pixels of the half-size image."""
    uv = np.array([[0.5, 0.5], [2.5, 4.5]])  # block centres
    np.testing.assert_allclose(geometry.scale_points_uv(uv, 0.5, 0.5), [[0, 0], [1, 2]])
    small = geometry.resize_intrinsics(K, scale_y=0.25, scale_x=0.5)
    np.testing.assert_allclose(small, [[50, 1, 0.5 * 80 - 0.5], [0, 27.5, 0.25 * 45 - 0.5], [0, 0, 1]])
    points = np.random.default_rng(0).uniform(1, 20, (50, 3))
    big_uv, _ = geometry.project(K, points)
    small_uv, _ = geometry.project(small, points)
    np.testing.assert_allclose(small_uv, geometry.scale_points_uv(big_uv, 0.25, 0.5), atol=1e-9)
    batch = geometry.resize_intrinsics(np.stack([K, K]), np.array([1.0, 0.25]), np.array([1.0, 0.5]))
    np.testing.assert_allclose(batch, [K, small])


def test_crop_and_flip_move_pixels_with_the_image():
    points = np.random.default_rng(1).uniform(1, 20, (50, 3))
    uv, _ = geometry.project(K, points)
    np.testing.assert_allclose(geometry.project(geometry.crop_intrinsics(K, 7, 3), points)[0], uv - [3, 7], atol=1e-9)
    mirrored = geometry.project(geometry.flip_intrinsics(K, 160), points * [-1, 1, 1])[0]
    np.testing.assert_allclose(mirrored, np.stack([159 - uv[:, 0], uv[:, 1]], 1), atol=1e-9)


def test_flipped_rig_sees_the_mirrored_world():
    """A world point mirrored in the ego frame lands on the flipped pixel; camera-to-camera stays a proper rotation."""
    poses, ks = rig()
    flipped = geometry.flip_cam_to_ego(poses)
    world = random_pose(3)
    flipped_ego = geometry.flip_ego_to_global(world)
    assert np.all(np.linalg.det(flipped[:, :3, :3]) > 0.999)
    assert np.linalg.det(flipped_ego[:3, :3]) < 0  # the mirror is between ego and global
    points = np.random.default_rng(2).uniform(-30, 30, (200, 3))  # ego frame
    for i in range(6):
        uv, z = geometry.project(ks[i], geometry.transform_points(np.linalg.inv(poses[i]), points))
        camera = geometry.transform_points(np.linalg.inv(flipped[i]), points * [1, -1, 1])
        uv_flipped, z_flipped = geometry.project(geometry.flip_intrinsics(ks[i], 1600), camera)
        front = z > 0.1
        np.testing.assert_allclose(z_flipped, z, atol=1e-9)
        np.testing.assert_allclose(uv_flipped[front, 0], 1599 - uv[front, 0], atol=1e-6)
        np.testing.assert_allclose(uv_flipped[front, 1], uv[front, 1], atol=1e-6)
        # the same global point
        np.testing.assert_allclose(
            geometry.transform_points(flipped_ego, points * [1, -1, 1]),
            geometry.transform_points(world, points),
            atol=1e-9,
        )


def test_quaternions_against_scipy():
    for seed in range(5):
        wxyz = np.random.default_rng(seed).normal(size=4)
        expected = Rotation.from_quat(wxyz[[1, 2, 3, 0]]).as_matrix()
        np.testing.assert_allclose(geometry.quaternion_to_rotation(wxyz), expected, atol=1e-12)
    for wrong in ([0, 0, 0, 0], [np.nan, 0, 0, 1], [1, 0, 0]):
        with pytest.raises(DataError, match="quaternion"):
            geometry.quaternion_to_rotation(wrong)


def test_rigid_transforms():
    a, b = random_pose(1), random_pose(2)
    np.testing.assert_allclose(geometry.invert_rigid(np.stack([a, b])), np.linalg.inv(np.stack([a, b])), atol=1e-12)
    points = np.random.default_rng(0).normal(size=(2, 7, 3))
    expected = np.einsum("bij,bpj->bpi", np.stack([a, b])[:, :3, :3], points) + np.stack([a, b])[:, None, :3, 3]
    np.testing.assert_allclose(geometry.transform_points(np.stack([a, b]), points), expected, atol=1e-12)


def test_project_and_unproject():
    points = np.array([[1.0, 2.0, 4.0], [0.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    uv, z = geometry.project(K, points)
    np.testing.assert_allclose(uv[0], [100 / 4 + 2 * 2 / 4 + 79.5, 110 * 2 / 4 + 44.5])
    assert np.all(np.isfinite(uv)) and z.tolist() == [4, -1, 0]
    np.testing.assert_allclose(geometry.unproject(K, uv[:1], z[:1]), points[:1], atol=1e-12)


def test_jax_arrays_stay_jax_and_agree():
    poses, ks = rig()
    jposes, jks = jnp.asarray(poses), jnp.asarray(ks)
    pairs = [
        (geometry.invert_rigid(jposes), geometry.invert_rigid(poses)),
        (geometry.resize_intrinsics(jks, 0.4, 0.5), geometry.resize_intrinsics(ks, 0.4, 0.5)),
        (geometry.flip_cam_to_ego(jposes), geometry.flip_cam_to_ego(poses)),
        (geometry.adjacency(jposes, jks, 1600), geometry.adjacency(poses, ks, 1600)),
    ]
    for ours, expected in pairs:
        assert isinstance(ours, jnp.ndarray)
        np.testing.assert_allclose(np.asarray(ours), expected, rtol=1e-5, atol=1e-5)


def test_checks_name_what_is_wrong():
    geometry.check_rigid(random_pose(), "x")
    geometry.check_intrinsics(K, "x")
    scaled, mirrored, shifted = random_pose(), random_pose(), random_pose()
    scaled[:3, :3] *= 1.01
    mirrored[:3, 0] *= -1
    shifted[3, 0] = 1
    for wrong in (scaled, mirrored, shifted, np.full((4, 4), np.inf), np.eye(3)):
        with pytest.raises(DataError, match=r"^camera 7: "):
            geometry.check_rigid(wrong, "camera 7")
    for change in ((0, 0, 0.0), (1, 1, -5.0), (2, 2, 0.0), (1, 0, 3.0), (0, 2, np.nan)):
        wrong = K.copy()
        wrong[change[:2]] = change[2]
        with pytest.raises(DataError, match=r"^camera 7: "):
            geometry.check_intrinsics(wrong, "camera 7")


def test_field_of_view():
    k = np.array([[80.0, 0, 79.5], [0, 80, 44.5], [0, 0, 1]])  # 160 wide, fx = half the width: 90 degrees
    np.testing.assert_allclose(geometry.horizontal_fov(k, 160), np.pi / 2)


def test_ring_and_adjacency_of_the_nuscenes_rig():
    poses, ks = rig()
    np.testing.assert_allclose(np.rad2deg(geometry.optical_yaw(poses)), [0, 55, 110, 180, -110, -55], atol=1e-9)
    shuffled = [3, 5, 0, 2, 4, 1]
    assert [shuffled[i] for i in geometry.ring_order(poses[shuffled])] == [0, 1, 2, 3, 4, 5]
    ring = np.zeros((6, 6), bool)
    for i in range(6):
        ring[i, (i + 1) % 6] = ring[(i + 1) % 6, i] = True
    np.testing.assert_array_equal(geometry.adjacency(poses, ks, 1600), ring)
    present = np.array([True, True, False, True, True, True])
    dropped = geometry.adjacency(poses, ks, 1600, present)
    assert not dropped[2].any() and not dropped[:, 2].any() and dropped.sum() == ring.sum() - 4


@pytest.mark.parametrize("count", [3, 4, 6, 8])
def test_views_that_only_touch_are_not_adjacent_whatever_rounding_says(count):
    """Rigs as simulators have them: n cameras of 360 / n degrees; a degree more, and neighbours are adjacent."""
    k = np.eye(3)
    for more, wanted in ((0.0, 0), (1.0, 2 * count)):
        half = np.radians((360 / count + more) / 2)
        k[0] = [80 / np.tan(half), 0, 79.5]  # 160 columns
        for offset in (0.0, 0.3, 17.0, 45.0):
            yaw = offset + 360 / count * np.arange(count)
            poses = np.stack([boxes.camera_pose(y, (0.0, 0.0, 1.5)) for y in yaw])
            ks = np.tile(k, (count, 1, 1))
            assert geometry.adjacency(poses, ks, 160).sum() == wanted
            assert geometry.adjacency(jnp.asarray(poses), jnp.asarray(ks), 160).sum() == wanted
            assert geometry.adjacency(poses.astype(np.float32), ks.astype(np.float32), 160).sum() == wanted


def test_ring_of_other_rigs():
    names = sorted(DDAD_YAW)
    poses = np.stack([boxes.camera_pose(DDAD_YAW[n], (0.0, 0.0, 1.5)) for n in names])
    assert [names[i] for i in geometry.ring_order(poses)] == ["01", "05", "07", "09", "08", "06"]
    poses = np.stack([boxes.camera_pose(y, (0.0, 0.0, 1.5)) for y in (-120.0, 3.0, 120.0)])
    assert geometry.ring_order(poses) == [1, 2, 0]
    assert geometry.ring_order(poses[:1]) == [0]


def test_mirror_table_swaps_sides():
    poses, _ = rig()
    assert geometry.mirror_permutation(poses) == [0, 5, 4, 3, 2, 1]
    two = np.stack([boxes.camera_pose(y, (0.0, 0.0, 1.5)) for y in (30.0, -32.0)])
    assert geometry.mirror_permutation(two) == [1, 0]
