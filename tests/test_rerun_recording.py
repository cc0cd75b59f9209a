"""Recordings for the Rerun viewer, read back with Rerun's own reader; and prediction's memory over a long sequence."""

import dataclasses
import sys
from collections import namedtuple

import cv2
import numpy as np
import pytest

import fsmde_jax
from fsmde_jax import predict, predict_rig, rig_frames
from fsmde_jax.data import dense
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.viz import pointcloud, rerun_recording
from tests import rooms
from tests.sample_factory import write_folder

Usage = namedtuple("Usage", "total used free")
rerun_chunk = pytest.importorskip("rerun.chunk", reason="rerun-sdk is not installed")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    samples = [
        dataclasses.replace(rooms.make(seed, cameras=3, native_size=(48, 96)), scene="drive") for seed in range(3)
    ]
    return write_folder(tmp_path_factory.mktemp("records") / "rooms", samples)


def read(path):
    """{entity: {frame: {component: value}}} of a recording; frame None = static."""
    found = {}
    for chunk in rerun_chunk.RrdReader(str(path)).stream():
        batch = chunk.to_record_batch()
        table = {
            name: (column.cast("int64") if name == "time" else column).to_pylist()  # nanoseconds
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }
        for row in range(chunk.num_rows):
            frame = table["frame"][row] if "frame" in table else None
            values = {name: column[row] for name, column in table.items()}
            found.setdefault(chunk.entity_path, {}).setdefault(frame, {}).update(values)
    return found


def picture(blob):
    return cv2.imdecode(np.array(blob, np.uint8).ravel(), cv2.IMREAD_UNCHANGED)


def test_a_recording_holds_what_the_files_hold(records, tmp_path):
    out = tmp_path / "out"
    predict.main(
        [
            "--checkpoint", "lite0", "--input", str(records), "--out", str(out), "--image_size", "32x64", "--keep",
            "0.5", "--write", "npz", "ply", "--rerun", str(tmp_path / "new" / "all.rrd"),
        ]
    )  # fmt: skip
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["all.rrd"]
    found = read(tmp_path / "new" / "all.rrd")
    frames = list(rig_frames.open_source(records).frames())
    cameras = frames[0].cameras
    entities = {f"/world/ego/cameras/{name}{part}" for name in cameras for part in ("", "/image", "/depth")}
    assert {"/world", "/world/ego", "/world/ego/cloud", "/world/ego/lidar"} | entities <= set(found)
    for number, frame in enumerate(frames):
        files = np.load(out / frame.name / "rig.npz")
        name = cameras[1]
        stored = picture(found[f"/world/ego/cameras/{name}/depth"][number]["EncodedDepthImage:blob"])
        np.testing.assert_allclose(stored / 256, files["depth"][1], atol=0.5 / 256 + 1e-6)
        assert found[f"/world/ego/cameras/{name}/depth"][number]["EncodedDepthImage:meter"] == [256]
        shown = picture(found[f"/world/ego/cameras/{name}/image"][number]["EncodedImage:blob"])[..., ::-1]
        assert np.abs(shown.astype(int) - frame.images[1]).mean() < 12  # JPEG
        pinhole = found[f"/world/ego/cameras/{name}"][number]
        matrix = np.reshape(pinhole["Pinhole:image_from_camera"], (3, 3)).T  # column by column
        np.testing.assert_allclose(matrix, frame.intrinsics[1], rtol=1e-6)
        assert pinhole["Pinhole:resolution"] == [[96, 48]]
        np.testing.assert_allclose(pinhole["Transform3D:translation"][0], frame.cam_to_ego[1, :3, 3], atol=1e-6)
        rotation = np.reshape(pinhole["Transform3D:mat3x3"], (3, 3)).T
        np.testing.assert_allclose(rotation, frame.cam_to_ego[1, :3, :3], atol=1e-6)
        ply = (out / frame.name / "cloud.ply").read_bytes().split(b"end_header\n", 1)[1]
        points = np.frombuffer(ply, np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)]))["xyz"]
        np.testing.assert_array_equal(found["/world/ego/cloud"][number]["Points3D:positions"], points)
        np.testing.assert_allclose(
            found["/world/ego/lidar"][number]["Points3D:positions"], frame.lidar, rtol=1e-5, atol=1e-5
        )
        moved = frame.ego_to_global[0, :3, 3] - frames[0].ego_to_global[0, :3, 3]
        np.testing.assert_allclose(found["/world/ego"][number]["Transform3D:translation"][0], moved, atol=1e-4)


