"""Dense depth through the converters, and rendered datasets that say so in their records."""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep import ddad, folder, leakage, nuscenes, overlay, record_writer, verify
from data_prep.plan import BuildOptions, build_sample
from fsmde_jax.data import dense, schema, tfrecord
from fsmde_jax.data.records import load_manifest
from fsmde_jax.errors import ConfigError, DataError
from tests import rendered, rooms

boxes = rendered.boxes
SIZE = (45, 80)
LARGE = (135, 240)


def add_dense_depth(root: Path, size=SIZE) -> None:
    """Writes dense_depth/ beside the samples of a rendered nuScenes dataroot: exact z-depth, sky 0."""
    read = {n: json.loads((root / f"v1.0-mini/{n}.json").read_text()) for n in ("sample_data", "sample", "scene")}
    seeds = {"scene-0061": 0, "scene-0103": 1}
    scene = {s["token"]: s["name"] for s in read["scene"]}
    of_sample = {s["token"]: scene[s["scene_token"]] for s in read["sample"]}
    for row in read["sample_data"]:
        camera = Path(row["filename"]).parent.name
        if not camera.startswith("CAM"):
            continue
        yaw, focal, position, _ = boxes.NUSCENES_CAMERAS[camera]
        seed = seeds[of_sample[row["sample_token"]]]
        pose = boxes.ego_pose(row["timestamp"] - boxes.START_US - seed * 10**9) @ boxes.camera_pose(yaw, position)
        depth = boxes.render(boxes.make_street(seed), pose, boxes.intrinsics(focal, size), size)[1]
        depth[~np.isfinite(depth) | (depth > 255)] = 0
        path = root / "dense_depth" / camera / f"{Path(row['filename']).stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rooms.png(depth))


def rename_as_world(root: Path, seeds=(7, 7), location="rendered world") -> None:
    """What the world writes into the tables of its dataroots."""
    for name, change in (("log", {"location": location}), ("scene", None)):
        path = root / f"v1.0-mini/{name}.json"
        table = json.loads(path.read_text())
        for row, seed in zip(table, seeds, strict=False):
            row |= change if change else {"description": f"rendered world, seed {seed}"}
        path.write_text(json.dumps(table))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = rendered.nuscenes(
        tmp_path_factory.mktemp("nuscenes"), (2, 1), size=LARGE, cameras=rendered.RIG_OF_3, beams=40, columns=360
    )
    add_dense_depth(out, LARGE)
    return out


@pytest.fixture
def copy(root, tmp_path):
    shutil.copytree(root, tmp_path / "d")
    return tmp_path / "d"


def open_mini(dataroot, split="mini_train", **options):
    return nuscenes.open_split(dataroot, "v1.0-mini", split, **options)


def read_all(out):
    found = load_manifest(out)
    reader = tfrecord.TFRecordReader([out / s["name"] for s in found.shards])
    return found, [schema.decode(reader[i]) for i in range(len(reader))]


def test_planes_are_the_files_at_the_centre_of_each_pixel(root, tmp_path):
    source = open_mini(root)
    record_writer.convert(source, tmp_path / "small", BuildOptions((32, 64)))
    found, samples = read_all(tmp_path / "small")
    assert found.dense_depth and found.format_version == 2
    rows = [int(Fraction(2 * i + 1, 64) * LARGE[0]) for i in range(32)]
    cols = [int(Fraction(2 * i + 1, 128) * LARGE[1]) for i in range(64)]
    for index, sample in enumerate(samples):
        for i, camera in enumerate(source.describe(index).cameras):
            native = cv2.imread(camera.dense, cv2.IMREAD_UNCHANGED)
            stored = dense.decode(sample.dense_depth[i], (32, 64), "x")
            np.testing.assert_array_equal(stored, native[np.ix_(rows, cols)] / 256.0)
            assert (stored == 0).any() and (stored > 0).mean() > 0.5  # the boxes have a sky
    native = build_sample(source.describe(0), BuildOptions())
    for data, camera in zip(native.dense_depth, source.describe(0).cameras, strict=True):
        assert data == Path(camera.dense).read_bytes()


def test_manifest_statistics_count_the_pixels_with_depth(root, tmp_path):
    record_writer.convert(open_mini(root), tmp_path / "r", BuildOptions())
    found, samples = read_all(tmp_path / "r")
    for i, name in enumerate(found.cameras):
        counted = sum(np.count_nonzero(dense.decode(s.dense_depth[i], LARGE, "x")) for s in samples)
        one = found.statistics["cameras"][name]
        assert (one["dense_pixels"], one["pixels"]) == (counted, len(samples) * LARGE[0] * LARGE[1])
    verify.verify_folder(tmp_path / "r")


