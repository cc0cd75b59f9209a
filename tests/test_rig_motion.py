"""Cameras fire at their own times while the car moves: what stands still is in one place of cloud and recording."""

import dataclasses

import numpy as np
import pytest

from fsmde_jax import consistency, geometry, predict_rig, rig_frames
from fsmde_jax.data.records import open_records
from fsmde_jax.depth_model import Prediction
from tests import rooms
from tests.sample_factory import write_folder
from tests.test_predict_frames import Student, rotated

SIZE = (24, 60)
K = np.array([[40.0, 0, 29.5], [0, 40, 11.5], [0, 0, 1]])


def drive(time, speed=9.0, turn=0.5):
    """ego_to_global [4, 4] after `time` seconds: on a circle, far from the origin as cities are."""
    yaw = 0.7 + turn * time
    c, s = np.cos(yaw), np.sin(yaw)
    pose = np.eye(4)
    pose[:2, :2] = [[c, -s], [s, c]]
    pose[:3, 3] = [41_000 + speed * time * c, -7_000 + speed * time * s, 3.0]
    return pose


def wall_frame(times):
    """Two cameras that overlap, with exact depth of a wall 20 m before where the car is at the first one's time."""
    cam_to_ego = np.stack([rotated(0.3), rotated(-0.3)])
    cam_to_ego[:, :3, 3] = [[1.5, 0.4, 1.5], [1.5, -0.4, 1.5]]
    ego_to_global = np.stack([drive(time) for time in times])
    pixels = np.concatenate([rooms.pixels_of(SIZE), np.ones((SIZE[0] * SIZE[1], 1))], 1)
    depth = []
    for pose, own in zip(ego_to_global, cam_to_ego, strict=True):
        to_first = np.linalg.inv(ego_to_global[0]) @ pose @ own
        rays = pixels @ np.linalg.inv(K).T @ to_first[:3, :3].T
        depth.append(((20.0 - to_first[0, 3]) / rays[:, 0]).reshape(SIZE).astype(np.float32))
    images = [np.full((*SIZE, 3), 60 * (i + 1), np.uint8) for i in range(2)]
    frame = rig_frames.RigFrame("0", ["a", "b"], images, np.stack([K, K]), cam_to_ego, ego_to_global=ego_to_global)
    return frame, depth


def test_a_wall_that_two_cameras_see_at_two_times_is_one_wall():
    frame, depth = wall_frame((0.0, 0.043))
    found = Prediction(depth, [np.full(SIZE, 0.5, np.float32)] * 2)
    cloud = predict_rig.fuse_frame(frame, found, keep=1.0, max_range=60.0)
    np.testing.assert_allclose(cloud.points[:, 0], 20.0, atol=1e-4)
    assert 0.3 < (cloud.camera == 1).sum() / (SIZE[0] * SIZE[1]) < 0.95  # the other part the first camera sees, too
    frame.ego_to_global = None  # nothing is known of the way: as if the car stood still
    still = predict_rig.fuse_frame(frame, found, keep=1.0, max_range=60.0)
    assert frame.cam_to_reference is frame.cam_to_ego
    np.testing.assert_allclose(still.points[still.camera == 0][:, 0], 20.0, atol=1e-4)
    assert np.abs(still.points[still.camera == 1][:, 0] - 20.0).max() > 0.3


def test_of_a_car_that_stands_still_nothing_moves():
    frame, _ = wall_frame((0.0, 0.0))
    np.testing.assert_allclose(frame.cam_to_reference, frame.cam_to_ego, atol=1e-9)


@pytest.fixture
def moving(tmp_path):
    """A record of six cameras that fire one after the other in a room, which stands still, and their exact depth.

    The walls are given in the ego frame at the time of the first camera.
    """
    sample = rooms.make(0, cameras=6, native_size=(48, 96))
    ego_to_global = np.stack([drive(0.04 * i) for i in range(6)])
    origin = np.round(ego_to_global[0, :3, 3])
    stored = ego_to_global.copy()
    stored[:, :3, 3] -= origin
    rng = np.random.default_rng(0)
    clouds, depth = [], []
    for i in range(6):
        to_room = np.linalg.inv(ego_to_global[0]) @ ego_to_global[i] @ sample.cam_to_ego[i].astype(np.float64)
        k = sample.intrinsics[i].astype(np.float64)
        uv = rng.uniform([0, 0], [95, 47], (200, 2))
        clouds.append(np.concatenate([uv, rooms.depth_at(k, to_room, uv)[:, None]], 1).astype(np.float32))
        depth.append(rooms.depth_at(k, to_room, rooms.pixels_of((48, 96))).reshape(48, 96).astype(np.float32))
    sample = dataclasses.replace(
        sample, points=clouds, ego_to_global=stored.astype(np.float32), global_origin=origin.astype(np.int64),
        dense_depth=[b""] * 6,
    )  # fmt: skip
    return write_folder(tmp_path / "records", [sample], shards=1), depth, ego_to_global