def test_only_a_recording_and_the_time_since_the_first_frame(records, tmp_path):
    """DDAD's clock stands in a year that no timestamp of the viewer can hold."""
    model = fsmde_jax.load_model("lite0", image_size=(32, 64))
    source = rig_frames.open_source(records)

    def frames():
        for number, frame in enumerate(source.frames()):
            frame.time_us = 15616458250027900 + 500_000 * number
            yield frame

    late = rig_frames.Source(source.count, frames, source.what)
    count = predict_rig.predict_source(model, late, tmp_path / "out", kinds=(), limit=2, rerun=tmp_path / "two.rrd")
    assert count == 2 and not (tmp_path / "out").exists()
    found = read(tmp_path / "two.rrd")["/world/ego/cloud"]
    assert sorted(found) == [0, 1]
    assert [found[n]["time"] for n in (0, 1)] == [0, 500_000_000]


@pytest.mark.parametrize("whole", [0, 1])
def test_a_broken_sequence_keeps_the_frames_so_far_under_another_name(records, tmp_path, whole, capsys):
    model = fsmde_jax.load_model("lite0", image_size=(32, 64))
    source = rig_frames.open_source(records)
    (tmp_path / "a.rrd").write_bytes(b"of another day")

    def frames():
        yield from list(source.frames())[:whole]
        raise RuntimeError("the camera is gone")

    with pytest.raises(RuntimeError, match="the camera is gone"):
        predict_rig.predict_source(
            model, rig_frames.Source(3, frames, ""), tmp_path / "out", kinds=(), rerun=tmp_path / "a.rrd"
        )
    assert (tmp_path / "a.rrd").read_bytes() == b"of another day"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.partial.rrd", "a.rrd"][1 - whole :]
    if whole:
        assert sorted(read(tmp_path / "a.partial.rrd")["/world/ego/cloud"]) == [0]
        assert "a.partial.rrd holds the first 1 frames" in capsys.readouterr().err


def frame_of(names, sizes, shift=0.0):
    """Arguments of `RerunRecording.log`: cameras of different sizes; the car stands `shift` metres on."""
    pose = np.eye(4)
    pose[0, 3] = 1000 + shift
    images = [np.full((*size, 3), 90, np.uint8) for size in sizes]
    cloud = pointcloud.Cloud(np.ones((5, 3), np.float32), np.ones((5, 3), np.uint8), np.zeros(5, np.int32))
    k = np.tile(np.array([[30.0, 0, 20], [0, 30, 10], [0, 0, 1]]), (len(names), 1, 1))
    depth = [np.full(size, 7.0, np.float32) for size in sizes]
    return names, images, depth, k, np.tile(np.eye(4), (len(names), 1, 1)), cloud, {"ego_to_global": pose}


def log(recording, number, frame, **more):
    recording.log(number, *frame[:-1], **frame[-1], **more)


def test_cameras_that_go_and_come_names_of_any_kind_and_sizes(tmp_path):
    with rerun_recording.RerunRecording(tmp_path / "a.rrd") as recording:
        log(recording, 0, frame_of(["front", "CAM left/1"], [(20, 40), (24, 32)]))
        log(recording, 1, frame_of(["front"], [(20, 40)]))
        log(recording, 2, frame_of(["front", "lidar"], [(20, 40), (8, 12)]))
    found = read(tmp_path / "a.rrd")
    left = "/world/ego/cameras/CAM\\ left\\/1"
    assert found[left][0]["Pinhole:resolution"] == [[32, 24]]
    assert [found[left][n]["Clear:is_recursive"] for n in (1, 2)] == [[True], [True]]
    assert picture(found["/world/ego/cameras/lidar/depth"][2]["EncodedDepthImage:blob"]).shape == (8, 12)
    assert found["/world/ego/lidar"][2]["Points3D:positions"] == []


def test_depth_that_16_bits_do_not_hold_is_none_as_in_the_files(tmp_path):
    frame = frame_of(["front"], [(1, 6)])
    frame[2][0][:] = [[7, dense.MAX_DEPTH, dense.MAX_DEPTH + 0.01, 300, np.inf, 0]]
    with rerun_recording.RerunRecording(tmp_path / "a.rrd") as recording:
        log(recording, 0, frame)
    shown = picture(read(tmp_path / "a.rrd")["/world/ego/cameras/front/depth"][0]["EncodedDepthImage:blob"])
    assert shown.tolist() == [[7 * 256, 65535, 0, 0, 0, 0]]
    np.testing.assert_array_equal(shown / 256, dense.decode(dense.encode(frame[2][0]), (1, 6), ""))


