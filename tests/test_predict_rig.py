"""A trained student as a user predicts with it: the function, every kind of input and file, and what goes wrong."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

import fsmde_jax
from data_prep import ddad, dgp, nuscenes
from fsmde_jax import checkpoint, confidence, export, geometry, predict, predict_rig, rig_frames
from fsmde_jax.data import transforms
from fsmde_jax.data.records import open_records
from fsmde_jax.depth_model import Prediction
from fsmde_jax.errors import ConfigError, DataError, FsmdeError
from fsmde_jax.viz import birdseye, pointcloud
from tests import rendered, rooms
from tests.sample_factory import write_folder

SIZE = (32, 64)


@pytest.fixture(scope="module")
def model():
    return fsmde_jax.load_model("lite0", image_size=SIZE)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    samples = [rooms.make(seed, cameras=3, native_size=(48, 96), masks=True) for seed in range(2)]
    return write_folder(tmp_path_factory.mktemp("records") / "rooms", samples)


@pytest.fixture(scope="module")
def rig(records, tmp_path_factory):
    """The same frames as a rig file, folders of images, and videos."""
    folder, sample = tmp_path_factory.mktemp("rig"), open_records(records)[0]
    cameras = {}
    for i, name in enumerate(sample.camera_names):
        k = sample.native_intrinsics[i]
        cameras[name] = {
            "image_size": [48, 96], "intrinsics": k.tolist(), "cam_to_ego": sample.cam_to_ego[i].tolist(),
        }  # fmt: skip
        (folder / "images" / name).mkdir(parents=True)
        (folder / "videos").mkdir(exist_ok=True)
        video = cv2.VideoWriter(str(folder / "videos" / f"{name}.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 48))
        for frame in range(3):
            image = transforms.decode_image(open_records(records)[frame % 2].images[i], (48, 96), "")
            cv2.imwrite(str(folder / "images" / name / f"{frame:04d}.png"), image[..., ::-1])
            video.write(np.ascontiguousarray(image[..., ::-1]))
        video.release()
    (folder / "rig.yaml").write_text(yaml.safe_dump({"cameras": cameras, "match": "name"}))
    return folder


def rig_of(records, index=0):
    frame = list(rig_frames.open_source(Path(records)).frames())[index]
    return frame.images, frame.intrinsics, frame.cam_to_ego


def test_prediction_is_that_of_evaluation_at_the_images_own_size(model, records):
    """The same pixels as the input pipeline makes; resized back bilinearly."""
    images, intrinsics, poses = rig_of(records)
    found = model(images, intrinsics, poses)
    assert found.depth.shape == found.confidence.shape == (3, 48, 96) and found.depth.dtype == np.float32
    batch = transforms.empty_batch(1, 3, SIZE)
    transforms.load_rig(open_records(records)[0], {k: v[0] for k, v in batch.items() if k != "record_index"}, where="")
    own = model.batch(images, intrinsics, poses)
    np.testing.assert_array_equal(own["images"], batch["images"])
    np.testing.assert_allclose(own["intrinsics"], batch["intrinsics"], rtol=1e-6)
    small = model._run(model._params, model._stats, {k: batch[k] for k in own})
    resized = cv2.resize(np.asarray(small["depth"][0, 1]), (96, 48), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(found.depth[1], resized, rtol=1e-5)
    assert found.confidence.min() >= 0 and found.confidence.max() <= 1


def test_the_scale_follows_the_focal_length(model, records):
    """MY camera: twice fx (within the range it was trained for) is twice the depth."""
    images, intrinsics, _ = rig_of(records)
    longer = intrinsics.copy()
    longer[:, 0, 0] *= 2
    one, two = model(images, intrinsics), model(images, longer)
    np.testing.assert_allclose(two.depth, 2 * one.depth, rtol=1e-4)
    np.testing.assert_allclose(two.confidence, one.confidence, atol=1e-4)


def test_one_camera_many_and_images_of_different_sizes(model, records):
    images, intrinsics, _ = rig_of(records)
    alone = model(images[:1], intrinsics[:1])
    together = model(images, intrinsics)
    np.testing.assert_allclose(alone.depth[0], together.depth[0], rtol=1e-4)
    other = [images[0], cv2.resize(images[1], (192, 96), interpolation=cv2.INTER_LINEAR)]
    scaled = np.stack([intrinsics[0], geometry.resize_intrinsics(intrinsics[1], np.float64(2), np.float64(2))])
    mixed = model(other, scaled)
    assert [each.shape for each in mixed.depth] == [(48, 96), (96, 192)]
    np.testing.assert_allclose(mixed.depth[0], together.depth[0], rtol=1e-4)


def test_confidence_is_the_probability_of_being_within_a_quarter():
    centers = np.exp(np.linspace(np.log(1), np.log(100), 65)).astype(np.float32)
    log_depth = np.log(10.0)
    p = np.exp(-0.5 * ((np.log(centers) - log_depth) / 0.2) ** 2)
    found = confidence.within(np.float32(10.0), (p / p.sum()).astype(np.float32), centers)
    from scipy.stats import norm

    assert float(found) == pytest.approx(norm.cdf(np.log(1.25) / 0.2) - norm.cdf(-np.log(1.25) / 0.2), abs=5e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, k, p: ([x.astype(np.float32) for x in i], k, p), r"image 0: expected \[H, W, 3\] uint8"),
        (lambda i, k, p: (i, k[:2], p), r"intrinsics \[N, 3, 3\] for N = 3 images"),
        (lambda i, k, p: (i, k, p[:2]), r"cam_to_ego \[N, 4, 4\] for N = 3 images"),
        (lambda i, k, p: (i, 0 * k, p), r"image 0, intrinsics"),
        (lambda i, k, p: ([], k[:0], None), r"N = 0 images"),
    ],
)
def test_wrong_input_is_named(model, records, change, message):
    with pytest.raises(DataError, match=message):
        model(*change(*rig_of(records)))


def test_wrong_models_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing: no student here; expected lite0"):
        fsmde_jax.load_model("nothing")
    with pytest.raises(ConfigError, match=r"image_size = \(30, 64\): .*multiples of 32"):
        fsmde_jax.load_model("lite0", image_size=(30, 64))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fsmde_jax.nothing


def test_folders_that_are_no_run_are_called_what_they_are(tmp_path):
    """Whatever opens students: no advice of a job that was not called."""
    export.export_orbax("lite0", tmp_path / "exported")
    checkpoint.write_tree(tmp_path / "teacher", {"params": {"a": np.zeros(2)}}, {"variant": "vits", "version": 2})
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "identity.json").write_text("{}")
    (tmp_path / "pictures").mkdir()
    wanted = "expected lite0, a .safetensors file of fsmde_jax.convert, or the folder of a run"
    for name, said in {
        "exported": f"an export of fsmde_jax.export, for other tools; it cannot be read as a student; {wanted}",
        "teacher": f"a teacher's folder of fsmde_jax.convert; it cannot be read as a student; {wanted}",
        "begun": "a run that has no checkpoint yet; let it train on",
        "pictures": f"not the folder of a run (no checkpoint in checkpoints/ or best/); {wanted}",
    }.items():
        for read in (fsmde_jax.load_model, lambda where: export.export_onnx(where, tmp_path / "a.onnx")):
            with pytest.raises(FsmdeError) as error:
                read(str(tmp_path / name))
            assert str(error.value) == f"{tmp_path / name}: {said}"


def test_importing_the_package_loads_no_jax():
    script = "import sys, fsmde_jax; assert 'jax' not in sys.modules; fsmde_jax.load_model; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_fused_cloud_lies_on_the_walls_and_shows_each_surface_once():
    """Exact depth of a room: every point is on its surface; what two cameras see is there once."""
    sample = rooms.make(3, cameras=6, native_size=(60, 120))
    depth = [rooms.plane(sample, i).astype(np.float32) for i in range(6)]
    images = [np.full((60, 120, 3), 40 * i, np.uint8) for i in range(6)]
    sure = [np.full((60, 120), 0.5 + 0.05 * i, np.float32) for i in range(6)]
    k, poses = sample.intrinsics.astype(np.float64), sample.cam_to_ego.astype(np.float64)
    cloud = pointcloud.fuse(images, depth, sure, k, poses)
    on_wall = np.min(np.abs(np.concatenate([cloud.points - rooms.LOW, cloud.points - rooms.HIGH], 1)), 1)
    assert on_wall.max() < 1e-3
    assert 0.5 * 6 * 60 * 120 < len(cloud.points) < 0.95 * 6 * 60 * 120  # cameras overlap
    # A point of a less sure camera is gone exactly where a surer one sees it.
    for i in range(6):
        own = cloud.points[cloud.camera == i].astype(np.float64)
        for j in range(i + 1, 6):
            uv, z = geometry.project(k[j], geometry.transform_points(geometry.invert_rigid(poses[j]), own))
            seen = (z > 0) & (uv[:, 0] > 0) & (uv[:, 0] < 119) & (uv[:, 1] > 0) & (uv[:, 1] < 59)
            assert not seen.any(), (i, j)
    assert (cloud.colours[cloud.camera == 2] == 80).all()
    surest = pointcloud.fuse(images[5:], depth[5:], sure[5:], k[5:], poses[5:])
    assert (cloud.camera == 5).sum() == len(surest.points) == 60 * 120  # of the surest camera nothing is gone


def test_the_surest_share():
    sure = [np.arange(60, dtype=np.float32).reshape(6, 10), np.arange(60, 100, dtype=np.float32)]
    limit = pointcloud.surest(sure, 0.25)
    assert sum((each >= limit).sum() for each in sure) == 25
    assert pointcloud.surest(sure, 1.0) == 0
    shown = [np.zeros((6, 10), bool), np.ones(40, bool)]  # only the pixels of 60 to 99 can be
    limit = pointcloud.surest(sure, 0.25, shown)
    assert sum((each >= limit)[visible].sum() for each, visible in zip(sure, shown, strict=True)) == 10
    assert pointcloud.surest(sure[:1], 0.25, shown[:1]) == 0  # none can


def test_the_cars_own_body_does_not_count_among_the_surest():
    """Half of a picture is the car, and surer than the rest: of the rest 90 % are shown all the same."""
    half = (24, 96)
    visible = np.concatenate([np.ones(half, bool), np.zeros(half, bool)])
    sure = np.concatenate([np.linspace(0.1, 0.5, 24 * 96).reshape(half), np.full(half, 0.9)])
    image, k = np.zeros((48, 96, 3), np.uint8), np.array([[60.0, 0, 47.5], [0, 60, 23.5], [0, 0, 1]])
    frame = rig_frames.RigFrame("0", ["a"], [image], k[None], np.eye(4)[None], [visible])
    cloud = predict_rig.fuse_frame(frame, Prediction([np.full((48, 96), 5.0)], [sure]))
    assert len(cloud.points) == pytest.approx(0.9 * 24 * 96, abs=1)


def test_what_a_cloud_leaves_out():
    sample = rooms.make(0, cameras=3, native_size=(48, 96))
    depth = [rooms.plane(sample, i).astype(np.float32) for i in range(3)]
    depth[0][:10], depth[0][10:12] = 0, np.nan
    images = [np.zeros((48, 96, 3), np.uint8)] * 3
    sure = [np.full((48, 96), 0.5, np.float32)] * 3
    sure[1] = np.zeros_like(sure[1])
    visible = [np.ones((48, 96), bool)] * 3
    visible[2] = np.zeros_like(visible[2])
    given = (images, depth, sure, sample.intrinsics.astype(np.float64), sample.cam_to_ego.astype(np.float64))
    cloud = pointcloud.fuse(*given, visible=visible, min_confidence=0.2, max_range=12.0)
    assert set(cloud.camera) == {0} and np.isfinite(cloud.points).all()
    assert len(cloud.points) == ((depth[0] > 0) & (depth[0] < 12)).sum()
    assert len(pointcloud.fuse(*given, stride=4).points) < len(pointcloud.fuse(*given).points) / 12


@pytest.mark.parametrize("stride", [1, 3])
def test_a_surer_camera_that_shows_nothing_takes_nothing_away(stride):
    """Beside a camera that is wholly hidden by the car the cloud is that of the others alone."""
    sample = rooms.make(3, cameras=6, native_size=(60, 120))
    depth = [rooms.plane(sample, i).astype(np.float32) for i in range(6)]
    images = [np.zeros((60, 120, 3), np.uint8)] * 6
    sure = [np.full((60, 120), 0.5, np.float32)] * 5 + [np.full((60, 120), 0.9, np.float32)]
    k, poses = sample.intrinsics.astype(np.float64), sample.cam_to_ego.astype(np.float64)
    alone = pointcloud.fuse(images[:5], depth[:5], sure[:5], k[:5], poses[:5], stride=stride)
    shown = [np.ones((60, 120), bool)] * 5 + [np.zeros((60, 120), bool)]
    cloud = pointcloud.fuse(images, depth, sure, k, poses, visible=shown, stride=stride)
    np.testing.assert_array_equal(cloud.points, alone.points)
    both = pointcloud.fuse(images, depth, sure, k, poses, stride=stride)
    assert (both.camera < 5).sum() < 0.95 * len(alone.points)  # of a camera that shows its surfaces it does


def test_a_surface_that_only_one_camera_has_within_range_stays():
    """A circle of 62 m and a limit of 56 m of z-depth: a camera has what is more than 25.4 degrees off its axis."""
    turns, width = np.radians([0.0, 50.0]), 201
    k = np.array([[100 / np.tan(np.radians(40)), 0, 100], [0, 100, 0], [0, 0, 1.0]])
    columns = (np.arange(width) - 100) / k[0, 0]
    depth = [(62 / np.sqrt(1 + columns**2)).astype(np.float32)[None]] * 2
    poses = np.tile(np.eye(4), (2, 1, 1))
    for pose, turn in zip(poses, turns, strict=True):
        c, s = np.cos(turn), np.sin(turn)
        pose[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    sure = [np.full((1, width), share, np.float32) for share in (0.5, 0.9)]
    images = [np.zeros((1, width, 3), np.uint8)] * 2
    cloud = pointcloud.fuse(images, depth, sure, np.stack([k, k]), poses, max_range=56.0)
    angles = np.degrees(np.arctan2(cloud.points[:, 1], cloud.points[:, 0]))
    filled = set(np.floor(angles).astype(int))
    # Both see 10 to 40 degrees: the second camera has 10 to 24.6 of them, the first one 25.4 to 40.
    wanted = {*range(-40, -26), *range(10, 24), *range(26, 40), *range(76, 90)}
    assert wanted <= filled and not filled & {*range(-25, 9), *range(41, 75)}


def test_a_ply_file_holds_the_cloud(tmp_path):
    rng = np.random.default_rng(0)
    cloud = pointcloud.Cloud(
        rng.normal(size=(7, 3)).astype(np.float32), rng.integers(0, 256, (7, 3)).astype(np.uint8), np.zeros(7, np.int32)
    )
    pointcloud.write_ply(tmp_path / "cloud.ply", cloud)
    content = (tmp_path / "cloud.ply").read_bytes()
    head, body = content.split(b"end_header\n")
    assert head.startswith(b"ply\nformat binary_little_endian 1.0\n") and b"element vertex 7\n" in head
    rows = np.frombuffer(body, np.dtype("<f4,<f4,<f4,u1,u1,u1"))
    np.testing.assert_array_equal([[r[0], r[1], r[2]] for r in rows], cloud.points)
    np.testing.assert_array_equal([[r[3], r[4], r[5]] for r in rows], cloud.colours)


def test_birdseye_puts_things_where_they_are():
    points = np.array([[25.0, 0, 0], [0, 35.0, 1], [0, -35.0, 9], [5, 5, -9]], np.float32)
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8)
    picture = birdseye.birdseye(pointcloud.Cloud(points, colours, np.zeros(4, int)), np.array([[-25.0, 0, 0]]))
    assert picture.shape == (800, 800, 3)
    assert tuple(picture[150, 400]) == (255, 0, 0)  # ahead is up
    assert tuple(picture[400, 50]) == (0, 255, 0)  # left is left
    assert tuple(picture[650, 400]) == (255, 255, 255)  # LiDAR behind
    assert not (picture == (0, 0, 255)).all(-1).any()  # too high


def run(*arguments):
    predict.main([str(a) for a in arguments])


@pytest.mark.parametrize("kind", ["records", "images", "videos"])
def test_every_input_gives_every_file(model, records, rig, tmp_path, kind, capsys):
    where = records if kind == "records" else rig / kind
    flags = [] if kind == "records" else ["--rig", rig / "rig.yaml"]
    run("--checkpoint", "lite0", "--input", where, *flags, "--out", tmp_path / "out", "--image_size", "32x64",
        "--limit", 2, "--keep", 1)  # fmt: skip
    frames = sorted((tmp_path / "out").iterdir())
    names = {"records": ["sample-0", "sample-1"], "images": ["0000", "0001"], "videos": ["000000", "000001"]}[kind]
    assert [frame.name for frame in frames] == names
    images, intrinsics, poses = rig_of(records)
    wanted = model(images, intrinsics, poses)
    found = np.load(frames[0] / "rig.npz")
    cameras = list(found["cameras"])
    assert cameras == open_records(records)[0].camera_names
    tolerance = 0.3 if kind == "videos" else 1e-4  # a video's images are compressed
    np.testing.assert_allclose(found["depth"], wanted.depth, rtol=tolerance)
    np.testing.assert_allclose(found["intrinsics"], intrinsics, rtol=1e-6)
    png = cv2.imread(str(frames[0] / f"{cameras[0]}_depth.png"), cv2.IMREAD_UNCHANGED)
    assert png.dtype == np.uint16
    np.testing.assert_allclose(png / 256, found["depth"][0], atol=1 / 256)
    for name in ("panorama.png", "birdseye.png", *(f"{camera}_depth_color.png" for camera in cameras)):
        assert cv2.imread(str(frames[1] / name)).std() > 5
    assert (frames[1] / "cloud.ply").stat().st_size > 10_000
    assert not list((tmp_path / "out").rglob("*.tmp-*"))
    assert "2 frames in" in capsys.readouterr().out


def test_only_what_is_asked_for_is_written(records, tmp_path):
    run("--checkpoint", "lite0", "--input", records, "--out", tmp_path / "out", "--image_size", "32x64", "--limit", 1,
        "--write", "npz")  # fmt: skip
    assert [p.name for p in (tmp_path / "out" / "sample-0").iterdir()] == ["rig.npz"]


def test_a_focal_length_that_the_student_does_not_know_is_said(records, rig, tmp_path, capsys):
    content = yaml.safe_load((rig / "rig.yaml").read_text())
    name = next(iter(content["cameras"]))
    content["cameras"][name]["intrinsics"][0][0] *= 6
    (tmp_path / "rig.yaml").write_text(yaml.safe_dump(content))
    run("--checkpoint", "lite0", "--input", rig / "images", "--rig", tmp_path / "rig.yaml", "--out", tmp_path / "out",
        "--image_size", "32x64", "--limit", 1, "--write", "png")  # fmt: skip
    assert f"warning: camera {name}: focal length" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "lite0"], "--checkpoint and --input belong together"),
        (["--checkpoint", "lite0", "--input", "{rig}/images"], "name the rig file, too (docs/custom_data.md; predict"),
        (["--checkpoint", "lite0", "--input", "nowhere"], "error: nowhere: no such folder"),
        (["--checkpoint", "lite0", "--input", "{records}", "--rig", "x.yaml"], "leave out the rig file x.yaml"),
        (["--checkpoint", "lite0", "--input", "{records}", "--image_size", "big"], "--image_size big: expected HEI"),
        (["--checkpoint", "lite0", "--input", "{records}", "--limit", "-1"], "--limit -1: expected at least 0"),
        ([], "give --checkpoint and --input for a rig, or --teacher and --images"),
        (["--checkpoint", "lite0", "--input", "{records}", "--teacher", "tiny"], "not with --teacher"),
        (["--checkpoint", "lite0", "--input", "{records}", "--size", "28"], "--size: of --teacher only, not of --che"),
        (["--checkpoint", "lite0", "--input", "{records}", "--npy"], "--npy: of --teacher only, not of --checkpoint"),
        (["--checkpoint", "lite0", "--input", "{records}", "--variant", "small"], "--variant: of --teacher only"),
        (["--checkpoint", "lite0", "--input", "{records}", "--version", "1"], "--version: of --teacher only"),
        (["--checkpoint", "lite0", "--input", "{records}", "--max_depth", "9"], "--max_depth: of --teacher only"),
        (["--teacher", "tiny", "--images", "{rig}/images", "--rig", "r.yaml"], "--rig: of --checkpoint only, not of"),
        (["--teacher", "tiny", "--images", "{rig}/images", "--write", "npz"], "--write: of --checkpoint only"),
        (["--teacher", "tiny", "--images", "{rig}/images", "--rerun", "a.rrd"], "--rerun: of --checkpoint only"),
        (["--teacher", "tiny", "--images", "{rig}/images", "--sample", "x"], "--sample: of --checkpoint only"),
        (["--teacher", "tiny", "--images", "{rig}/images", "--image_size", "32x64"], "--image_size: of --checkpoint"),
        (["--teacher", "tiny", "--images", "{rig}/images", "--keep", "1"], "--keep: of --checkpoint only"),
        (["--teacher", "tiny", "--images", "{rig}/images", "--max_range", "9"], "--max_range: of --checkpoint only"),
        (["--teacher", "tiny", "--images", "{rig}/images", "--stride", "2"], "--stride: of --checkpoint only"),
        (["--teacher", "tiny", "--images", "{rig}/images", "--masks", "m"], "--masks: of --checkpoint only"),
        (["--teacher", "tiny", "--images", "{rig}/images", "--mask_set", "0"], "--mask_set: of --checkpoint only"),
        (
            ["--checkpoint", "lite0", "--input", "{records}", "--masks", "m"],
            "masks (m) are of DDAD's index (ddad.json) only",
        ),
        (["--checkpoint", "lite0", "--input", "{records}", "--stride", "0"], "--stride at least 1"),
        (["--teacher", "tiny", "--images", "{rig}/images", "--limit", "-1"], "--limit -1: expected at least 0"),
    ],
)
def test_wrong_flags_are_named(records, rig, tmp_path, flags, message, capsys):
    flags = [flag.format(records=records, rig=rig) for flag in flags]
    with pytest.raises(SystemExit):
        run(*flags, "--out", tmp_path / "out")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_first_images_of_a_folder_by_a_teacher(rig, tmp_path):
    run("--teacher", "tiny", "--images", rig / "images", "--out", tmp_path / "out", "--size", 28, "--limit", 2)
    camera = sorted(p.name for p in (rig / "images").iterdir())[0]
    found = [str(p.relative_to(tmp_path / "out")) for p in sorted((tmp_path / "out").rglob("*.png"))]
    assert found == [f"{camera}/0000_depth.png", f"{camera}/0001_depth.png"]


def test_images_that_do_not_fit_the_rig_file_are_named(rig, tmp_path):
    import shutil

    shutil.copytree(rig, tmp_path / "rig")
    place = tmp_path / "rig" / "images"
    name = sorted(p.name for p in place.iterdir())[0]
    cv2.imwrite(str(place / name / "0001.png"), np.zeros((40, 96, 3), np.uint8))
    source = rig_frames.open_source(place, str(tmp_path / "rig" / "rig.yaml"))
    with pytest.raises(DataError, match=rf"{name}/0001.png: 40x96 pixels, but .* says 48x96 for camera {name}"):
        list(source.frames())
    (tmp_path / "rig" / "videos" / f"{name}.avi").write_bytes(b"no video")
    with pytest.raises(DataError, match=rf"{name}.avi: not a video"):
        rig_frames.open_source(tmp_path / "rig" / "videos", str(tmp_path / "rig" / "rig.yaml"))


@pytest.mark.parametrize("kind", ["nuscenes", "ddad"])
def test_a_dataset_as_it_was_downloaded_gives_the_frames_of_its_records(kind, tmp_path):
    """At native size the converter stores the very images."""
    size = (72, 96)
    if kind == "nuscenes":
        rendered.nuscenes(tmp_path / "data", frames=(2, 2), size=size, cameras=rendered.RIG_OF_3)
        place, job = tmp_path / "data", nuscenes.main
        splits = ["mini_train", "mini_val"]
        flags = ["--dataroot", str(place), "--version", "v1.0-mini"]
    else:
        place = rendered.dgp(tmp_path / "data", size=size)
        splits, job, flags = (
            [name for name, files in dgp.scene_files(place).items() if files],
            ddad.main,
            ["--json", str(place)],
        )
    wanted = []
    for split in splits:
        out = tmp_path / split
        job([*flags, "--split", split, "--image_size", "native", "--workers", "1", "--out", str(out)])
        wanted += list(rig_frames.open_source(out).frames())
    source = rig_frames.open_source(place)
    found = list(source.frames())
    assert source.count == len(found) == len(wanted) >= 2
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.name, ours.scene, ours.cameras, ours.time_us) == (
            theirs.name, theirs.scene, theirs.cameras, theirs.time_us
        )  # fmt: skip
        for field in ("images", "intrinsics", "cam_to_ego", "ego_to_global", "lidar", "labels"):
            for a, b in zip(getattr(ours, field), getattr(theirs, field), strict=True):
                np.testing.assert_array_equal(a, b)
    name = wanted[-1].name
    for where in (place, tmp_path / splits[-1]):
        (only,) = rig_frames.open_source(where, sample=name).frames()
        np.testing.assert_array_equal(only.images[0], wanted[-1].images[0])
        with pytest.raises(DataError, match=rf"^{where}: none of the \d+ (samples|records) is called nobody"):
            rig_frames.open_source(where, sample="nobody")
    if kind == "nuscenes":
        run("--checkpoint", "lite0", "--input", place / "v1.0-mini", "--sample", name, "--out", tmp_path / "out",
            "--image_size", "32x64", "--write", "png")  # fmt: skip
        assert [p.name for p in (tmp_path / "out").iterdir()] == [name]
        (place / "v1.0-test").mkdir()
        (place / "v1.0-test" / "sample.json").write_text("[]")
        with pytest.raises(
            ConfigError, match=rf"^{place}: holds v1.0-mini and v1.0-test; name one of them, e.g. .*/v1.0-mini"
        ):
            rig_frames.open_source(place)


def test_a_sample_of_images_is_refused(rig):
    with pytest.raises(
        ConfigError, match="images: no sample x here: only those of records, nuScenes and DDAD have names"
    ):
        rig_frames.open_source(rig / "images", str(rig / "rig.yaml"), "x")
