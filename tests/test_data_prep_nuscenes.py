"""data_prep.nuscenes: against the official devkit, and against exactly ray-cast boxes."""

import json
import shutil

import numpy as np
import pytest

from data_prep import nuscenes
from data_prep.lidar_depth import pixel_of
from data_prep.plan import BuildOptions, build_sample, take
from fsmde_jax import geometry
from fsmde_jax.data import schema, tfrecord
from fsmde_jax.data.records import load_manifest
from fsmde_jax.errors import ConfigError, DataError
from tests import boxes, rendered

RING = ["CAM_FRONT", "CAM_FRONT_LEFT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT", "CAM_FRONT_RIGHT"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return rendered.nuscenes(tmp_path_factory.mktemp("nuscenes"))


def records(folder):
    found = load_manifest(folder)
    reader = tfrecord.TFRecordReader([folder / s["name"] for s in found.shards])
    return found, [schema.decode(reader[i]) for i in range(len(reader))]


def devkit_points(root, token, channel):
    """What the devkit itself projects (min_dist 1 m, 1 px border): u, v, z."""
    from nuscenes.nuscenes import NuScenes

    tables = NuScenes("v1.0-mini", str(root), verbose=False)
    data = tables.get("sample", token)["data"]
    points, depth, _ = tables.explorer.map_pointcloud_to_image(data["LIDAR_TOP"], data[channel], min_dist=1.0)
    return np.stack([points[0], points[1], depth], 1)


def agree_with_devkit(sample, root, counts=None):
    for i, name in enumerate(sample.camera_names):
        u, v, z = sample.points[i].T.astype(np.float64)
        height, width = sample.native_size[i]
        ours = sample.points[i][(z > 1) & (u > 1) & (u < width - 1) & (v > 1) & (v < height - 1)]
        theirs = devkit_points(root, sample.sample_id, name)
        assert len(ours) == len(theirs) == (counts[i] if counts else len(ours)), name
        assert np.abs(ours[:, :2] - theirs[:, :2]).max() < 0.05, name
        assert np.abs(ours[:, 2] - theirs[:, 2]).max() < 1e-3, name


def test_rendered_points_agree_with_the_devkit(root):
    source = nuscenes.open_split(root, "v1.0-mini", "mini_train", cameras=["CAM_BACK", "CAM_FRONT"])
    assert source.cameras == ["CAM_FRONT", "CAM_BACK"]
    agree_with_devkit(build_sample(source.describe(1), BuildOptions()), root)


def test_points_lie_on_the_ray_cast_surface(root):
    """Ego motion compensation end to end: from the camera's own time the surface is where the LiDAR point says.

    A point may be hidden from the camera (then the cast depth is smaller), but nothing may lie in front of the surface.
    """
    sample = build_sample(nuscenes.open_split(root, "v1.0-mini", "mini_train").describe(2), BuildOptions(None))
    street, to_street = boxes.make_street(0), boxes.street_from_global()
    for i, name in enumerate(sample.camera_names):
        yaw, focal, position, delay = boxes.NUSCENES_CAMERAS[name]
        pose = to_street @ boxes.ego_pose(2 * boxes.FRAME_US + delay) @ boxes.camera_pose(yaw, position)
        uv, z = sample.points[i][:, :2].astype(np.float64), sample.points[i][:, 2]
        rays = geometry.unproject(boxes.intrinsics(focal, rendered.SMALL), uv, np.ones(len(uv)))
        cast = boxes.cast(street, pose[:3, 3], rays @ pose[:3, :3].T)[0]
        same = np.abs(cast - z) < 1e-2 + 1e-3 * z
        assert same.mean() > 0.85, (name, same.mean())
        behind = (cast < z)[~same]
        assert behind.mean() > 0.8 if len(behind) > 5 else True, name  # the rest graze an edge
        stored = sample.ego_to_global[i].astype(np.float64)
        stored[:3, 3] += sample.global_origin
        np.testing.assert_allclose(stored, boxes.ego_pose(2 * boxes.FRAME_US + delay), atol=2e-6)


def test_command_line_writes_a_whole_folder(root, tmp_path, capsys):
    argv = [
        "--dataroot",
        str(root),
        "--split",
        "mini_train",
        "--out",
        str(tmp_path / "r"),
        "--image_size",
        "32x64",
        "--workers",
        "1",
    ]
    nuscenes.main(argv)
    found, samples = records(tmp_path / "r")
    assert (found.dataset, found.split, found.num_samples, found.cameras) == ("nuscenes", "mini_train", 3, RING)
    assert not found.complete_split and found.point_rule == "round" and found.scenes == ["scene-0061"]
    assert (found.min_depth, found.max_depth, found.image_size) == (0.1, 80.0, [32, 64])
    np.testing.assert_allclose(found.focal_by_width, [0.506, 0.79], atol=1e-5)
    sample = samples[1]
    scale_y, scale_x = 32 / 45, 64 / 80
    k = boxes.intrinsics(0.79, rendered.SMALL)
    expected = [
        [scale_x * k[0, 0], 0, scale_x * (k[0, 2] + 0.5) - 0.5],
        [0, scale_y * k[1, 1], scale_y * (k[1, 2] + 0.5) - 0.5],
        [0, 0, 1],
    ]
    np.testing.assert_allclose(sample.intrinsics[0], expected, rtol=1e-6)
    assert sample.image_size.tolist() == [[32, 64]] * 6 and sample.native_size.tolist() == [[45, 80]] * 6
    delays = [boxes.NUSCENES_CAMERAS[n][3] for n in RING]
    assert (sample.camera_timestamps_us - sample.timestamp_us).tolist() == delays
    assert all(len(p) == 0 for p in sample.extra_points)
    nuscenes.main(argv)
    assert "already converted" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        nuscenes.main([*argv, "--jpeg_quality", "80"])
    assert "other samples or options" in capsys.readouterr().err


def test_sweeps_fill_only_the_extra_points(root, tmp_path):
    plain = nuscenes.open_split(root, "v1.0-mini", "mini_train")
    more = nuscenes.open_split(root, "v1.0-mini", "mini_train", sweeps=3)
    a, b = (build_sample(s.describe(1), BuildOptions()) for s in (plain, more))
    for i in range(6):
        np.testing.assert_array_equal(a.points[i], b.points[i])
    assert len(more.describe(1).extra_sweeps) == 3 and sum(map(len, b.extra_points)) > 1.5 * sum(map(len, b.points))
    names = [s.path.rsplit("__", 1)[1].split(".")[0] for s in more.describe(1).extra_sweeps]
    t = more.describe(1).timestamp_us
    assert [int(n) - t for n in names] == [-250_000, 250_000, -500_000]  # before and after in turn
    assert len(nuscenes.open_split(root, "v1.0-mini", "mini_train", sweeps=99).describe(0).extra_sweeps) == 4
    # the street stands still: the neighbours' points must fall on the same surface
    street, to_street = boxes.make_street(0), boxes.street_from_global()
    pose = (
        to_street
        @ boxes.ego_pose(boxes.FRAME_US - 35_000)
        @ boxes.camera_pose(0.0, boxes.NUSCENES_CAMERAS["CAM_FRONT"][2])
    )
    uvz = b.extra_points[0].astype(np.float64)
    rays = geometry.unproject(boxes.intrinsics(0.79, rendered.SMALL), uvz[:, :2], np.ones(len(uvz)))
    cast = boxes.cast(street, pose[:3, 3], rays @ pose[:3, :3].T)[0]
    assert (np.abs(cast - uvz[:, 2]) < 1e-2 + 1e-3 * uvz[:, 2]).mean() > 0.8


def test_rig_of_three_and_limit(tmp_path):
    root = rendered.nuscenes(tmp_path / "d", frames=(2, 0), cameras=rendered.RIG_OF_3)
    source = take(nuscenes.open_split(root, "v1.0-mini", "mini_train"), slice(1))
    assert source.cameras == ["CAM_FRONT", "CAM_BACK_LEFT", "CAM_BACK_RIGHT"] and len(source.sample_ids) == 1
    assert build_sample(source.describe(0), BuildOptions()).num_cameras == 3


def test_devkit_split_lists_are_disjoint_and_complete():
    _, splits = nuscenes.load_devkit()
    official = splits()
    assert not set(official["train"]) & set(official["val"]) and not set(official["mini_train"]) & set(
        official["mini_val"]
    )
    assert (len(official["train"]), len(official["val"])) == (700, 150)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "v1.0-min"}, "did you mean 'v1.0-mini'"),
        ({"split": "mini_trian"}, "did you mean 'mini_train'"),
        ({"cameras": ["CAM_FORNT"]}, "did you mean 'CAM_FRONT'"),
        ({"split": "test"}, "no scene of split 'test'"),
        ({"version": "v1.0-trainval"}, "no such folder"),
    ],
)
def test_wrong_choices_are_named(root, change, message):
    with pytest.raises((ConfigError, DataError), match=message):
        nuscenes.open_split(**{"dataroot": root, "version": "v1.0-mini", "split": "mini_train", **change})


