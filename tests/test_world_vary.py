"""Rigs that vary from scene to scene: what is drawn, and that pictures, tables and records all follow it."""

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from data_prep import ddad, nuscenes
from data_prep.plan import BuildOptions, build_sample
from data_prep.world import dataset, drive, output, rigs, scene
from data_prep.world.__main__ import look_of, parser
from fsmde_jax import geometry
from fsmde_jax.data.records import open_records
from fsmde_jax.errors import ConfigError, DataError
from tests import stand_in_world

SIZE = (64, 96)
SEED = 5


def look(*flags: str) -> dataset.Look:
    arguments = ["--out", "unused", "--frames", "1", "--seed", str(SEED), "--image_size", "64x96", *flags]
    return look_of(parser().parse_args(arguments))


def draw(number: int, base: rigs.Rig) -> rigs.Rig:
    return rigs.varied(base, np.random.default_rng(number))


def angles(base: np.ndarray, other: np.ndarray) -> list[float]:
    """Yaw to the right, pitch up, roll of a camera's pose in the frame of another, degrees, from its axes."""
    right, _, axis = (base[:3, :3].T @ other[:3, :3]).T
    yaw, pitch = np.arctan2(axis[0], axis[2]), np.arcsin(-axis[1])
    return np.degrees([yaw, pitch, np.arcsin(right[1] / np.cos(pitch))]).tolist()


def drawn_numbers(name: str, count: int) -> dict[str, np.ndarray]:
    """What differs from the built-in rig, over `count` draws; [count, cameras] each."""
    base = rigs.read_rig(name)
    rows: dict[str, list] = {key: [] for key in ("zoom", "centre", "angles", "place", "height")}
    for number in range(count):
        pairs = list(zip(base.cameras.values(), draw(number, base).cameras.values(), strict=True))
        rows["zoom"].append([b.intrinsics[0, 0] / a.intrinsics[0, 0] for a, b in pairs])
        rows["centre"].append([(b.intrinsics[:2, 2] - a.intrinsics[:2, 2]) / a.size[::-1] for a, b in pairs])
        rows["angles"].append([angles(a.cam_to_ego, b.cam_to_ego) for a, b in pairs])
        rows["place"].append([(b.cam_to_ego - a.cam_to_ego)[:2, 3] for a, b in pairs])
        rows["height"].append([b.cam_to_ego[2, 3] for _, b in pairs])
    return {key: np.array(values) for key, values in rows.items()}


@pytest.mark.parametrize("name", ["surround", "nuscenes"])
def test_draws_fill_the_documented_ranges(name):
    found = drawn_numbers(name, 200)

    def fills(values: np.ndarray, low: float, high: float) -> None:
        assert low - 1e-9 <= values.min() and values.max() <= high + 1e-9
        assert values.min() < low + 0.1 * (high - low) and values.max() > high - 0.1 * (high - low)

    fills(np.log(found["zoom"]), np.log(0.65) - 0.1, np.log(1.6) + 0.1)
    spread = np.ptp(np.log(found["zoom"]), 1)
    assert np.median(spread) > 0.1 and spread.max() <= 0.2 + 1e-9  # one factor per rig, and a small one per camera
    fills(found["centre"], -0.03, 0.03)
    for number, limit in enumerate((15, 8, 4)):
        fills(found["angles"][..., number], -limit, limit)
    fills(found["place"], -0.2, 0.2)
    fills(found["height"], 0.8, 2.4)
    assert np.ptp(found["height"], 1).max() <= 0.2 + 1e-9
    for values in (found["centre"], found["angles"], found["place"]):
        assert np.abs(np.corrcoef(values.reshape(-1, values.shape[-1]).T) - np.eye(values.shape[-1])).max() < 0.15


def test_drawn_rigs_are_rigid_and_differ_in_calibration_only():
    base = rigs.read_rig("surround")
    before = {name: (c.intrinsics.copy(), c.cam_to_ego.copy()) for name, c in base.cameras.items()}
    for number in range(20):
        rig = draw(number, base)
        assert list(rig.cameras) == list(base.cameras)
        for name, camera in rig.cameras.items():
            rotation = camera.cam_to_ego[:3, :3]
            np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
            assert np.linalg.det(rotation) == pytest.approx(1)
            np.testing.assert_array_equal(camera.cam_to_ego[3], [0, 0, 0, 1])
            k, old = camera.intrinsics, before[name][0]
            assert k[0, 0] / old[0, 0] == pytest.approx(k[1, 1] / old[1, 1]) and k[0, 1] == k[1, 0] == 0
            same = dataclasses.replace(base.cameras[name], intrinsics=k, cam_to_ego=camera.cam_to_ego)
            assert (same.size, same.delay) == (camera.size, camera.delay)
        assert rig.lidar is base.lidar and rig.body is base.body
    for name, camera in base.cameras.items():  # the rig that was given is not changed
        np.testing.assert_array_equal(camera.intrinsics, before[name][0])
        np.testing.assert_array_equal(camera.cam_to_ego, before[name][1])


