"""Prediction frame by frame: videos that end early, tables read once, warnings, ranges of depth, room on the disk."""

import errno
import os
import types

import cv2
import numpy as np
import pytest
import yaml

from data_prep import nuscenes
from fsmde_jax import disk, predict_images, predict_rig, rig_frames
from fsmde_jax.data import tfrecord
from fsmde_jax.depth_model import Prediction
from fsmde_jax.errors import DataError
from fsmde_jax.viz import colour
from tests import rendered

SIZE = (48, 96)
K = np.array([[60.0, 0, 47.5], [0, 60, 23.5], [0, 0, 1]])


def noise(count):
    return list(np.random.default_rng(0).integers(0, 256, (count, *SIZE, 3), np.uint8))


def write_video(path, count):
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, SIZE[::-1])
    for image in noise(count):
        video.write(image)
    video.release()


@pytest.fixture
def videos(tmp_path):
    """Function: the frames' names of a rig with these videos, and what the source is called."""
    cameras = {
        name: {"image_size": list(SIZE), "intrinsics": K.tolist(), "cam_to_ego": rotated(turn).tolist()}
        for name, turn in (("left", 0.4), ("right", -0.4))
    }
    (tmp_path / "rig.yaml").write_text(yaml.safe_dump({"cameras": cameras}))

    def read():
        source = rig_frames.open_source(tmp_path, str(tmp_path / "rig.yaml"))
        return [frame.name for frame in source.frames()], source

    return read


def rotated(turn):
    """cam_to_ego of a camera at the origin that looks `turn` radians to the left of the ego's x axis."""
    pose = np.eye(4)
    c, s = np.cos(turn), np.sin(turn)
    pose[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    return pose


def test_a_video_that_was_cut_ends_the_prediction_and_is_named(videos, tmp_path, capsys):
    write_video(tmp_path / "left.mkv", 20)
    write_video(tmp_path / "right.mkv", 20)
    content = (tmp_path / "right.mkv").read_bytes()
    (tmp_path / "right.mkv").write_bytes(content[: int(0.7 * len(content))])
    names, source = videos()
    # Frames of noise are all of about the same size: 70 % of the file are 14, of which the last may be cut.
    assert len(names) in (13, 14) and names[-1] == f"{len(names) - 1:06d}"
    assert source.count == 20 and "20 frames by their headers" in source.what
    said = f"right.mkv: no frame {len(names)}, though its header says 20; prediction ends there"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("lengths", [(3, 5), (5, 3)])
def test_the_shorter_video_ends_the_prediction(videos, tmp_path, lengths, capsys):
    for name, count in zip(("left", "right"), lengths, strict=True):
        write_video(tmp_path / f"{name}.avi", count)
    assert videos()[0] == ["000000", "000001", "000002"]
    shorter = "left" if lengths[0] == 3 else "right"
    assert f"{shorter}.avi: no frame 3; prediction ends there" in capsys.readouterr().out


def test_videos_that_do_not_say_how_long_they_are_are_read_to_their_end(videos, tmp_path, capsys):
    """JPEGs one after the other: a stream without a header."""
    stream = b"".join(cv2.imencode(".jpg", image)[1].tobytes() for image in noise(4))
    for name in ("left", "right"):
        (tmp_path / f"{name}.avi").write_bytes(stream)
    names, source = videos()
    assert len(names) == 4 and source.count == 0 and "of unknown length" in source.what
    assert not capsys.readouterr().out
    model = Student([np.full(SIZE, 5.0, np.float32)] * 2)
    assert predict_rig.predict_source(model, source, tmp_path / "all", kinds=("npz",)) == 4
    assert predict_rig.predict_source(model, source, tmp_path / "some", kinds=("npz",), limit=3) == 3


def test_a_file_that_is_no_video_is_named(videos, tmp_path):
    write_video(tmp_path / "left.avi", 2)
    (tmp_path / "right.avi").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"right.avi: not a video that can be read; delete or replace it"):
        videos()


def test_the_tables_of_a_dataset_are_read_once_for_all_splits(tmp_path, monkeypatch):
    """Of the full nuScenes they are several GB."""
    rendered.nuscenes(tmp_path, frames=(2, 2), size=(36, 48), cameras=rendered.RIG_OF_3, columns=20)
    loaded, load = [], nuscenes.load_tables
    monkeypatch.setattr(nuscenes, "load_tables", lambda *where: loaded.append(where) or load(*where))
    source = rig_frames.open_source(tmp_path)
    assert len({frame.scene for frame in source.frames()}) == 2  # one of mini_train, one of mini_val
    assert loaded == [(tmp_path, "v1.0-mini")]


