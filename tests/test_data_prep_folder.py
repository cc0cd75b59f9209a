"""data_prep.folder: a user's own rig gives the labels of the dataset that it was exported from."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep import ddad, folder, rig_yaml, verify
from data_prep import poses as poses_module
from data_prep.plan import BuildOptions, build_sample
from fsmde_jax import geometry
from fsmde_jax.data.records import load_manifest
from fsmde_jax.errors import ConfigError, DataError
from tests import rendered

RULE = BuildOptions(point_rule="truncate")


@pytest.fixture
def rig(tmp_path):
    """A DGP scene with three cameras, exported to a folder rig; and the converter's own samples."""
    source = ddad.open_split(rendered.dgp(tmp_path / "dgp", (("000150", "1"),)), "val")
    plans = [source.describe(i) for i in range(3)]
    return rendered.folder_of(plans, tmp_path / "rig"), [build_sample(p, RULE) for p in plans]


def edit(path, change):
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))


def same_labels(ours, theirs):
    assert ours.camera_names == theirs.camera_names
    for a, b in zip(ours.points, theirs.points, strict=True):
        assert len(a) == len(b)
        np.testing.assert_allclose(a[:, :2], b[:, :2], atol=2e-3)
        np.testing.assert_allclose(a[:, 2], b[:, 2], rtol=1e-5)
    np.testing.assert_allclose(ours.intrinsics, theirs.intrinsics, rtol=1e-6)
    np.testing.assert_allclose(ours.ego_to_global, theirs.ego_to_global, atol=1e-5)
    np.testing.assert_array_equal(ours.camera_timestamps_us, theirs.camera_timestamps_us)


def test_export_gives_the_same_labels(rig, tmp_path):
    paths, expected = rig
    source = folder.open_folder(**paths)
    assert len(source.sample_ids) == 3 and source.cameras == ["CAMERA_01", "CAMERA_05", "CAMERA_07"]
    for i, sample in enumerate(expected):
        same_labels(build_sample(source.describe(i), RULE), sample)
    argv = [
        x
        for flag, key in (("--rig", "rig_path"), ("--images", "images"), ("--lidar", "lidar"), ("--poses", "poses"))
        for x in (flag, str(paths[key]))
    ]
    folder.main(
        [*argv, "--out", str(tmp_path / "r"), "--workers", "1", "--split", "val", "--scene", "drive 7", "--sweeps", "1"]
    )
    found = load_manifest(tmp_path / "r")
    assert (found.dataset, found.split, found.scenes, found.image_size) == ("folder", "val", ["drive 7"], None)
    assert found.source_version == "exported" and found.sweeps == 1 and found.max_depth == 200


@pytest.mark.real_data
@pytest.mark.parametrize("suffix", [".ply", ".pcd"])
def test_real_clip_exported(real_data, tmp_path, suffix):
    source = ddad.open_split(real_data / "ddad_val_clip" / "ddad.json", "val")
    plans = [source.describe(i) for i in range(2)]
    exported = folder.open_folder(**rendered.folder_of(plans, tmp_path / "rig", suffix))
    for i, plan in enumerate(plans):
        same_labels(build_sample(exported.describe(i), RULE), build_sample(plan, RULE))


def test_static_rig_by_name_without_poses(rig, tmp_path):
    """No poses: the LiDAR goes through the static extrinsics; images and sweeps pair by file name."""
    paths, _ = rig
    for camera in sorted(paths["images"].iterdir()):
        for i, path in enumerate(sorted(camera.iterdir(), key=lambda p: int(p.stem))):
            path.rename(path.with_name(f"frame_{i}{path.suffix}"))
    for i, path in enumerate(sorted(paths["lidar"].iterdir())):
        path.rename(path.with_name(f"frame_{i}{path.suffix}"))
    lidar = np.eye(4)
    lidar[2, 3] = 0.25
    edit(paths["rig_path"], lambda c: c.update(match="name", lidar={"sensor_to_ego": lidar.tolist()}))
    source = folder.open_folder(paths["rig_path"], paths["images"], paths["lidar"])
    plan = source.describe(1)
    assert plan.timestamp_us == 0 and plan.sample_id.endswith("/frame_1")
    np.testing.assert_array_equal(plan.sweep.sensor_to_global, lidar)
    np.testing.assert_array_equal(plan.cameras[0].ego_to_global, np.eye(4))
    assert sum(map(len, build_sample(plan, RULE).points)) > 100
    with pytest.raises(ConfigError, match="--sweeps needs --poses"):
        folder.open_folder(paths["rig_path"], paths["images"], paths["lidar"], sweeps=1)
    next(iter(sorted((paths["images"] / "CAMERA_05").iterdir()))).unlink()
    with pytest.raises(DataError, match=r"no image frame_0\.\* of camera CAMERA_05"):
        folder.open_folder(paths["rig_path"], paths["images"], paths["lidar"]).describe(0)