def test_the_draw_does_not_depend_on_the_image_size():
    base = rigs.read_rig("surround")
    small, large = draw(3, rigs.scaled(base, size=SIZE)), rigs.scaled(draw(3, base), size=SIZE)
    for a, b in zip(small.cameras.values(), large.cameras.values(), strict=True):
        np.testing.assert_allclose(a.intrinsics, b.intrinsics, atol=1e-9)
        np.testing.assert_array_equal(a.cam_to_ego, b.cam_to_ego)


def rig_at(seed: int, split: str, index: int, **changes) -> list[float]:
    wanted = dataclasses.replace(look("--rig", "surround", "--vary_rig"), seed=seed, **changes)
    job = output.Job(wanted, Path("unused"), split, index, "name")
    cameras = dataset.rig_of_scene(job, dataset.rig_of(wanted)).cameras.values()
    return np.concatenate([np.append(c.intrinsics.ravel(), c.cam_to_ego.ravel()) for c in cameras]).tolist()


def test_a_scenes_rig_depends_on_seed_split_and_number_only():
    places = [(0, "train", 0), (0, "train", 1), (0, "val", 0), (0, "val", 1), (1, "train", 0), (1, "val", 0)]
    rows = [rig_at(*place) for place in places]
    assert len({tuple(row) for row in rows}) == len(places)
    for place, row in zip(places, rows, strict=True):
        assert rig_at(*place, samples=2, frames=7, jpeg_quality=50) == row
    unvaried = rig_at(0, "train", 0, vary_rig=False)
    assert unvaried == rig_at(1, "val", 3, vary_rig=False) and unvaried not in rows


def test_rigs_that_see_themselves_are_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"rig ddad: world\.body\.in_images = true.*in_images: false in your file"):
        look("--rig", "ddad", "--vary_rig")
    with pytest.raises(ConfigError, match="rig ddad"):
        draw(0, rigs.read_rig("ddad"))


def test_a_drive_takes_no_rig_that_differs_in_more_than_calibration():
    base = rigs.read_rig("surround")
    drive._check_same_but_calibration(draw(0, base), base)
    cameras = {name: dataclasses.replace(c, delay=0.01) for name, c in base.cameras.items()}
    faster = dataclasses.replace(base, keyframe_rate=5.0)
    swapped = dataclasses.replace(base, cameras=dict(reversed(base.cameras.items())))
    for other in (rigs.scaled(base, scale=0.5), dataclasses.replace(base, cameras=cameras), faster, swapped):
        with pytest.raises(ValueError, match="more than its cameras' calibration"):
            drive._check_same_but_calibration(other, base)


@pytest.mark.parametrize("said", [{}, {"vary_rig": False}])
def test_datasets_from_before_the_flag_go_on_unvaried(said, tmp_path):
    plain, varied = look("--rig", "surround"), look("--rig", "surround", "--vary_rig")
    (tmp_path / ".scenes").mkdir()
    dataset._check_look(tmp_path, plain, "ddad.json")
    path = tmp_path / ".scenes" / "look.json"
    content = json.loads(path.read_bytes())
    assert content.pop("vary_rig") is False
    path.write_text(json.dumps(content | said))
    dataset._check_look(tmp_path, plain, "ddad.json")
    with pytest.raises(DataError, match=r"other vary_rig False \(now True\)"):
        dataset._check_look(tmp_path, varied, "ddad.json")


@pytest.fixture(scope="module")
def world():
    with pytest.MonkeyPatch.context() as patch:
        stand_in_world.install(patch)
        yield
        dataset._renderer.cache_clear()


