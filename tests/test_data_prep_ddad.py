"""data_prep.ddad and data_prep.dgp: datum poses, masks, splits; recorded goldens on the real clip."""

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import ddad, dgp
from data_prep.lidar_depth import pixel_of
from data_prep.plan import BuildOptions, build_sample
from fsmde_jax import geometry
from fsmde_jax.errors import ConfigError, DataError
from tests import boxes, rendered

RULE = BuildOptions(point_rule="truncate")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return rendered.dgp(tmp_path_factory.mktemp("dgp"))


@pytest.fixture
def copy(index, tmp_path):
    """A dataset that may be broken."""
    shutil.copytree(index.parent, tmp_path / "d")
    return tmp_path / "d" / "ddad.json"


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_samples_follow_the_poses(index):
    source = ddad.open_split(index, "val")
    assert source.cameras == ["CAMERA_01", "CAMERA_05", "CAMERA_07"] and source.scenes == ["000150"]
    assert source.sample_ids == ["000150/0000/0", "000150/0001/100000", "000150/0002/200000"] and not source.complete
    sample = build_sample(source.describe(1), RULE)
    assert (sample.camera_timestamps_us - sample.timestamp_us).tolist() == [-35_000, -1_000, -20_000]
    street, to_street = boxes.make_street(1), boxes.street_from_global()
    for i, (yaw, focal, position, delay) in enumerate(rendered.RIG_OF_3.values()):
        ego = boxes.ego_pose(100_000 + delay)
        stored = sample.ego_to_global[i].astype(np.float64)
        stored[:3, 3] += sample.global_origin
        np.testing.assert_allclose(stored, ego, atol=2e-6)
        pose = to_street @ ego @ boxes.camera_pose(yaw, position)
        uvz = sample.points[i].astype(np.float64)
        rays = geometry.unproject(boxes.intrinsics(focal, rendered.SMALL), uvz[:, :2], np.ones(len(uvz)))
        cast = boxes.cast(street, pose[:3, 3], rays @ pose[:3, :3].T)[0]
        assert (np.abs(cast - uvz[:, 2]) < 1e-2 + 1e-3 * uvz[:, 2]).mean() > 0.85


def test_sweeps_come_from_neighbouring_samples(index):
    plan = ddad.open_split(index, "val", sweeps=5).describe(0)
    assert [Path(s.path).stem for s in plan.extra_sweeps] == ["100000", "200000"]


def test_masks_are_one_bit_and_only_where_needed(index):
    masks = ddad.MaskSets(index.parent / "masks")
    sample = build_sample(ddad.open_split(index, "val", masks=masks).describe(0), RULE)
    assert sample.ego_masks[0] == b""  # all white
    image = Image.open(io.BytesIO(sample.ego_masks[2]))
    assert image.mode == "1" and (image.height, image.width) == rendered.SMALL
    expected = np.ones(rendered.SMALL, bool)
    expected[-12:] = False
    np.testing.assert_array_equal(np.array(image), expected)


@pytest.mark.parametrize("kind", ["json", "pickle"])
def test_mask_table_chooses_the_set(index, tmp_path, kind):
    for name in "03":
        shutil.copytree(index.parent / "masks" / "0", tmp_path / name)
    with pytest.raises(ConfigError, match="--mask_set"):
        ddad.MaskSets(tmp_path)
    assert ddad.MaskSets(tmp_path, "3").path("any", "CAMERA_05") == str(tmp_path / "3" / "CAMERA_05_mask.png")
    with pytest.raises(ConfigError, match=r"--mask_set=4.*Known: 0, 3"):
        ddad.MaskSets(tmp_path, "4")
    if kind == "json":
        (tmp_path / "scene_to_set.json").write_text('{"000150": 3, "000001": 0}')
    else:
        (tmp_path / "mask_idx_dict.pkl").write_bytes(pickle.dumps({150: 3, 1: 0}))
    masks = ddad.MaskSets(tmp_path)
    assert Path(masks.path("000150", "CAMERA_05")).parent.name == "3"
    with pytest.raises(DataError, match="no entry for scene 000007"):
        masks.path("000007", "CAMERA_05")
    with pytest.raises(DataError, match=r"CAMERA_02_mask\.png: missing"):
        masks.path("000001", "CAMERA_02")