def test_broken_tables_are_named(root, tmp_path):
    broken = tmp_path / "d"
    shutil.copytree(root, broken)
    tables = broken / "v1.0-mini"

    def opening():
        return nuscenes.open_split(broken, "v1.0-mini", "mini_train")

    text = (tables / "ego_pose.json").read_text()
    (tables / "ego_pose.json").write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"ego_pose\.json: broken table.*unpack"):
        opening()
    (tables / "ego_pose.json").unlink()
    with pytest.raises(DataError, match=r"ego_pose\.json: missing table"):
        opening()
    (tables / "ego_pose.json").write_text("[]")
    with pytest.raises(DataError, match=r"tables are broken \(no entry"):
        opening().describe(0)
    (tables / "ego_pose.json").write_text(text)
    maps = json.loads((tables / "map.json").read_text())
    (tables / "map.json").write_text(json.dumps([{**maps[0], "filename": "maps/none.png"}]))
    with pytest.raises(DataError, match=r"none\.png.*unpack"):
        opening()


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("scene", lambda t: t.__setitem__(slice(None), [1, 2]), r"scene\.json: broken table \(entry 0 is no object"),
        ("sample", lambda t: t[1].pop("next"), r"sample\.json: broken table \(entry 1 lacks \['next'\]"),
        ("sample", lambda t: t[2].update(next=t[0]["token"]), r"sample\.json: the samples of scene-0061 form a circle"),
        ("sample", lambda t: t[0].update(next="gone"), "do not fit together .*no entry 'gone'"),
        ("sample_data", lambda t: t[0].update(height=None), r"sample_data\.json, entry .*height and width are \(None"),
        ("sample_data", lambda t: t[0].update(timestamp=None), "its v1.0-mini tables are broken .*TypeError"),
        ("ego_pose", lambda t: t[0].update(translation=[1, 2]), r"ego_pose\.json, entry .*three finite .*unpack"),
        ("ego_pose", lambda t: t[0].update(translation=[1, 2, float("nan")]), r"ego_pose\.json, entry .*three finite"),
        ("ego_pose", lambda t: t[0].update(rotation=[[1], [2, 3]]), r"ego_pose\.json, entry .*quaternion needs four"),
        ("ego_pose", lambda t: t[0].update(rotation=None), r"ego_pose\.json, entry .*quaternion needs four"),
        (
            "calibrated_sensor",
            lambda t: t[0].update(camera_intrinsic=[[1, 0, 0], [1]]),
            r"calibrated_sensor\.json, entry .*camera_intrinsic is no 3x3 matrix .*unpack",
        ),
        ("calibrated_sensor", lambda t: t[0].update(camera_intrinsic=[]), r"calibrated_sensor\.json, entry .*3x3"),
        ("calibrated_sensor", lambda t: t[0].update(sensor_token=["a"]), "do not fit together .*TypeError.*unpack"),
    ],
)
def test_damaged_entries_are_named(root, tmp_path, table, change, message):
    shutil.copytree(root, tmp_path / "d")
    path = tmp_path / "d" / "v1.0-mini" / f"{table}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        nuscenes.open_split(tmp_path / "d", "v1.0-mini", "mini_train").describe(0)