def off_the_walls(points):
    return np.min(np.abs(np.concatenate([points - rooms.LOW, points - rooms.HIGH], 1)), 1).max()


class Exact(Student):
    def __call__(self, images, intrinsics, cam_to_ego):
        self.given = cam_to_ego
        return super().__call__(images, intrinsics, cam_to_ego)


class Recorder:
    """Stands for a `RerunRecording`."""

    def __init__(self, path, max_range):
        self.path = path

    def __enter__(self):
        self.path.write_bytes(b"")
        return self

    def __exit__(self, *error):
        pass

    def log(self, number, cameras, images, depth, intrinsics, cam_to_ego, cloud, **more):
        Recorder.logged = {"cam_to_ego": cam_to_ego, "cloud": cloud, **more}


def test_cloud_lidar_picture_and_recording_of_a_moving_car_lie_in_one_frame(moving, tmp_path, monkeypatch):
    records, depth, ego_to_global = moving
    monkeypatch.setattr(predict_rig, "RerunRecording", Recorder)
    drawn, draw = [], predict_rig.birdseye
    monkeypatch.setattr(
        predict_rig, "birdseye", lambda cloud, lidar, **more: drawn.append((cloud, lidar)) or draw(cloud, lidar, **more)
    )
    student, source = Exact(depth), rig_frames.open_source(records)
    (frame,) = source.frames()
    predict_rig.predict_source(
        student, source, tmp_path / "out", kinds=("ply", "npz", "birdseye"), keep=1.0, rerun=tmp_path / "a.rrd"
    )
    np.testing.assert_array_equal(student.given, frame.cam_to_ego)  # the student's own input stays that of the rig
    content = (tmp_path / "out" / "sample-0" / "cloud.ply").read_bytes().split(b"end_header\n", 1)[1]
    points = np.frombuffer(content, np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)]))["xyz"]
    assert off_the_walls(points) < 2e-3 and off_the_walls(frame.lidar) < 2e-3
    (cloud, lidar), logged = drawn[0], Recorder.logged
    np.testing.assert_array_equal(cloud.points, points)
    np.testing.assert_array_equal(lidar, frame.lidar)
    np.testing.assert_array_equal(logged["cloud"].points, points)
    np.testing.assert_array_equal(logged["lidar"], frame.lidar)
    np.testing.assert_allclose(logged["ego_to_global"], ego_to_global[0], atol=1e-5)
    # Where the viewer puts each camera in the world is where it was at its own time.
    placed = logged["ego_to_global"] @ logged["cam_to_ego"]
    np.testing.assert_allclose(placed, ego_to_global @ frame.cam_to_ego, atol=1e-4)
    saved = np.load(tmp_path / "out" / "sample-0" / "rig.npz")
    np.testing.assert_array_equal(saved["cam_to_ego"], frame.cam_to_ego)
    np.testing.assert_array_equal(saved["ego_to_global"], frame.ego_to_global)


@pytest.mark.real_data
def test_points_that_two_real_cameras_see_are_one_point(real_data):
    """The LiDAR returns of the nuScenes keyframe that adjacent cameras share, by each camera's own calibration."""
    from data_prep import nuscenes
    from data_prep.plan import BuildOptions, build_sample

    root = real_data / "nuscenes_keyframe"
    source = nuscenes.open_split(root, "v1.0-mini", "mini_train")
    sample = build_sample(source.describe(0), BuildOptions(point_rule="round"))
    (frame,) = rig_frames.open_source(root).frames()
    native = sample.native_intrinsics
    apart = {"cam_to_reference": [], "cam_to_ego": []}
    for i, j in np.argwhere(consistency.neighbours(sample)).tolist():
        of_i, of_j = consistency.correspondences(sample, i, j)
        for name, found in apart.items():
            poses = getattr(frame, name)
            both = [
                geometry.transform_points(poses[c], geometry.unproject(native[c], uvz[:, :2], uvz[:, 2]))
                for c, uvz in ((i, sample.points[i][of_i]), (j, sample.points[j][of_j]))
            ]
            found.append(np.linalg.norm(both[0] - both[1], axis=1))
    far = {name: np.concatenate(found) for name, found in apart.items()}
    assert len(far["cam_to_ego"]) > 100
    assert far["cam_to_reference"].max() < 0.02
    assert np.median(far["cam_to_ego"]) > 0.05  # what would be without the poses


def test_a_rig_of_records_keeps_its_own_times(moving):
    records, _, ego_to_global = moving
    (frame,) = rig_frames.open_source(records).frames()
    np.testing.assert_allclose(frame.ego_to_global, ego_to_global, atol=1e-5)
    assert open_records(records)[0].camera_names == frame.cameras
