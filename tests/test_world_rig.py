"""Rig files and flags: what they mean, what is refused, and that rigs agree with the real ones they imitate."""

import dataclasses
import hashlib
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep import cli, dgp, folder, nuscenes
from data_prep.world import dataset, output, rigs
from data_prep.world.__main__ import look_of, parser
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
    assert (real.max_depth, planned.sweeps_per_keyframe, planned.format) == (60, 2, "nuscenes")


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
        (("world", "lidar"), "beams", [[-5, 5, float("inf")]], "expected elevations within"),
        (("world", "lidar"), "beams", [[-5, float("nan"), 3]], "expected elevations within"),
        (("world", "lidar"), "body_returns", 1, "expected true or false"),
        (("world",), "body", {"parts": [{"low": [0, 0, 0]}]}, "part 1: missing high"),
        (("world",), "body", {"parts": [{"low": [0, 0, 1], "high": [1, 1, 1]}]}, "high must lie above low"),
        (("world",), "body", {"parts": [{"low": [0, 0, 0], "high": [1, 1]}]}, "expected 3 numbers"),
        (("world",), "body", {"parts": [{"low": [0, 0, 0], "high": [1, 1, 1], "material": "glas"}]}, "'glass'"),
        (
            ("world",), "body", {"parts": [{"low": [0, 0, 0], "high": [1, 1, 1], "colour": [20, 20, 22]}]},
            "part 1: colour = [20, 20, 22]; expected red, green, blue within 0..1",
        ),
        (
            ("world",), "body", {"in_images": True, "parts": [{"low": [0, -0.5, 0.2], "high": [1.5, 0.5, 1]}]},
            "set world.format: dgp, which writes masks",
        ),
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
        (("cameras",), "cam/../../x", FOUR["cameras"]["left"], "expected a name of letters, digits, _ and - only"),
        (("cameras",), "", FOUR["cameras"]["left"], "expected a name of letters, digits, _ and - only"),
        (("cameras",), "LIDAR", FOUR["cameras"]["left"], "camera LIDAR: this is the LiDAR's name"),
        (("cameras",), "LIDAR_TOP", FOUR["cameras"]["left"], "camera LIDAR_TOP: this is the LiDAR's name"),
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


def look(*flags: str) -> dataset.Look:
    return look_of(parser().parse_args(["--out", "unused", *flags]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frames", "0"], "--frames=0"),
        (["--frames", "2001"], "--frames=2001: expected at most 2000"),
        (["--seed", "-1"], "--seed=-1"),
        (["--sweeps_between", "5"], "expected at most 4"),
        (["--rig", "ddad", "--sweeps_between", "1"], "only the nuScenes format"),
        (["--rig", "kitti"], "neither a .yaml file nor a rig"),
    ],
)
def test_wrong_flags_are_named(flags, message):
    with pytest.raises(ConfigError, match=message):
        look(*flags)


def test_no_sweep_lies_between_keyframes_of_every_revolution(tmp_path):
    content = json.loads(json.dumps(FOUR))
    for rate, most in ((10, 0), (5, 1)):
        content["world"]["keyframe_rate"] = rate
        path = str(write(tmp_path / "four.yaml", content))
        assert look("--rig", path, "--sweeps_between", str(most)).sweeps_between == most
        with pytest.raises(ConfigError, match=f"--sweeps_between={most + 1}: expected at most {most}"):
            look("--rig", path, "--sweeps_between", str(most + 1))


def test_the_longest_scene_ends_before_the_next_one_starts(tmp_path):
    content = json.loads(json.dumps(FOUR))
    content["world"] |= {"keyframe_rate": 0.5}
    content["cameras"]["left"]["delay_ms"], content["cameras"]["right"]["delay_ms"] = 999, -999
    path = write(tmp_path / "four.yaml", content)
    longest = look("--rig", str(path), "--frames", "500")
    train, val, other = (
        output.Job(longest, tmp_path, split, index, "scene").start_us
        for split, index in (("train", 0), ("val", 0), ("train", 1))
    )
    delays = [round(camera.delay * 1e6) for camera in rigs.read_rig(path).cameras.values()]
    last = 499 * 2_000_000 + max(delays)
    assert train + last < val + min(delays) and val + last < other + min(delays)
    with pytest.raises(ConfigError, match=r"--frames=501: expected at most 500.* 0\.5 keyframes per second"):
        look("--rig", str(path), "--frames", "501")


def test_a_file_of_a_built_in_rigs_name_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nuscenes").write_text("something else")
    found = look()
    assert found.rig == "nuscenes"
    assert found.rig_digest == hashlib.sha256(rigs.built_in("nuscenes").read_bytes()).hexdigest()


def test_the_printed_commands_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "my world"
    out.mkdir()
    text = dataset.describe(look(), Path("my world"), {"train": 2, "val": 0})
    (line,) = text.splitlines()[1:]
    assert shlex.split(line) == [
        "python", "-m", "data_prep.nuscenes", "--dataroot", "my world", "--version", "v1.0-trainval",
        "--split", "train", "--image_size", "native", "--out", "records/my world_train",
    ]  # fmt: skip
    monkeypatch.chdir(out)
    lines = dataset.describe(look("--rig", "ddad"), Path("."), {"train": 1, "val": 1}).splitlines()[1:]
    assert [shlex.split(line)[-1] for line in lines] == ["records/my world_train", "records/my world_val"]
    assert all("--json ddad.json --masks masks" in line and "--image_size native" in line for line in lines)


def test_rendered_folders_that_a_converter_cannot_open_say_what_reads_them(tmp_path):
    (tmp_path / ".scenes").mkdir()
    with pytest.raises(DataError, match=r"no such folder; it is rendered, but not finished: .* again to finish it"):
        nuscenes.load_tables(tmp_path, "v1.0-trainval")
    (tmp_path / "ddad.json").touch()
    with pytest.raises(DataError, match=r"data_prep\.ddad with --json .*ddad\.json reads it"):
        nuscenes.load_tables(tmp_path, "v1.0-trainval")
    (tmp_path / "ddad.json").unlink()
    (tmp_path / "v1.0-trainval").mkdir()
    with pytest.raises(DataError, match=r"data_prep\.nuscenes with --version v1\.0-trainval reads it"):
        nuscenes.load_tables(tmp_path, "v1.0-mini")
    with pytest.raises(ConfigError, match=r"data_prep\.nuscenes with --version v1\.0-trainval reads it"):
        dgp.scene_files(tmp_path / "ddad.json")
    with pytest.raises(DataError, match=r"--dataroot must hold v1\.0-mini/"):
        nuscenes.load_tables(tmp_path / "recorded", "v1.0-mini")


def test_workers_are_as_many_as_memory_and_cores_allow(monkeypatch):
    assert 0 < cli.usable_memory() < 2**50
    monkeypatch.setattr(cli, "usable_cores", lambda: 16)
    for memory, expected in ((3.5e9, 3), (0.5e9, 1), (float("inf"), 16)):
        monkeypatch.setattr(cli, "usable_memory", lambda memory=memory: memory)
        assert parser().parse_args(["--out", "unused"]).workers == expected


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
@pytest.mark.parametrize("name", ["nuscenes", "ddad"])
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