def test_every_drive_begins_at_its_own_origin_and_after_the_last_one(tmp_path):
    second = 1_000_000
    with rerun_recording.RerunRecording(tmp_path / "a.rrd") as recording:
        for number, (scene, time, shift) in enumerate(
            [
                ("b", 90 * second, 0),
                ("b", 92 * second, 3),
                ("a", 7 * second, 5e5),
                ("a", 8 * second, 5e5 + 4),
                ("c", None, 0),
            ]
        ):
            log(recording, number, frame_of(["front"], [(20, 40)], shift), time_us=time, scene=scene)
    found = read(tmp_path / "a.rrd")
    ego = found["/world/ego"]
    assert [ego[n].get("time") for n in range(5)] == [0, 2_000_000_000, 3_000_000_000, 4_000_000_000, None]
    assert [ego[n]["Transform3D:translation"][0][0] for n in range(5)] == [0, 3, 0, 4, 0]
    assert found["/scene"][3]["TextDocument:text"] == ["a"]


def test_a_large_cloud_is_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr(rerun_recording, "MAX_POINTS", 10)
    *frame, more = frame_of(["front"], [(20, 40)])
    frame[-1] = pointcloud.Cloud(
        np.arange(99, dtype=np.float32).reshape(33, 3), np.zeros((33, 3), np.uint8), np.zeros(33, np.int32)
    )
    with rerun_recording.RerunRecording(tmp_path / "a.rrd") as recording:
        recording.log(0, *frame, **more)
    np.testing.assert_array_equal(
        read(tmp_path / "a.rrd")["/world/ego/cloud"][0]["Points3D:positions"], frame[-1].points[::4]
    )


def test_a_disk_that_gets_full_is_an_error_that_keeps_the_frames_so_far(tmp_path, monkeypatch):
    recording = rerun_recording.RerunRecording(tmp_path / "a.rrd")
    with pytest.raises(DataError, match=r"a.rrd: less than 200 MB are free there; free space"), recording:
        log(recording, 0, frame_of(["front"], [(20, 40)]))
        monkeypatch.setattr(rerun_recording.shutil, "disk_usage", lambda place: Usage(10**9, 9 * 10**8, 10**8))
        log(recording, 1, frame_of(["front"], [(20, 40)]))
    assert [p.name for p in tmp_path.iterdir()] == ["a.partial.rrd"]
    assert sorted(read(tmp_path / "a.partial.rrd")["/world/ego/cloud"]) == [0]


def test_a_write_that_fails_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    """Rerun itself only logs it."""

    def flush(timeout_sec):
        raise RuntimeError("gone")

    recording = rerun_recording.RerunRecording(tmp_path / "a.rrd")
    monkeypatch.setattr(recording._stream, "flush", flush)
    with pytest.raises(DataError, match=r"a.rrd: cannot write \(Rerun says: gone"), recording:
        log(recording, 0, frame_of(["front"], [(20, 40)]))
    assert not list(tmp_path.iterdir())


def test_wrong_names_are_said(tmp_path, monkeypatch, records, capsys):
    with pytest.raises(ConfigError, match=r"ends in \.rrd"):
        rerun_recording.checked_path(tmp_path / "a.txt")
    monkeypatch.setattr(rerun_recording.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        predict.main(
            ["--checkpoint", "lite0", "--input", str(records), "--out", str(tmp_path / "o"), "--rerun", "a.rrd"]
        )
    assert "not installed: rerun-sdk; pip install" in capsys.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_level_over_a_long_sequence(tmp_path):
    """Frames of 1 MB, their depth, clouds, pictures and recording: after the first few nothing is kept."""
    model = fsmde_jax.load_model("lite0", image_size=(32, 64))
    sample = rooms.make(0, cameras=3, native_size=(48, 96))
    rng = np.random.default_rng(0)
    resident = []

    def frames():
        for number in range(20):
            with open("/proc/self/statm") as file:
                resident.append(int(file.read().split()[1]) * 4096 / 1e6)
            yield rig_frames.RigFrame(
                f"{number:03d}", ["a", "b"], list(rng.integers(0, 256, (2, 320, 480, 3), np.uint8)),
                sample.intrinsics[:2] * np.array([5, 20 / 3, 1])[:, None], sample.cam_to_ego[:2].astype(np.float64),
            )  # fmt: skip

    source = rig_frames.Source(20, frames, "")
    assert {"panorama", "birdseye"} <= set(predict_rig.KINDS)
    predict_rig.predict_source(model, source, tmp_path, rerun=tmp_path / "a.rrd")
    # 12 frames of images, depth, confidence and clouds would be 12 x 8 MB.
    assert resident[19] - resident[7] < 40, resident
    for file in ("cloud.ply", "panorama.png", "birdseye.png", "a_depth_color.png"):
        assert len(list(tmp_path.glob(f"*/{file}"))) == 20