def test_projected_points_agree_with_the_dense_depth(root, tmp_path, capsys):
    """Ego motion, pixel centres and units at once; only what boxes hide from a camera is further away."""
    record_writer.convert(open_mini(root), tmp_path / "r", BuildOptions())
    agreement = verify.Agreement()
    verify.verify_folder(tmp_path / "r", agreement)
    assert agreement.points > 3000 and agreement.agree / agreement.points > 0.96
    assert agreement.in_front / agreement.points < 0.002
    assert agreement.points == agreement.agree + agreement.behind + agreement.in_front
    verify.main([str(tmp_path / "r"), "--overlay", str(tmp_path / "o.png")])
    said = capsys.readouterr().out
    assert (
        "LiDAR points away from edges" in said
        and "hidden from the camera" in said
        and "dense depth of every pixel" in said
    )
    assert cv2.imread(str(tmp_path / "o.png")) is not None
    wrong = read_all(tmp_path / "r")[1][0]  # planes of the neighbouring camera do not agree
    wrong.dense_depth = wrong.dense_depth[1:] + wrong.dense_depth[:1]
    mixed = verify.Agreement()
    mixed.add(wrong, "x")
    assert mixed.agree / mixed.points < 0.5


def test_overlay_shows_dense_depth_below_each_image(root):
    sample = build_sample(open_mini(root).describe(0), BuildOptions())
    tile = overlay.draw_dense(sample, 0, 1.0, 80.0, width=LARGE[1])
    depth = dense.decode(sample.dense_depth[0], LARGE, "x")
    assert not tile[:5][depth[:5] == 0].any()
    surface = overlay.depth_colours(np.maximum(depth.ravel(), 1.0), 1.0, 80.0).reshape(tile.shape)
    assert (tile == surface).all(2)[depth > 0].mean() > 0.5  # the surface keeps its colour between the points
    without = build_sample(open_mini(root, dense_depth="off").describe(0), BuildOptions())
    tall, plain = (overlay.draw_overlay(s, 80.0, "t") for s in (sample, without))
    assert tall.height > plain.height + LARGE[0]


def test_off_leaves_it_out_and_is_another_conversion(root, copy, tmp_path):
    record_writer.convert(open_mini(root), tmp_path / "with", BuildOptions((32, 64)))
    record_writer.convert(open_mini(root, dense_depth="off"), tmp_path / "without", BuildOptions((32, 64)))
    found, samples = read_all(tmp_path / "without")
    assert not found.dense_depth and not any(any(s.dense_depth) for s in samples)
    assert found.fingerprint != load_manifest(tmp_path / "with").fingerprint
    with pytest.raises(DataError, match="finished conversion of other samples or options"):
        record_writer.convert(open_mini(root, dense_depth="off"), tmp_path / "with", BuildOptions((32, 64)))
    path = Path(open_mini(copy).describe(0).cameras[0].dense)
    path.write_bytes(rooms.png(np.full(LARGE, 3.0)))
    with pytest.raises(DataError, match="files changed since"):
        record_writer.convert(open_mini(copy), tmp_path / "with", BuildOptions((32, 64)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.unlink(), "cannot read this dense depth"),
        (lambda p: p.write_bytes(p.read_bytes()[:-30]), "truncated"),
        (lambda p: p.write_bytes(p.read_bytes()[:200] + bytes(40) + p.read_bytes()[240:]), "cannot be decoded"),
        (lambda p: p.write_bytes(rooms.png(np.ones((90, 160)))), "90x160, expected 135x240"),
        (lambda p: p.write_bytes(cv2.imencode(".png", np.ones(LARGE, np.uint8))[1].tobytes()), "uint8"),
    ],
)
def test_missing_or_damaged_planes_stop_and_name_the_file(copy, damage, words):
    source = open_mini(copy)
    path = Path(source.describe(1).cameras[1].dense)
    damage(path)
    build_sample(source.describe(0), BuildOptions((32, 64)))
    with pytest.raises(DataError, match=rf"{path.stem}\.png.*{words}"):
        build_sample(source.describe(1), BuildOptions((32, 64)))


def test_verify_finds_records_that_lack_what_the_manifest_promises(root, tmp_path):
    record_writer.convert(open_mini(root, dense_depth="off"), tmp_path / "r", BuildOptions((32, 64)))
    path = tmp_path / "r" / schema.MANIFEST_NAME
    path.write_text(path.read_text().replace('"dense_depth": false', '"dense_depth": true'))
    with pytest.raises(DataError, match="no dense depth, but the manifest says"):
        verify.verify_folder(tmp_path / "r")


def test_rendered_nuscenes_is_the_dataset_world(copy, tmp_path):
    assert open_mini(copy).dataset == "nuscenes"
    rename_as_world(copy)
    source = open_mini(copy)
    assert (source.dataset, source.version) == ("world", "rendered, nuScenes v1.0-mini format, seed 7")
    assert source.scenes == ["seed 7/scene-0061"] and not source.complete
    assert (source.point_rule, source.min_depth, source.max_depth) == ("round", 0.1, 80.0)
    record_writer.convert(source, tmp_path / "train", BuildOptions((32, 64)))
    found, samples = read_all(tmp_path / "train")
    assert found.dataset == "world" and {s.scene for s in samples} == {"seed 7/scene-0061"}
    rename_as_world(copy, seeds=(8, 8))
    other = open_mini(copy)
    assert not set(other.scenes) & set(source.scenes)  # another seed, other streets
    leakage.check_siblings(tmp_path / "val", open_mini(copy, "mini_val"))
    rename_as_world(copy, seeds=("", ""))
    assert open_mini(copy).version.endswith("seed unknown")