def test_timestamps_from_a_table(rig):
    paths, _ = rig
    files = sorted((paths["images"] / "CAMERA_01").iterdir(), key=lambda p: int(p.stem))
    rows = []
    for i, path in enumerate(files):
        rows.append(f"img_{2 - i}{path.suffix},{int(path.stem) / 1e6:.6f}")  # names in the opposite order of times
        path.rename(path.with_name(f"img_{2 - i}{path.suffix}"))
    table = paths["images"] / "CAMERA_01" / "timestamps.csv"
    table.write_text("file,timestamp\n" + "\n".join(rows))
    found = folder.list_recording(table.parent, (".png",), "s")
    assert [p.stem for p in found.paths] == ["img_2", "img_1", "img_0"] and np.all(np.diff(found.times_us) == 100_000)
    table.write_text("file,timestamp\n" + rows[0])
    with pytest.raises(DataError, match=r"timestamps\.csv: no row for img_0\.png \(2 files"):
        folder.list_recording(table.parent, (".png",), "s")
    table.write_text("name,time\na,b")
    with pytest.raises(DataError, match="expected a header"):
        folder.list_recording(table.parent, (".png",), "s")


def test_nanosecond_names_stay_exact(tmp_path):
    (tmp_path / "1556704800027900123.png").touch()
    assert folder.list_recording(tmp_path, (".png",), "ns").times_us.tolist() == [1556704800027900]


def test_far_images_are_refused(rig):
    paths, _ = rig
    edit(paths["rig_path"], lambda c: c.update(tolerance_ms=30))
    with pytest.raises(DataError, match=r"CAMERA_01 is 35\.0 ms away, tolerance_ms is 30"):
        folder.open_folder(**paths).describe(0)


def test_poses_between_rows():
    """Constant turn and even motion between two rows, in closed form."""
    half = np.sqrt(0.5)
    rows = [
        {"timestamp_us": 0, "x": 0, "y": 0, "z": 0, "qw": 1, "qx": 0, "qy": 0, "qz": 0},
        {
            "timestamp_us": 1000,
            "x": 4,
            "y": 2,
            "z": 0,
            "qw": -half,
            "qx": 0,
            "qy": 0,
            "qz": -half,
        },  # 90 degrees, other sign
        {"timestamp_us": 0, "x": 9, "y": 9, "z": 9, "qw": 1, "qx": 0, "qy": 0, "qz": 0, "sensor": "lidar"},
    ]
    poses = poses_module.Poses(rows, "poses")
    angle = np.deg2rad(22.5)
    expected = [
        [np.cos(angle), -np.sin(angle), 0, 1],
        [np.sin(angle), np.cos(angle), 0, 0.5],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]
    np.testing.assert_allclose(poses.at("front", 250), expected, atol=1e-12)
    assert poses.at("lidar", 0)[0, 3] == 9
    with pytest.raises(DataError, match="no pose at 1001 us for 'front'; rows reach from 0 to 1000"):
        poses.at("front", 1001)


def test_json_poses_and_broken_poses(rig, tmp_path):
    paths, expected = rig
    rows = list(csv.DictReader(paths["poses"].read_text().splitlines()))
    target = tmp_path / "poses.json"
    target.write_text(json.dumps(rows))
    same_labels(build_sample(folder.open_folder(**{**paths, "poses": target}).describe(0), RULE), expected[0])
    target.write_text(json.dumps([{**rows[0], "qw": "x"}]))
    with pytest.raises(DataError, match=r"poses\.json, row 1"):
        folder.open_folder(**{**paths, "poses": target})
    target.write_text("[{")
    with pytest.raises(DataError, match=r"poses\.json: broken file"):
        folder.open_folder(**{**paths, "poses": target})