class Student:
    """Stands for a `DepthModel` that always finds `depth`, and that knows no focal length above 100 pixels."""

    def __init__(self, depth, max_depth=80.0):
        self.depth, self.model = depth, types.SimpleNamespace(min_depth=0.5, max_depth=max_depth)

    def __call__(self, images, intrinsics, cam_to_ego):
        return Prediction(np.stack(self.depth), np.full_like(np.stack(self.depth), 0.5))

    def out_of_range(self, intrinsics, widths, names):
        return [
            f"{n}: {k[0, 0]:.0f} px of {w}" for n, k, w in zip(names, intrinsics, widths, strict=True) if k[0, 0] > 100
        ]


def frame(name, focal=60.0, cameras=("a", "b")):
    k = np.tile(K, (len(cameras), 1, 1))
    k[:, 0, 0] = focal
    poses = np.stack([rotated(turn) for turn in np.linspace(0.4, -0.4, len(cameras))])
    return rig_frames.RigFrame(name, list(cameras), noise(len(cameras)), k, poses)


def test_every_camera_that_the_student_does_not_know_is_said_once_whenever_it_comes(tmp_path, capsys):
    frames = [
        frame("0"), frame("1", 120), frame("2", 120), frame("3"), frame("4", 150, ("a", "c")), frame("5", 120),
    ]  # fmt: skip
    source = rig_frames.Source(len(frames), lambda: iter(frames), "")
    assert predict_rig.predict_source(Student([np.full(SIZE, 5.0)] * 2), source, tmp_path, kinds=()) == 6
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    wanted = ["a: 120", "b: 120", "a: 150", "c: 150"]
    assert said == [f"warning: {each} px of 96" for each in wanted]


def test_the_panorama_spans_the_students_own_range(tmp_path):
    """100 m and 190 m have one colour on a scale to 80 m, two on one to 200 m."""
    source = rig_frames.Source(1, lambda: iter([frame("0")]), "")

    def depth_pictures(max_depth):
        found = []
        for metres in (100.0, 190.0):
            out = tmp_path / f"{max_depth}_{metres}"
            student = Student([np.full(SIZE, metres, np.float32)] * 2, max_depth)
            predict_rig.predict_source(student, source, out, kinds=("panorama",))
            found.append(cv2.imread(str(out / "0" / "panorama.png")))
        return found

    near, far = depth_pictures(80.0)
    np.testing.assert_array_equal(near, far)
    near, far = depth_pictures(200.0)
    assert (near != far).any(-1).mean() > 0.2  # the depth block is about half of the picture


def test_depth_that_16_bits_do_not_hold_is_none_in_the_png(tmp_path):
    """65535 / 256 = 255.996 m is the last that they hold; npz has all of it."""
    depth = np.full((2, *SIZE), 10.0, np.float32)
    depth[0, 0, :6] = 255.99, 255.996, 256.0, 300.0, 1e6, 0.5
    source = rig_frames.Source(1, lambda: iter([frame("0")]), "")
    predict_rig.predict_source(Student(list(depth)), source, tmp_path, kinds=("png", "npz"))
    png = cv2.imread(str(tmp_path / "0" / "a_depth.png"), cv2.IMREAD_UNCHANGED)
    assert png.dtype == np.uint16 and (png[1:] == 2560).all()
    assert png[0, :6].tolist() == [65533, 65535, 0, 0, 0, 128]
    np.testing.assert_array_equal(np.load(tmp_path / "0" / "rig.npz")["depth"], depth)
    assert sorted(p.name for p in (tmp_path / "0").iterdir()) == ["a_depth.png", "b_depth.png", "rig.npz"]


def frames_of(count):
    return rig_frames.Source(count, lambda: iter([frame(str(i)) for i in range(count or 3)]), "")


def test_colour_pictures_of_all_cameras_have_one_scale(tmp_path):
    """8 m is the same colour in both, whatever else is there; the scale is that of the panorama."""
    depth = np.full((2, *SIZE), 8.0, np.float32)
    depth[0, :24], depth[1, :24], depth[1, 0, 0] = 70.0, 2.0, 0.0
    predict_rig.predict_source(Student(list(depth)), frames_of(1), tmp_path, kinds=("color",))
    assert sorted(p.name for p in (tmp_path / "0").iterdir()) == ["a_depth_color.png", "b_depth_color.png"]
    shown = [cv2.imread(str(tmp_path / "0" / f"{name}_depth_color.png"))[..., ::-1] for name in "ab"]
    np.testing.assert_array_equal(shown[0][24:], shown[1][24:])
    np.testing.assert_array_equal(shown[1], colour.colour_depth(depth[1], 1.0, 80.0))
    assert (shown[1][0, 0] == 0).all() and shown[0][0, 0, 2] > shown[0][0, 0, 0] and shown[1][1, 0, 0] > 150
    assert "color" in predict_rig.KINDS


