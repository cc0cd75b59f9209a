"""Rendered dataroots as their readers see them: the official devkit, the DGP reader, the converters; and resuming."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest

from data_prep import ddad, nuscenes
from data_prep.plan import BuildOptions, build_sample
from data_prep.world import dataset, drive, rigs, scene
from data_prep.world.__main__ import look_of, parser
from data_prep.world.surfaces import Semantic
from fsmde_jax import geometry
from fsmde_jax.errors import ConfigError, DataError
from tests import stand_in_world

matplotlib.use("Agg")
SIZE = (60, 104)


def look(*flags: str) -> dataset.Look:
    arguments = ["--out", "unused", "--frames", "2", "--seed", "5", "--image_size", "60x104", *flags]
    return look_of(parser().parse_args(arguments))


@pytest.fixture(scope="module", autouse=True)
def world():
    with pytest.MonkeyPatch.context() as patch:
        stand_in_world.install(patch)
        yield
        dataset._renderer.cache_clear()


@pytest.fixture(scope="module")
def nuscenes_root(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world") / "nuscenes"
    dataset.write_dataset(look("--sweeps_between", "2", "--semantics"), out, {"train": 2, "val": 1}, 0)
    return out


@pytest.fixture(scope="module")
def dgp_root(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world") / "dgp"
    dataset.write_dataset(look("--rig", "ddad"), out, {"train": 1, "val": 1}, 0)
    return out


@pytest.fixture(scope="module")
def devkit(nuscenes_root):
    return nuscenes.load_devkit()[0]("v1.0-trainval", str(nuscenes_root), verbose=False)


def away_from_edges(depth: np.ndarray) -> np.ndarray:
    """[H, W] bool: all eight neighbours are about as far."""
    near, far = (f(depth, np.ones((3, 3))) for f in (cv2.erode, cv2.dilate))
    return (depth > 0) & (near > 0.9 * depth) & (far < 1.1 * depth)


def agreement(points: np.ndarray, depth: np.ndarray) -> tuple[float, int]:
    """Share of points (u, v, z) that agree with dense depth within 2 % away from edges, and how many there are."""
    u, v = np.rint(points[:, 0]).astype(int), np.rint(points[:, 1]).astype(int)
    inside = (u >= 0) & (v >= 0) & (u < depth.shape[1]) & (v < depth.shape[0])
    u, v, z = u[inside], v[inside], points[inside, 2]
    kept = away_from_edges(depth)[v, u]
    # A point lies anywhere in its pixel; on grazed ground the depth changes by more than 2 % from pixel to pixel.
    low = cv2.erode(depth, np.ones((3, 3)))[v, u][kept]
    high = cv2.dilate(depth, np.ones((3, 3)))[v, u][kept]
    good = (z[kept] > 0.98 * low) & (z[kept] < 1.02 * high)
    return float(good.mean()), int(kept.sum())


def test_the_devkit_reads_the_tables_and_says_that_they_are_rendered(devkit, nuscenes_root):
    splits = nuscenes.load_devkit()[1]()
    names = [s["name"] for s in devkit.scene]
    assert names == [*splits["train"][:2], splits["val"][0]]
    assert len({s["token"] for s in devkit.scene}) == 3
    assert devkit.log[0]["location"] == "rendered world" and "rendered world, seed 5" in devkit.scene[0]["description"]
    assert len(list((nuscenes_root / "v1.0-trainval").glob("*.json"))) == 13
    cameras = rigs.read_rig("nuscenes").cameras
    for row in devkit.scene:
        sample = devkit.get("sample", row["first_sample_token"])
        assert set(sample["data"]) == {*cameras, "LIDAR_TOP"} and row["nbr_samples"] == 2
        assert sample["next"] == row["last_sample_token"]
        following = devkit.get("sample", sample["next"])
        assert following["timestamp"] - sample["timestamp"] == 500_000
        key = devkit.get("sample_data", sample["data"]["LIDAR_TOP"])
        chain, times = key, [key["timestamp"]]
        while chain["next"]:
            chain = devkit.get("sample_data", chain["next"])
            times.append(chain["timestamp"])
        assert [t - times[0] for t in times] == [0, 200_000, 300_000, 500_000]  # two of the four revolutions between
        for name, camera in cameras.items():
            data = devkit.get("sample_data", sample["data"][name])
            assert data["timestamp"] - sample["timestamp"] == round(camera.delay * 1e6)
            image = cv2.imread(str(nuscenes_root / data["filename"]))
            assert image.shape[:2] == SIZE == (data["height"], data["width"])
    text = " ".join(p.read_text() for p in (nuscenes_root / "v1.0-trainval").glob("*.json"))
    assert str(nuscenes_root) not in text


def test_the_devkits_own_projection_agrees_with_dense_depth(devkit, nuscenes_root, tmp_path):
    shares, total = [], 0
    for row in devkit.sample:
        for channel, token in row["data"].items():
            if channel == "LIDAR_TOP":
                continue
            points, z, _ = devkit.explorer.map_pointcloud_to_image(row["data"]["LIDAR_TOP"], token)
            stem = Path(devkit.get("sample_data", token)["filename"]).stem
            path = nuscenes_root / "dense_depth" / channel / f"{stem}.png"
            depth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED).astype(np.float32) / 256
            share, count = agreement(np.column_stack([points[0], points[1], z]), depth)
            shares.append(share * count)
            total += count
    assert total > 20_000 and sum(shares) / total > 0.98
    devkit.render_pointcloud_in_image(devkit.sample[0]["token"], out_path=str(tmp_path / "points.png"), verbose=False)
    assert (tmp_path / "points.png").stat().st_size > 1000


def test_each_sensor_is_where_the_car_was_at_its_own_time(devkit):
    sample = devkit.sample[0]
    poses = {}
    for name in ("CAM_FRONT_LEFT", "LIDAR_TOP", "CAM_BACK_LEFT"):
        data = devkit.get("sample_data", sample["data"][name])
        row = devkit.get("ego_pose", data["ego_pose_token"])
        poses[name] = (data["timestamp"] * 1e-6, geometry.pose_matrix(row["rotation"], row["translation"]))
    (t0, early), (t1, late) = poses["CAM_FRONT_LEFT"], poses["LIDAR_TOP"]
    world = dataset._renderer(look("--sweeps_between", "2", "--semantics")).sample(scene.scene_key(5, "train", 0))
    moved = geometry.invert_rigid(early) @ late
    assert moved[0, 3] / (t1 - t0) == pytest.approx(float(world.road.speed) * 1.21, rel=0.05)  # 1 + 0.6 * 0.35 at t = 0
    assert np.linalg.norm(late[:2, 3]) > 100 and abs(moved[1, 3]) < 0.05


def test_semantic_images_lie_beside_the_dense_depth(nuscenes_root):
    found = sorted((nuscenes_root / "semantic").glob("*/*.png"))
    assert len(found) == 3 * 2 * 6
    for path in found[:6]:
        classes = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        depth = cv2.imread(str(path).replace("semantic", "dense_depth"), cv2.IMREAD_UNCHANGED)
        assert classes.dtype == np.uint8 and classes.shape == SIZE == depth.shape
        assert np.all(depth[classes == Semantic.SKY] == 0) and np.all(depth[classes == Semantic.BUILDING] > 0)


def test_converters_take_both_formats_and_know_that_they_are_rendered(nuscenes_root, dgp_root):
    masks = ddad.MaskSets(dgp_root / "masks")
    sources = {
        "nuscenes": nuscenes.open_split(nuscenes_root, "v1.0-trainval", "train"),
        "val": nuscenes.open_split(nuscenes_root, "v1.0-trainval", "val"),
        "dgp": ddad.open_split(dgp_root / "ddad.json", "val", masks=masks),
        "train": ddad.open_split(dgp_root / "ddad.json", "train", masks=masks),
    }
    assert not set(sources["nuscenes"].scenes) & set(sources["val"].scenes)
    assert not set(sources["dgp"].scenes) & set(sources["train"].scenes)
    for name, source in sources.items():
        assert source.dataset == "world" and "seed 5" in source.version and not source.complete
        sample = build_sample(source.describe(1), BuildOptions(None, 95, source.point_rule))
        kept, total = 0.0, 0
        for i in range(6):
            depth = cv2.imdecode(np.frombuffer(sample.dense_depth[i], np.uint8), cv2.IMREAD_UNCHANGED)
            depth = depth.astype(np.float32) / 256
            if sample.ego_masks[i]:
                seen = cv2.imdecode(np.frombuffer(sample.ego_masks[i], np.uint8), cv2.IMREAD_UNCHANGED) > 0
                depth = depth * seen
            else:
                assert sample.points[i][:, 2].min() > 1.5  # as in real keyframes, no image shows returns from the car
            share, count = agreement(sample.points[i], depth)
            kept, total = kept + share * count, total + count
        assert total > (5000 if name in ("nuscenes", "val") else 8000) and kept / total > 0.98, name


def test_masks_are_the_pixels_that_show_the_cars_own_body(dgp_root):
    one = drive.Drive(dataset._renderer(look("--rig", "ddad")), scene.scene_key(5, "train", 0))
    pictures, cloud = one.keyframe(0)
    table = json.loads((dgp_root / "masks" / "scene_to_set.json").read_text())
    assert table == {"000000": 0, "500000": 0}
    covered = {}
    for name, picture in pictures.items():
        mask = cv2.imread(str(dgp_root / "masks" / "0" / f"{name}_mask.png"), cv2.IMREAD_UNCHANGED)
        different = (mask == 0) != (picture.semantic == Semantic.EGO)
        assert different.sum() <= 4, name  # float32 at two places in the world: pixels on the very edge
        covered[name] = (mask == 0).mean()
    assert covered["CAMERA_01"] == 0 and all(0.03 < covered[f"CAMERA_0{i}"] < 0.4 for i in (5, 6, 7, 8, 9))
    near = np.linalg.norm(cloud.points, axis=1) < 1.0
    assert not near.any()  # no returns from the own body in this rig


@pytest.mark.slow
def test_cameras_of_different_sizes_get_their_own_pictures(tmp_path):
    """Cameras are rendered in groups of one size; each picture must still be that of its own camera."""
    rig = rigs.scaled(rigs.read_rig("nuscenes"), size=SIZE)
    wide = rigs.scaled(rigs.read_rig("nuscenes"), size=(48, 128))
    mixed = {name: (wide if i % 2 else rig).cameras[name] for i, name in enumerate(rig.cameras)}
    renderer = drive.Renderer(dataclasses.replace(rig, cameras=mixed))
    for step in ("sample", "_static_geometry", "_moving", "_sweep"):  # compiled already, and the same for both rigs
        setattr(renderer, step, getattr(dataset._renderer(look("--sweeps_between", "2", "--semantics")), step))
    one = drive.Drive(renderer, scene.scene_key(5, "train", 0))
    pictures, cloud = one.keyframe(1)
    lidar_to_global = cloud.ego_to_global @ rig.lidar.sensor_to_ego
    for name, camera in mixed.items():
        to_camera = geometry.invert_rigid(pictures[name].ego_to_global @ camera.cam_to_ego) @ lidar_to_global
        points = geometry.transform_points(to_camera, cloud.points.astype(np.float64))
        uv, z = geometry.project(camera.intrinsics, points[points[:, 2] > 1.0])
        assert pictures[name].depth.shape == camera.size
        share, count = agreement(np.column_stack([uv, z]), pictures[name].depth)
        assert count > 500 and share > 0.97, name


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_interrupted_runs_go_on_and_further_scenes_are_added_with_the_same_bytes(nuscenes_root, tmp_path, monkeypatch):
    wanted, out = files(nuscenes_root), tmp_path / "again"
    same = look("--sweeps_between", "2", "--semantics")
    real, calls = dataset.render_scene, []

    def stops(job):
        calls.append(job.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(job)

    monkeypatch.setattr(dataset, "render_scene", stops)
    with pytest.raises(KeyboardInterrupt):
        dataset.write_dataset(same, out, {"train": 2, "val": 1}, 0)
    assert not (out / "v1.0-trainval").exists()
    with pytest.raises(
        DataError, match=r"no such folder.* the same python -m data_prep\.world command again to finish"
    ):
        nuscenes.open_split(out, "v1.0-trainval", "train")
    with pytest.raises(
        ConfigError, match=r"no such file.* the same python -m data_prep\.world command again to finish"
    ):
        ddad.open_split(out / "ddad.json", "train")
    with pytest.raises(DataError, match=r"unfinished dataset with other .*seed 5 \(now 6\)"):
        dataset.write_dataset(dataclasses.replace(same, seed=6), out, {"train": 2, "val": 1}, 0)
    dataset.write_dataset(same, out, {"train": 2, "val": 0}, 0)
    assert len(calls) == 3  # the first scene is kept
    dataset.write_dataset(same, out, {"train": 2, "val": 1}, 0)
    assert len(calls) == 4 and files(out) == wanted
    dataset.write_dataset(same, out, {"train": 2, "val": 1}, 0)
    assert len(calls) == 4 and files(out) == wanted
    lost = sorted(out.glob("samples/CAM_BACK/*.jpg")), sorted(out.glob("semantic/CAM_FRONT/*.png"))
    lost[0][2].unlink()  # of the val scene: its times lie between those of the two train scenes
    lost[1][0].write_bytes(lost[1][0].read_bytes()[:-1])  # of the first train scene
    made = dataset.write_dataset(same, out, {"train": 1, "val": 0}, 0)
    assert sorted(calls[4:]) == sorted({calls[0], calls[3]}) and files(out) == wanted
    assert made == (out / "v1.0-trainval", {"train": 2, "val": 1})


@pytest.mark.parametrize("form", ["nuscenes", "dgp"])
def test_scenes_that_are_there_stay_in_the_tables(form, nuscenes_root, dgp_root, monkeypatch):
    out = {"nuscenes": nuscenes_root, "dgp": dgp_root}[form]
    same = look("--sweeps_between", "2", "--semantics") if form == "nuscenes" else look("--rig", "ddad")
    before = files(out)
    monkeypatch.setattr(dataset, "render_scene", None)  # nothing is left to render
    _, held = dataset.write_dataset(same, out, {"train": 0, "val": 1}, 0)
    assert held == {"train": 2 if form == "nuscenes" else 1, "val": 1} and files(out) == before


def test_another_version_or_device_does_not_go_on(dgp_root, monkeypatch):
    before = files(dgp_root)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "WORLD_VERSION", 99)
        with pytest.raises(DataError, match=r"world_version \d+ \(now 99\); delete it or choose another --out"):
            dataset.write_dataset(look("--rig", "ddad"), dgp_root, {"train": 1, "val": 1}, 0)
    monkeypatch.setattr(dataset, "_backend", lambda: "tpu")
    with pytest.raises(DataError, match=r"rendered on cpu, and JAX runs on tpu now.*choose another --out"):
        dataset.write_dataset(look("--rig", "ddad"), dgp_root, {"train": 2, "val": 1}, 0)
    assert files(dgp_root) == before


def test_other_folders_and_two_runs_at_once_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"photo\.jpg"):
        dataset.write_dataset(look(), tmp_path / "full", {"train": 1, "val": 0}, 0)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["photo.jpg"]
    with (
        dataset._locked_folder(tmp_path / "busy"),
        pytest.raises(DataError, match="another process"),
    ):
        dataset.write_dataset(look(), tmp_path / "busy", {"train": 1, "val": 0}, 0)
    with pytest.raises(ConfigError, match="700 train scenes"):
        dataset.write_dataset(look(), tmp_path / "many", {"train": 701, "val": 0}, 0)


def test_train_and_val_scenes_of_one_seed_and_of_others_differ():
    renderer = dataset._renderer(look("--sweeps_between", "2", "--semantics"))
    worlds = [
        renderer.sample(scene.scene_key(seed, split, index))
        for seed, split, index in ((5, "train", 0), (5, "val", 0), (5, "train", 1), (6, "train", 0))
    ]
    assert len({float(w.road.lane_width) for w in worlds}) == 4


@pytest.mark.slow
def test_the_real_world_has_the_same_bytes_on_one_and_two_workers(tmp_path):
    """The command line with worker processes and the whole world, without the stand-in of this file."""
    found = {}
    for workers in (1, 2):
        out = tmp_path / str(workers)
        command = [sys.executable, "-m", "data_prep.world", "--out", str(out), "--scenes", "1", "--val_scenes", "1"]
        command += ["--frames", "1", "--image_size", "48x80", "--workers", str(workers), "--seed", "9"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        assert done.returncode == 0, done.stderr[-2000:]
        assert "data_prep.nuscenes --dataroot" in done.stdout
        found[workers] = files(out)
    assert found[1] == found[2]