def test_quaternion_and_matrix_agree(tmp_path):
    q = [0.5, -0.5, 0.5, -0.5]
    a = rig_yaml._transform({"quaternion": q, "translation": [1, 2, 3]}, "x")
    np.testing.assert_allclose(
        a[:3, :3], [[0, 0, 1], [-1, 0, 0], [0, -1, 0]], atol=1e-12
    )  # a camera that looks forward
    np.testing.assert_allclose(rig_yaml._transform(a[:3].tolist(), "x"), a)
    assert geometry.optical_yaw(a) == 0


def cam(content):
    return content["cameras"]["CAMERA_05"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(camras={}), "unknown key 'camras'; did you mean 'cameras'"),
        (lambda c: c.pop("cameras"), "missing cameras"),
        (lambda c: cam(c).update(intrinsic=1), "camera CAMERA_05: unknown key 'intrinsic'; did you mean 'intrinsics'"),
        (lambda c: cam(c).update(distortion=[0, 0.1]), r"CAMERA_05: lens distortion \[0, 0\.1\].*cv2\.undistort"),
        (lambda c: cam(c).update(intrinsics=np.zeros((3, 3)).tolist()), "CAMERA_05, intrinsics: singular"),
        (lambda c: cam(c).update(cam_to_ego=np.diag([2.0, 2, 2, 1]).tolist()), "CAMERA_05, cam_to_ego: not a rigid"),
        (lambda c: cam(c).update(cam_to_ego=np.diag([-1.0, 1, 1, 1]).tolist()), "CAMERA_05, cam_to_ego: not a rigid"),
        (lambda c: cam(c).update(image_size="big"), r"image_size = big; expected \[height, width\]"),
        (lambda c: c.update(point_rule="trunc"), "point_rule = 'trunc'; did you mean 'truncate'"),
        (lambda c: c.update(max_depth="far"), "wrong type"),
        (lambda c: c.update(min_depth=80, max_depth=80), r"min_depth = 80, max_depth = 80; expected 0 <= min_depth <"),
        (lambda c: c.update(bin_columns=2), "unknown key 'bin_columns'"),
        (lambda c: c.update(lidar={"bin_columns": 2}), "bin_columns must be 3 or more"),
        (lambda c: cam(c)["intrinsics"][0].__setitem__(2, 500.0), r"principal point \(500, .*another resolution\?"),
        (lambda c: cam(c)["intrinsics"][1].__setitem__(2, -1.0), "principal point .*another resolution"),
        (lambda c: cam(c).update(intrinsics=[[1, 2], [3]]), "CAMERA_05, intrinsics: expected a matrix of numbers"),
        (
            lambda c: cam(c).update(cam_to_ego={"quaternion": [1, 0, 0, 0], "translation": 5}),
            "CAMERA_05, cam_to_ego: a translation needs three finite numbers .*got 5",
        ),
        (
            lambda c: cam(c).update(cam_to_ego={"quaternion": [1, 0, 0], "translation": [1, 2, 3]}),
            "CAMERA_05, cam_to_ego: a rotation quaternion needs four",
        ),
        (lambda c: cam(c).update(distortion={"k1": -0.1}), r"CAMERA_05: lens distortion .*k1.*cv2\.undistort"),
        (lambda c: cam(c).update(distortion="none"), r"CAMERA_05: lens distortion none.*cv2\.undistort"),
    ],
)  # fmt: skip
def test_wrong_rig_files_are_named(rig, change, message):
    paths, _ = rig
    edit(paths["rig_path"], change)
    with pytest.raises((ConfigError, DataError), match=f"(?s)rig\\.yaml.*{message}"):
        folder.open_folder(**paths)