@pytest.fixture(scope="module")
def dgp_root(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("varied") / "dgp"
    dataset.write_dataset(look("--rig", "surround", "--vary_rig"), out, {"train": 2, "val": 1}, 0)
    return out


def agreement(cloud: np.ndarray, k: np.ndarray, cam_to_ego: np.ndarray, depth: np.ndarray) -> tuple[int, int]:
    """Points [P, 3] of the ego frame in a camera: how many agree with its dense depth within 2 %, of how many that
    fall on something away from its edges."""
    local = (cloud - cam_to_ego[:3, 3]) @ cam_to_ego[:3, :3]
    local = local[local[:, 2] > 0.5]
    pixel = np.rint(local @ k.T / local[:, 2:])[:, :2].astype(int)
    inside = np.all((pixel >= 0) & (pixel < depth.shape[::-1]), axis=1)
    (u, v), z = pixel[inside].T, local[inside, 2]
    low, high = cv2.erode(depth, np.ones((3, 3))), cv2.dilate(depth, np.ones((3, 3)))
    kept = ((low > 0.9 * depth) & (high < 1.1 * depth))[v, u]
    u, v, z = u[kept], v[kept], z[kept]
    return int(np.sum((z > 0.98 * low[v, u]) & (z < 1.02 * high[v, u]))), len(z)


def read_depth(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED).astype(np.float32) / 256


@pytest.mark.slow
def test_records_of_a_varied_dataset_have_each_scenes_calibration(dgp_root, tmp_path):
    for split in ("train", "val"):
        flags = ["--split", split, "--image_size", "native", "--out", str(tmp_path / split), "--workers", "1"]
        ddad.main(["--json", str(dgp_root / "ddad.json"), *flags])
    records = open_records(tmp_path / "train")
    assert len(records) == 2
    base, seen = rigs.scaled(rigs.read_rig("surround"), size=SIZE), []
    good, wrong, total = 0, 0, 0
    for index, sample in enumerate(records):
        assert sample.scene.endswith(f"{index:06d}")
        rig = rigs.varied(base, np.random.default_rng([SEED, 0, index, 1]))
        (path,) = (dgp_root / f"{index:06d}" / "point_cloud" / "LIDAR").glob("*.npz")
        cloud = np.load(path)["data"][:, :3].astype(np.float64)  # in the ego frame; this rig's cameras have no delay
        for i, name in enumerate(sample.camera_names):
            np.testing.assert_allclose(sample.intrinsics[i], rig.cameras[name].intrinsics, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(sample.cam_to_ego[i], rig.cameras[name].cam_to_ego, atol=1e-5)
            depth = read_depth(sample.dense_depth[i])
            pair = agreement(cloud, sample.intrinsics[i], sample.cam_to_ego[i], depth)
            good, total = good + pair[0], total + pair[1]
            wrong += agreement(cloud, base.cameras[name].intrinsics, base.cameras[name].cam_to_ego, depth)[0]
        seen.append(sample.intrinsics)
    assert total > 3000 and good / total > 0.95
    assert wrong < 0.7 * good  # the rig's own calibration does not fit, so the comparison can tell
    assert not np.allclose(seen[0], seen[1])


def test_one_compilation_serves_all_calibrations(dgp_root):
    """And the same scene, seen by two rigs, is the same for its LiDAR and another one for its cameras."""
    renderer = dataset._renderer(look("--rig", "surround", "--vary_rig"))
    key = scene.scene_key(SEED, "train", 0)
    first, second, own = (
        drive.Drive(renderer, key, rig).keyframe(0) for rig in (draw(0, renderer.rig), draw(1, renderer.rig), None)
    )
    assert renderer._views._cache_size() == 1
    np.testing.assert_array_equal(first[1].points, second[1].points)
    assert not np.array_equal(first[0]["front"].depth, second[0]["front"].depth)
    np.testing.assert_array_equal(  # a rig's own calibration is what it is rendered with unless told otherwise
        own[0]["back"].depth, drive.Drive(renderer, key, renderer.rig).keyframe(0)[0]["back"].depth
    )


@pytest.fixture(scope="module")
def nuscenes_root(world, tmp_path_factory) -> Path:
    """From a rig file: the built-in rig in the other format."""
    folder = tmp_path_factory.mktemp("varied")
    content = yaml.safe_load(rigs.built_in("surround").read_text())
    content["world"]["format"] = "nuscenes"
    (folder / "mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    varied = look("--rig", str(folder / "mine.yaml"), "--vary_rig")
    dataset.write_dataset(varied, folder / "out", {"train": 2, "val": 0}, 0)
    return folder / "out"


def test_nuscenes_tables_hold_the_calibration_of_every_scene(nuscenes_root):
    tables = {
        name: json.loads((nuscenes_root / "v1.0-trainval" / f"{name}.json").read_bytes())
        for name in ("calibrated_sensor", "sensor", "sample_data")
    }
    assert len(tables["sensor"]) == 7 and len(tables["calibrated_sensor"]) == 2 * 7
    assert len({row["token"] for row in tables["calibrated_sensor"]}) == 2 * 7
    used = [row["calibrated_sensor_token"] for row in tables["sample_data"]]
    assert sorted(used) == sorted(row["token"] for row in tables["calibrated_sensor"])
    source = nuscenes.open_split(nuscenes_root, "v1.0-trainval", "train")
    base, good, total = rigs.scaled(rigs.read_rig("surround"), size=SIZE), 0, 0
    for index in range(2):
        sample = build_sample(source.describe(index), BuildOptions(None, 95, source.point_rule))
        rig = rigs.varied(base, np.random.default_rng([SEED, 0, index, 1]))
        for i, name in enumerate(sample.camera_names):
            np.testing.assert_allclose(sample.intrinsics[i], rig.cameras[name].intrinsics, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(sample.cam_to_ego[i], rig.cameras[name].cam_to_ego, atol=1e-5)
            cloud = geometry.transform_points(
                sample.cam_to_ego[i].astype(np.float64),
                geometry.unproject(sample.intrinsics[i], sample.points[i][:, :2], sample.points[i][:, 2]),
            )
            pair = agreement(cloud, sample.intrinsics[i], sample.cam_to_ego[i], read_depth(sample.dense_depth[i]))
            good, total = good + pair[0], total + pair[1]
    assert total > 3000 and good / total > 0.95