def test_a_circle_of_sweeps_is_refused(root, tmp_path):
    shutil.copytree(root, tmp_path / "d")
    path = tmp_path / "d" / "v1.0-mini" / "sample_data.json"
    rows = json.loads(path.read_text())
    sweeps = [r for r in rows if r["filename"].endswith(".bin")]
    sweeps[1]["next"] = sweeps[0]["token"]
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match="form a circle"):
        nuscenes.open_split(tmp_path / "d", "v1.0-mini", "mini_train", sweeps=6).describe(0)


def test_missing_devkit_says_how_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "nuscenes.nuscenes", None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps -r requirements-devkit\.txt"):
        nuscenes.load_devkit()


@pytest.mark.real_data
def test_real_keyframe_agrees_with_the_devkit(real_data, tmp_path):
    root = real_data / "nuscenes_keyframe"
    nuscenes.main(["--dataroot", str(root), "--split", "mini_train", "--out", str(tmp_path / "r"), "--workers", "1"])
    found, (sample,) = records(tmp_path / "r")
    assert not found.complete_split and found.cameras == RING
    agree_with_devkit(sample, root, counts=[3053, 3696, 4089, 4820, 3369, 3076])


@pytest.mark.real_data
def test_real_keyframe_gives_the_protocols_golden_numbers(real_data):
    """A constant 10 m under P1 (written in sweep order, last point wins), independently computed constants."""
    source = nuscenes.open_split(real_data / "nuscenes_keyframe", "v1.0-mini", "mini_train")
    sample = build_sample(source.describe(0), BuildOptions())
    valid, error = [], []
    for i in range(6):
        truth = np.zeros(sample.native_size[i])
        column, row = pixel_of(sample.points[i][:, :2], "round").T
        truth[row, column] = sample.points[i][:, 2]
        truth = truth[(truth > 0.1) & (truth < 80)]
        valid.append(len(truth))
        error.append(np.mean(np.abs(10 - truth) / truth))
    assert valid == [3052, 3699, 4096, 4786, 3332, 3075]
    np.testing.assert_allclose(error, [0.46339, 0.44446, 0.50759, 0.62455, 0.56444, 0.55617], atol=6e-6)