def test_a_table_that_would_run_code_is_refused(index, tmp_path):
    shutil.copytree(index.parent / "masks" / "0", tmp_path / "0")
    (tmp_path / "mask_idx_dict.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(DataError, match=r"mask_idx_dict\.pkl.*os\.system.*scene_to_set\.json instead"):
        ddad.MaskSets(tmp_path)


def test_wrong_masks_are_named(copy):
    mask = copy.parent / "masks" / "0" / "CAMERA_05_mask.png"
    masks = ddad.MaskSets(copy.parent / "masks")

    def build():
        return build_sample(ddad.open_split(copy, "val", masks=masks).describe(0), RULE)

    Image.fromarray(np.full((10, 10), 255, np.uint8)).save(mask)
    with pytest.raises(DataError, match=r"CAMERA_05_mask\.png: the mask is 10x10"):
        build()
    Image.fromarray(np.full(rendered.SMALL, 128, np.uint8)).save(mask)
    with pytest.raises(DataError, match=r"CAMERA_05_mask\.png: mask values"):
        build()


def test_wrong_choices_are_named(index, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        ddad.open_split(index, "trian")
    with pytest.raises(DataError, match="unknown camera 'CAMERA_1'; did you mean 'CAMERA_01'"):
        ddad.open_split(index, "val", cameras=["CAMERA_1"])
    with pytest.raises(DataError, match="lists no scene; filled splits: train, val"):
        ddad.open_split(index, "test")
    with pytest.raises(ConfigError, match="no such file"):
        ddad.open_split(tmp_path / "none.json", "val")


def test_a_scene_in_two_splits_is_refused(copy):
    def leak(content):
        content["scene_splits"]["1"]["filenames"].append(content["scene_splits"]["0"]["filenames"][0])

    edit(copy, leak)
    with pytest.raises(DataError, match="scene '000000' is in split 'train' and in split 'val'"):
        ddad.open_split(copy, "val")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("ddad.json", "{", r"ddad\.json: broken json"),
        ("ddad.json", "[]", "not a DGP dataset"),
        ("000150/scene_0.json", None, r"scene_0\.json: missing"),
        ("000150/scene_0.json", "{}", "not a DGP scene"),
        ("000150/calibration/c0.json", "{]", r"c0\.json: broken json"),
        ("000150/calibration/c0.json", '{"names": ["a"]}', "not a DGP calibration"),
    ],
)
def test_broken_json_is_named(copy, file, text, message):
    if text is None:
        (copy.parent / file).unlink()
    else:
        (copy.parent / file).write_text(text)
    with pytest.raises(DataError, match=message):
        ddad.open_split(copy, "val").describe(0)


def test_wrong_calibration_is_named(copy):
    path = copy.parent / "000150" / "calibration" / "c0.json"
    original = path.read_text()

    def failing(change, message):
        path.write_text(original)
        edit(path, change)
        dgp.read_calibration.cache_clear()
        with pytest.raises(DataError, match=message):
            build_sample(ddad.open_split(copy, "val").describe(0), RULE)

    failing(lambda c: c["intrinsics"][1].update(fx=0.0), r"CAMERA_01, intrinsics: singular")
    failing(lambda c: c["intrinsics"][2].update(k1=0.1), r"CAMERA_05 has lens distortion.*docs/custom_data\.md")
    failing(
        lambda c: c["extrinsics"][1]["rotation"].update(qw=0.0, qx=0.0, qy=0.0, qz=0.0),
        r"c0\.json, extrinsics of CAMERA_01: .*quaternion",
    )
    failing(lambda c: [c[k].pop(3) for k in ("names", "intrinsics", "extrinsics")], "CAMERA_07")


