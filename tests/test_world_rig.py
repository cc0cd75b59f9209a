"""Rig files: what they mean, what is refused, and that they agree with the real rigs they imitate."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep import dgp, folder
from data_prep.world import rigs
from fsmde_jax import geometry
from fsmde_jax.errors import ConfigError, DataError

FOUR = {
    "name": "four",
    "max_depth": 60,
    "lidar": {"position": [0.8, 0.0, 1.9]},
    "cameras": {
        name: {"image_size": [120, 200], "hfov": 100, "position": [x, y, 1.2], "yaw": yaw, "delay_ms": 5}
        for name, x, y, yaw in (
            ("front", 2, 0, 0),
            ("left", 1, 0.8, 90),
            ("rear", -0.5, 0, 180),
            ("right", 1, -0.8, -90),
        )
    },
    "world": {"keyframe_rate": 5, "lidar": {"beams": [[-20, 5, 6], 10], "columns": 360, "range_max": 60}},
}


def write(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_angles_and_field_of_view_mean_what_they_say(tmp_path):
    content = json.loads(json.dumps(FOUR))
    content["cameras"]["left"] |= {"yaw": 80, "pitch": 10, "roll": 20}
    camera = rigs.read_rig(write(tmp_path / "four.yaml", content)).cameras["left"]
    axis, right, down = camera.cam_to_ego[:3, 2], camera.cam_to_ego[:3, 0], camera.cam_to_ego[:3, 1]
    assert np.degrees(np.arctan2(axis[1], axis[0])) == pytest.approx(80)
    assert np.degrees(np.arcsin(axis[2])) == pytest.approx(10)
    # Clockwise by 20 degrees for who looks along the axis: the picture's right side sinks.
    assert right[2] == pytest.approx(-np.sin(np.radians(20)) * np.cos(np.radians(10)))
    assert np.dot(np.cross(right, down), axis) == pytest.approx(1)
    np.testing.assert_allclose(camera.cam_to_ego[:3, 3], [1, 0.8, 1.2])
    # 100 degrees lie between the outer edges of the first and the last column.
    edges = geometry.unproject(camera.intrinsics, np.array([[-0.5, 59.5], [199.5, 59.5]]), np.ones(2))
    angle = np.degrees(np.arccos(np.prod([1 / np.linalg.norm(e) for e in edges]) * (edges[0] @ edges[1])))
    assert angle == pytest.approx(100)
    assert camera.delay == pytest.approx(0.005)


def test_a_planned_rig_is_read_by_the_converter_for_real_data_too(tmp_path):
    path = write(tmp_path / "four.yaml", FOUR)
    planned, real = rigs.read_rig(path), folder.read_rig(path)
    assert list(planned.cameras) == list(real.cameras)
    for name, camera in planned.cameras.items():
        np.testing.assert_array_equal(camera.cam_to_ego, real.cameras[name].cam_to_ego)
        np.testing.assert_array_equal(camera.intrinsics, real.cameras[name].intrinsics)
    np.testing.assert_array_equal(planned.lidar.sensor_to_ego, real.sensor_to_ego)
    np.testing.assert_allclose(np.degrees(planned.lidar.elevations), [-20, -15, -10, -5, 0, 5, 10], atol=1e-12)
    assert (planned.max_depth, planned.sweeps_per_keyframe, planned.format) == (60, 2, "nuscenes")


@pytest.mark.parametrize(
    ("where", "key", "value", "message"),
    [
        ((), "worlds", {}, "unknown key 'worlds'"),
        (("world",), "format", "kitti", "format = 'kitti'"),
        (("world",), "keyframe_rate", 3, "no multiple of keyframe_rate"),
        (("world",), "keyframe_rate", "fast", "expected a number"),
        (("world", "lidar"), "colums", 10, "did you mean 'columns'"),
        (("world", "lidar"), "columns", 7, "columns = 7; expected 8"),
        (("world", "lidar"), "columns", 100.5, "whole number"),
        (("world", "lidar"), "range_min", 80, "range_min below range_max"),
        (("world", "lidar"), "beams", [[5, -5, 3]], "expected elevations within"),
        (("world", "lidar"), "beams", [1, 1], "each elevation once"),
        (("world", "lidar"), "beams", 32, "expected a list of elevations"),
        (("world", "lidar"), "body_returns", 1, "expected true or false"),
        (("world",), "body", {"parts": [{"low": [0, 0, 0]}]}, "part 1: missing high"),
        (("world",), "body", {"parts": [{"low": [0, 0, 1], "high": [1, 1, 1]}]}, "high must lie above low"),
        (("world",), "body", {"parts": [{"low": [0, 0, 0], "high": [1, 1]}]}, "expected 3 numbers"),
        (("world",), "body", {"parts": [{"low": [0, 0, 0], "high": [1, 1, 1], "material": "glas"}]}, "'glass'"),
        (
            ("world",), "body", {"in_images": True, "parts": [{"low": [1, -1, 0], "high": [3, 1, 1.5]}]},
            "camera front at [2.0, 0.0, 1.2] is inside",
        ),
        (("world",), "body", {"parts": [{"low": [0, -1, 0], "high": [3, 1, 2]}]}, "the LiDAR at"),
        (("lidar",), "position", [0, 0, 0], "0 m above the ground"),
        (("cameras", "left"), "hfov", 175, "hfov = 175; expected 1 to 150"),
        (("cameras", "left"), "intrinsics", {"fx": 1, "fy": 1, "cx": 9, "cy": 9}, "either intrinsics or hfov"),
        (("cameras", "left"), "cam_to_ego", np.eye(4).tolist(), "either cam_to_ego or position"),
        (("cameras", "left"), "position", [0, 1], "expected [x, y, z]"),
        (("cameras", "left"), "position", [1000, 800, 1200], "not on a road vehicle"),
        (("cameras", "left"), "yaw", "left", "yaw = 'left'; expected a number"),
        (("cameras", "left"), "delay_ms", 150, "half of a keyframe's time"),
        (("cameras", "left"), "image_size", [0, 200], "expected [height, width]"),
        (("cameras", "left"), "image_size", [60000, 60000], "too large"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_file_and_key(tmp_path, where, key, value, message):
    content = json.loads(json.dumps(FOUR))
    entry = content
    for step in where:
        entry = entry[step]
    entry[key] = value
    with pytest.raises((ConfigError, DataError)) as error:
        rigs.read_rig(write(tmp_path / "four.yaml", content))
    assert message in str(error.value) and "four.yaml" in str(error.value)


def test_unknown_rigs_and_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'nuscenes'"):
        rigs.read_rig("nuscene")
    with pytest.raises(ConfigError, match="cannot read"):
        rigs.read_rig(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", rigs.BUILT_IN)
def test_scaled_rigs_see_the_same_field(name):
    rig = rigs.read_rig(name)
    half, sized = rigs.scaled(rig, scale=0.25), rigs.scaled(rig, size=(200, 640))
    for camera, small, other in zip(*(r.cameras.values() for r in (rig, half, sized)), strict=True):
        assert small.size == (camera.size[0] // 4, camera.size[1] // 4) and other.size == (200, 640)
        for new in (small, other):
            for corner in ((-0.5, -0.5), (camera.size[1] - 0.5, camera.size[0] - 0.5)):
                scale = np.array(new.size[::-1]) / camera.size[::-1]
                there = geometry.scale_points_uv(np.array([corner]), scale[1], scale[0])
                a = geometry.unproject(camera.intrinsics, np.array([corner]), np.ones(1))
                b = geometry.unproject(new.intrinsics, there, np.ones(1))
                np.testing.assert_allclose(a, b, atol=1e-9)


def real_poses(folder: Path, name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Extrinsics and intrinsics of the real rig."""
    if name == "ddad":
        scene = next(folder.glob("ddad_val_clip/000150/scene_*.json"))
        found = dgp.read_calibration(dgp.read_scene(scene)[0].calibration)
        return {n: c.sensor_to_ego for n, c in found.items()}, {n: c.intrinsics for n, c in found.items()}
    tables = {
        t: json.loads((folder / f"nuscenes_keyframe/v1.0-mini/{t}.json").read_bytes())
        for t in ("sensor", "calibrated_sensor")
    }
    channel = {row["token"]: row["channel"] for row in tables["sensor"]}
    rows = {channel[row["sensor_token"]]: row for row in tables["calibrated_sensor"]}
    poses = {n: geometry.pose_matrix(row["rotation"], row["translation"]) for n, row in rows.items()}
    return poses, {n: np.array(row["camera_intrinsic"]) for n, row in rows.items() if row["camera_intrinsic"]}