def test_what_all_frames_will_take_is_said_after_the_first(tmp_path, capsys):
    student, out = Student([np.full(SIZE, 5.0, np.float32)] * 2), tmp_path / "out"
    assert predict_rig.predict_source(student, frames_of(3), out, kinds=("png", "npz")) == 3
    size = sum(file.stat().st_size for file in (out / "0").iterdir())
    assert capsys.readouterr().out.splitlines() == [f"about {disk.amount(3 * size)} for 3 frames in {out}"]
    predict_rig.predict_source(student, frames_of(0), out, kinds=("png", "npz"))
    assert capsys.readouterr().out.splitlines() == [f"about {disk.amount(size)} a frame in {out}"]
    for source, limit in ((frames_of(3), 1), (frames_of(1), 0)):  # nothing is left to announce
        predict_rig.predict_source(student, source, out, kinds=("png", "npz"), limit=limit)
    predict_rig.predict_source(student, frames_of(3), out, kinds=())
    assert not capsys.readouterr().out
    assert [disk.amount(n) for n in (2.34e12, 1e9, 45.4e6, 700)] == ["2340.0 GB", "1.0 GB", "45 MB", "1 KB"]


def test_a_run_that_would_fill_the_disk_stops_after_its_first_frame(tmp_path, monkeypatch):
    student, out = Student([np.full(SIZE, 5.0, np.float32)] * 2), tmp_path / "out"
    free = types.SimpleNamespace(free=0)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda place: free)
    with pytest.raises(
        DataError, match=rf"{out}: 3 frames take about \d+ KB, but only 0 KB are free there; write less"
    ):
        predict_rig.predict_source(student, frames_of(3), out, kinds=("npz",))
    assert [p.name for p in out.iterdir()] == ["0"]
    size = (out / "0" / "rig.npz").stat().st_size
    free.free = 2 * size
    assert predict_rig.predict_source(student, frames_of(3), out, kinds=("npz",)) == 3
    free.free = 0  # the same again: every file takes the place of an old one
    assert predict_rig.predict_source(student, frames_of(3), out, kinds=("npz",)) == 3
    with pytest.raises(DataError, match=r"4 frames take about"):
        predict_rig.predict_source(student, frames_of(4), out, kinds=("npz",))


def by_a_student(images, out):
    predict_rig.predict_source(Student([np.full(SIZE, 5.0, np.float32)] * 2), frames_of(1), out, kinds=("png", "npz"))


def by_a_teacher(images, out):
    teacher = types.SimpleNamespace(card=types.SimpleNamespace(max_depth=None))
    predict_images.predict_folder(teacher, images, out, size=None, npy=True)


@pytest.mark.parametrize(("predict", "folder"), [(by_a_student, "/0"), (by_a_teacher, "")])
def test_a_place_that_cannot_be_written_is_said(predict, folder, tmp_path, monkeypatch):
    """A full disk leaves no half a file; nor is there room below a file."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(predict_images, "predictor", lambda teacher, size: lambda image: image[..., 0] / 255)
    images = tmp_path / "0.png"
    cv2.imwrite(str(images), noise(1)[0])
    with monkeypatch.context() as patch, pytest.raises(DataError) as error:
        patch.setattr(tfrecord.os, "fsync", full)
        predict(images, tmp_path / "out")
    advice = "free space or choose another --out"
    assert str(error.value) == f"{tmp_path}/out{folder}: cannot write (No space left on device); {advice}"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=rf"file/out{folder}: cannot write \(Not a directory\); {advice}"):
        predict(images, tmp_path / "file" / "out")
    predict(images, tmp_path / "out")


def test_a_recording_counts_too(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rerun", reason="rerun-sdk is not installed")
    student = Student([np.full(SIZE, 5.0, np.float32)] * 2)
    predict_rig.predict_source(student, frames_of(3), tmp_path / "o", kinds=("npz",), rerun=tmp_path / "a.rrd")
    (said,) = capsys.readouterr().out.splitlines()
    estimate = float(said.partition(" and about ")[2].split(" KB for 3 frames in ")[0]) * 1000
    assert said.endswith(f"for 3 frames in {tmp_path / 'a.rrd'}")
    assert estimate == pytest.approx((tmp_path / "a.rrd").stat().st_size, rel=0.5)  # of each file a part is the head


def test_clouds_of_every_third_row_and_column(tmp_path):
    student = Student([np.full(SIZE, 5.0, np.float32)] * 2)
    sizes = {}
    for stride in (1, 3):
        predict_rig.predict_source(
            student, frames_of(1), tmp_path / str(stride), kinds=("ply",), keep=1.0, stride=stride
        )
        sizes[stride] = (tmp_path / str(stride) / "0" / "cloud.ply").stat().st_size
    assert sizes[3] < sizes[1] / 6