def test_missing_folders_are_named(rig, tmp_path):
    paths, _ = rig
    with pytest.raises(ConfigError, match="no such folder"):
        folder.open_folder(**{**paths, "lidar": tmp_path / "nowhere"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file with one of"):
        folder.open_folder(**{**paths, "lidar": tmp_path / "empty"})
    paths["rig_path"].write_text("a: [")
    with pytest.raises(ConfigError, match="broken YAML"):
        folder.open_folder(**paths)


def test_a_corrected_calibration_is_another_conversion(rig):
    paths, _ = rig
    before = folder.open_folder(**paths).options
    edit(paths["rig_path"], lambda c: cam(c)["intrinsics"][0].__setitem__(0, 50.0))
    assert folder.open_folder(**paths).options != before


def test_the_documented_example_works(tmp_path):
    """rig.yaml and poses.csv of docs/custom_data.md, as they stand there."""
    text = (Path(__file__).parents[1] / "docs" / "custom_data.md").read_text()
    blocks = {b.split("\n", 1)[0]: b.split("\n", 1)[1] for b in re.findall(r"```(?:yaml)?\n(# .*?)```", text, re.S)}
    (tmp_path / "rig.yaml").write_text(blocks["# rig.yaml"])
    poses = next(b for head, b in blocks.items() if head.startswith("# poses.csv"))
    (tmp_path / "poses.csv").write_text(poses)
    rig = rig_yaml.read_rig(tmp_path / "rig.yaml")
    yaws = {n: round(float(np.rad2deg(geometry.optical_yaw(c.cam_to_ego)))) for n, c in rig.cameras.items()}
    assert yaws == {"front": 0, "left": 90, "right": -90} and rig.cameras["right"].folder == "right_camera"
    middle = poses_module.read_poses(tmp_path / "poses.csv").at("front", 1556704800050000)
    np.testing.assert_allclose(middle[:3, 3], [0.9, 0, 0], atol=1e-9)


def test_keys_that_are_there_twice_are_refused(rig):
    paths, _ = rig
    text = paths["rig_path"].read_text()
    paths["rig_path"].write_text(text + "\nmax_depth: 80\n")
    with pytest.raises(ConfigError, match=r"(?s)broken YAML.*'max_depth' is there twice"):
        folder.open_folder(**paths)
    paths["rig_path"].write_bytes(text.encode() + b"\n# caf\xe9\n")
    with pytest.raises(DataError, match=r"rig\.yaml: not UTF-8"):
        folder.open_folder(**paths)


def test_gaps_between_poses_are_not_bridged():
    row = {"x": 0, "y": 0, "z": 0, "qw": 1, "qx": 0, "qy": 0, "qz": 0}
    poses = poses_module.Poses([{**row, "timestamp_us": t} for t in (0, 1_000_000, 2_000_001)], "poses.csv")
    assert poses.at("front", 999_999).shape == poses.at("front", 2_000_001).shape == (4, 4)
    with pytest.raises(DataError, match=r"poses\.csv: no pose near 1500000 us .* 1\.0 s apart, at most 1 s"):
        poses.at("front", 1_500_000)


def test_dotfiles_and_doubled_names(tmp_path):
    for name in ("1.png", "2.png", "._1.png", ".hidden.jpg"):
        (tmp_path / name).touch()
    assert [p.name for p in folder.list_recording(tmp_path, (".png", ".jpg"), "us").paths] == ["1.png", "2.png"]
    (tmp_path / "2.jpg").touch()
    with pytest.raises(DataError, match=r"2\.jpg and 2\.png have the same name"):
        folder.list_recording(tmp_path, (".png", ".jpg"), "us")


def test_a_drive_is_never_an_official_split(rig, tmp_path, capsys):
    paths, _ = rig
    assert not folder.open_folder(**paths).complete
    flags = {"--rig": "rig_path", "--images": "images", "--lidar": "lidar", "--poses": "poses"}
    argv = [x for flag, key in flags.items() for x in (flag, str(paths[key]))] + ["--workers", "1"]
    folder.main([*argv, "--out", str(tmp_path / "all")])
    assert "3 samples (all samples of this drive)" in capsys.readouterr().out
    assert not load_manifest(tmp_path / "all").complete_split
    folder.main([*argv, "--out", str(tmp_path / "two"), "--limit", "2"])
    assert "2 samples (a subset)" in capsys.readouterr().out
    verify.main([str(tmp_path / "all")])
    assert "split train: all samples of this drive, n = 3" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        folder.main([*argv, "--out", str(tmp_path / "x"), "--split", "my/val"])
    assert "--split=my/val: expected letters, digits" in capsys.readouterr().err