@pytest.mark.real_data
@pytest.mark.parametrize("name", rigs.BUILT_IN)
def test_built_in_rigs_have_the_real_rigs_geometry(real_data, name):
    poses, intrinsics = real_poses(real_data, name)
    rig = rigs.read_rig(name)
    assert set(rig.cameras) == {n for n in poses if n not in ("LIDAR", "LIDAR_TOP")}
    for camera_name, camera in rig.cameras.items():
        real = poses[camera_name]
        angle = np.degrees(np.arccos(np.clip((np.trace(real[:3, :3].T @ camera.cam_to_ego[:3, :3]) - 1) / 2, -1, 1)))
        assert angle < 3.5, (camera_name, angle)
        assert np.linalg.norm(real[:3, 3] - camera.cam_to_ego[:3, 3]) < 0.3
        np.testing.assert_allclose(camera.intrinsics, intrinsics[camera_name], rtol=0.01, atol=2.0)
    if name == "nuscenes":
        lidar = poses["LIDAR_TOP"]
        assert np.degrees(np.arccos((np.trace(lidar[:3, :3].T @ rig.lidar.sensor_to_ego[:3, :3]) - 1) / 2)) < 2
        np.testing.assert_allclose(lidar[:3, 3], rig.lidar.sensor_to_ego[:3, 3], atol=0.02)


def test_rigs_are_plain_values():
    rig = rigs.read_rig("ddad")
    assert dataclasses.replace(rig, name="other").cameras is rig.cameras
    assert rig.body.in_images and rig.format == "dgp" and rig.keyframe_rate == rig.lidar.rate