def test_missing_datum_is_named(copy):
    def drop(content):
        content["samples"][1]["datum_keys"] = [k for k in content["samples"][1]["datum_keys"] if "CAMERA_05" not in k]

    edit(copy.parent / "000150" / "scene_0.json", drop)
    source = ddad.open_split(copy, "val")
    source.describe(0)
    with pytest.raises(DataError, match="sample 1 has no datum of CAMERA_05"):
        source.describe(1)


def test_scenes_are_read_twice_at_most(tmp_path, monkeypatch):
    """Once for the sample ids, once for the descriptions; more scenes than the cache holds."""
    index = rendered.dgp(tmp_path / "d", tuple((f"{k:06d}", "1") for k in range(6)), frames=2, masks=False)
    reads = []
    read = dgp.read_json
    monkeypatch.setattr(dgp, "read_json", lambda path: reads.append(path) or read(path))
    source = ddad.open_split(index, "val")
    for i in range(len(source.sample_ids)):
        source.describe(i)
    scenes = [p for p in reads if p.name.startswith("scene_")]
    assert len(source.sample_ids) == 12 and all(scenes.count(p) == 2 for p in set(scenes)), scenes


def test_timestamps():
    assert dgp.timestamp_us("1970-01-01T00:00:01Z") == 1_000_000
    assert dgp.timestamp_us("2019-05-01T10:00:00.0279Z") == 1556704800027900
    assert dgp.timestamp_us("2019-05-01T10:00:00.027900999Z") == 1556704800027900


@pytest.mark.real_data
def test_real_clip(real_data):
    """Points per camera as recorded with the clip; P1 goldens of a constant 10 m; the ego frame moves."""
    root = real_data / "ddad_val_clip"
    source = ddad.open_split(root / "ddad.json", "val", masks=ddad.MaskSets(root / "self_occlusion_masks"))
    assert source.cameras == [f"CAMERA_{i:02d}" for i in (1, 5, 7, 9, 8, 6)]
    mean_error, egos = [], []
    for k in range(3):
        sample = build_sample(source.describe(k), RULE)
        errors = []
        for i in range(6):
            truth = np.zeros(sample.native_size[i])
            column, row = pixel_of(sample.points[i][:, :2], "truncate").T
            truth[row, column] = sample.points[i][:, 2]
            truth = truth[(truth > 0.1) & (truth < 200)]
            errors.append(np.mean(np.abs(10 - truth) / truth))
        mean_error.append(np.mean(errors))
        origin = sample.ego_to_global[:, :3, 3] + sample.global_origin
        assert np.ptp(origin, axis=0).max() < 0.02  # six cameras within microseconds: one ego position
        egos.append(origin[0])
        assert sample.ego_masks[0] == b"" and sample.ego_masks[3] != b""
    np.testing.assert_allclose(mean_error, [0.55093, 0.55391, 0.55454], atol=6e-6)
    np.testing.assert_allclose(np.linalg.norm(np.diff(egos, axis=0), axis=1), [1.27, 1.27], atol=0.02)


@pytest.mark.real_data
def test_real_clip_counts_inside_a_border(real_data):
    source = ddad.open_split(real_data / "ddad_val_clip" / "ddad.json", "val")
    sample = build_sample(source.describe(1), RULE)
    counts = {}
    for name, points, (height, width) in zip(sample.camera_names, sample.points, sample.native_size, strict=True):
        u, v, z = points.T
        counts[name] = int(((z > 1) & (u > 0) & (u < width - 1) & (v > 0) & (v < height - 1)).sum())
    recorded = {"01": 5560, "05": 12689, "06": 12206, "07": 11167, "08": 10429, "09": 9768}
    assert counts == {f"CAMERA_{k}": v for k, v in recorded.items()}