def test_a_full_official_count_of_rendered_scenes_is_not_the_official_split(copy, monkeypatch):
    rename_as_world(copy)
    monkeypatch.setitem(nuscenes.OFFICIAL_SAMPLES, "mini_val", 1)
    base, splits = nuscenes.load_devkit()
    one_scene = {name: ["scene-0103"] if name == "mini_val" else scenes for name, scenes in splits().items()}
    monkeypatch.setattr(nuscenes, "load_devkit", lambda: (base, lambda: one_scene))
    assert not open_mini(copy, "mini_val").complete
    rename_as_world(copy, location="boston-seaport")
    assert open_mini(copy, "mini_val").complete  # the same tables of a real place would be


def test_rendered_and_real_scenes_in_one_dataroot_are_refused(copy):
    path = copy / "v1.0-mini/log.json"
    logs = json.loads(path.read_text())
    path.write_text(json.dumps([*logs, {**logs[0], "token": "other", "location": "rendered world"}]))
    maps = copy / "v1.0-mini/map.json"
    maps.write_text(maps.read_text().replace(logs[0]["token"] + '"', logs[0]["token"] + '", "other"'))
    scenes = copy / "v1.0-mini/scene.json"
    table = json.loads(scenes.read_text())
    table[1]["log_token"] = "other"
    scenes.write_text(json.dumps(table))
    with pytest.raises(DataError, match=r"rendered scenes \(scene-0103.*real ones"):
        open_mini(copy)


def write_dgp_dense(index: Path) -> dict[str, np.ndarray]:
    """A dense plane per image of the DGP rig: {file stem and camera: depth}."""
    planes = {}
    for image in sorted(index.parent.glob("*/rgb/*/*.png")):
        scene, camera = image.parents[2], image.parent.name
        depth = np.full(SIZE, len(planes) + 1.5)
        target = scene / "dense_depth" / camera / image.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(rooms.png(depth))
        planes[f"{scene.name}/{camera}/{image.stem}"] = depth
    return planes


def test_dgp_scenes_bring_their_dense_depth(tmp_path):
    index = rendered.dgp(tmp_path / "d", frames=2)
    assert not ddad.open_split(index, "val").dense_depth
    planes = write_dgp_dense(index)
    assert not ddad.open_split(index, "val", dense_depth="off").dense_depth
    source = ddad.open_split(index, "val")
    assert source.dense_depth and source.dataset == "ddad"
    for k in range(2):
        plan = source.describe(k)
        sample = build_sample(plan, BuildOptions((30, 40), point_rule="truncate"))
        for data, camera in zip(sample.dense_depth, plan.cameras, strict=True):
            expected = planes[f"000150/{camera.name}/{Path(camera.image).stem}"][0, 0]
            assert (dense.decode(data, (30, 40), "x") == expected).all()
    shutil.rmtree(index.parent / "000150/dense_depth/CAMERA_05")
    with pytest.raises(DataError, match=r"CAMERA_05.*cannot read this dense depth"):
        build_sample(source.describe(0), BuildOptions((30, 40), point_rule="truncate"))


def test_rendered_dgp_is_the_dataset_world(tmp_path):
    index = rendered.dgp(tmp_path / "d", frames=1)
    before = ddad.open_split(index, "val")
    content = json.loads(index.read_text())
    content["metadata"] = {"name": "FSMDE world", "version": "1", "description": "rendered world, seed 12"}
    index.write_text(json.dumps(content))
    source = ddad.open_split(index, "val", masks=ddad.MaskSets(index.parent / "masks"))
    assert (source.dataset, source.version) == ("world", "rendered, DGP format, seed 12")
    assert source.scenes == ["seed 12/000150"] and source.sample_ids == [f"seed 12/{x}" for x in before.sample_ids]
    assert (source.point_rule, source.max_depth) == ("truncate", 200.0)
    assert source.describe(0).scene == "seed 12/000150" and source.describe(0).cameras[1].mask is not None


def test_folder_takes_dense_depth_from_a_folder(tmp_path):
    index = rendered.dgp(tmp_path / "dgp", (("000150", "1"),), frames=2)
    source = ddad.open_split(index, "val")
    paths = rendered.folder_of([source.describe(i) for i in range(2)], tmp_path / "rig")
    for image in sorted(Path(paths["images"]).glob("*/*.png")):
        target = tmp_path / "exact" / image.parent.name / image.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(rooms.png(np.full(SIZE, 9.25)))
    assert not folder.open_folder(**paths).dense_depth
    own = folder.open_folder(**paths, dense_depth=tmp_path / "exact")
    assert own.dense_depth
    sample = build_sample(own.describe(1), BuildOptions(point_rule="truncate"))
    assert all((dense.decode(data, SIZE, "x") == 9.25).all() for data in sample.dense_depth)
    with pytest.raises(ConfigError, match=r"--dense_depth=.*no such folder"):
        folder.open_folder(**paths, dense_depth=tmp_path / "nowhere")
