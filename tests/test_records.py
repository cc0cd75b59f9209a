"""Records folders: what opens, what is refused with which words, and camera subsets."""

import dataclasses
import json

import numpy as np
import pytest

from fsmde_jax import geometry
from fsmde_jax.data import schema, tfrecord
from fsmde_jax.data.records import open_records, shared_scenes
from fsmde_jax.errors import ConfigError, DataError
from tests import sample_factory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sample_factory.make_folder(tmp_path_factory.mktemp("records") / "train", 5, native_size=(24, 40))


def small(seed, **options):
    return sample_factory.make_rig(seed, native_size=(24, 40), num_points=60, **options).sample


def shard_of(folder, k):
    return sorted(folder.glob("*.tfrecord-0000?-of-0000?"))[k]


def assert_same_sample(got, expected):
    for field in dataclasses.fields(schema.RigSample):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        if field.name in ("points", "extra_points"):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x, y)
        elif isinstance(b, np.ndarray):
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b, field.name


def test_samples_come_back_as_written(folder):
    records = open_records(str(folder))
    assert len(records) == 5 and records.cameras == sample_factory.RING_NAMES[6]
    for i, sample in enumerate(records):
        assert_same_sample(sample, sample_factory.make_rig(i, native_size=(24, 40)).sample)
    assert records.where(0).endswith("00000-of-00002, record 0")
    assert records.where(4).endswith("00001-of-00002, record 2")
    with pytest.raises(IndexError):
        records[5]
    assert records.manifest.num_samples == 5
    assert records.fingerprint == json.loads((folder / "manifest.json").read_text())["fingerprint"]


def test_several_folders_are_one_set(folder, tmp_path):
    other = sample_factory.write_folder(tmp_path / "b", [small(7), small(8)], min_depth=0.5, max_depth=200.0)
    records = open_records(f"{folder}, {other}")
    assert len(records) == 7 and [records[i].sample_id for i in (4, 5, 6)] == ["sample-4", "sample-7", "sample-8"]
    assert str(other) in records.where(5)
    assert records.manifest_of(5).max_depth == 200.0 and records.manifest_of(4).max_depth == 80.0
    merged = records.manifest
    assert (merged.num_samples, merged.min_depth, merged.max_depth) == (7, 0.1, 200.0) and not merged.complete_split
    swapped = open_records([other, folder])
    assert len({records.fingerprint, swapped.fingerprint, open_records(other).fingerprint}) == 3


def test_camera_subset_in_the_order_asked_for(folder):
    records = open_records(folder, cameras=("BACK", "FRONT_LEFT"))
    whole, part = open_records(folder)[1], records[1]
    assert records.cameras == part.camera_names == ["BACK", "FRONT_LEFT"]
    for name in ("intrinsics", "cam_to_ego", "ego_to_global", "camera_timestamps_us", "image_size", "native_size"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[[3, 1]])
    assert part.images == [whole.images[3], whole.images[1]]
    np.testing.assert_array_equal(part.points[0], whole.points[3])
    part.validate()


def test_a_camera_that_one_sample_lacks_keeps_its_place(tmp_path):
    three = small(1, cameras=3)
    second = small(2, cameras=3)
    per_camera = [name for name, feature in schema.FEATURES.items() if feature.shape[:1] == ("N",)]
    names = [name for name in per_camera if hasattr(second, name)] + ["points", "extra_points"]
    lacking = dataclasses.replace(second, **{name: getattr(second, name)[:2] for name in names})
    sample = open_records(sample_factory.write_folder(tmp_path / "r", [three, lacking], shards=1))[1]
    assert sample.camera_names == three.camera_names
    assert sample.images[2] == b"" and len(sample.points[2]) == 0
    geometry.check_intrinsics(sample.intrinsics, "absent")
    geometry.check_rigid(sample.cam_to_ego, "absent")
    with pytest.raises(DataError, match=r"record 1: has none of the cameras \['BACK_RIGHT'\]"):
        open_records(tmp_path / "r", cameras=["BACK_RIGHT"])[1]


def test_rigs_that_differ_need_the_cameras_named(folder, tmp_path):
    other = sample_factory.write_folder(tmp_path / "three", [small(1, cameras=3)], shards=1)
    with pytest.raises(ConfigError, match=r"differ.*data\.cameras"):
        open_records([folder, other])
    both = open_records([folder, other], cameras=("FRONT", "BACK_LEFT"))
    assert [both[i].camera_names for i in (0, 5)] == [["FRONT", "BACK_LEFT"]] * 2


def test_unknown_camera_suggests_the_nearest(folder):
    with pytest.raises(ConfigError, match=r"no camera 'FRONT_LEFTT'.*did you mean 'FRONT_LEFT'\?"):
        open_records(folder, cameras=["FRONT_LEFTT"])
    with pytest.raises(ConfigError, match="twice"):
        open_records(folder, cameras=["BACK", "BACK"])


def test_missing_and_unfinished_folders_say_what_to_run(tmp_path):
    command = "python -m data_prep.nuscenes --dataroot D --out R"
    with pytest.raises(DataError, match=r"nowhere: no such records folder; make it with\n  python -m data_prep"):
        open_records(tmp_path / "nowhere", prepare=command)
    with pytest.raises(DataError, match="no such records folder; make it with data_prep"):
        open_records(tmp_path / "nowhere")
    (tmp_path / "half").mkdir()
    with pytest.raises(DataError, match=r"half: has no manifest.json.*did not finish.*again(.|\n)*--dataroot D"):
        open_records(tmp_path / "half", prepare=command)
    for empty in ("", " , ", []):
        with pytest.raises(ConfigError, match=r"data\.train_records"):
            open_records(empty)


def copy_folder(folder, target, **changes):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    entries = json.loads((target / "manifest.json").read_text()) | changes
    (target / "manifest.json").write_text(json.dumps(entries))
    return target


def test_a_manifest_that_does_not_fit_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"format version 99.*reads version 2.*convert the dataset again"):
        open_records(copy_folder(folder, tmp_path / "version", format_version=99))
    with pytest.raises(DataError, match=r"format version 1, .*reads version 2.*convert the dataset again"):
        open_records(copy_folder(folder, tmp_path / "old", format_version=1))
    with pytest.raises(DataError, match=r"holds 5 records, but manifest\.json says 6"):
        open_records(copy_folder(folder, tmp_path / "count", num_samples=6))
    with pytest.raises(DataError, match="holds no samples"):
        open_records(copy_folder(folder, tmp_path / "none", num_samples=0, shards=[]))
    broken = copy_folder(folder, tmp_path / "broken")
    (broken / "manifest.json").write_text('{"format_version": 1, ')
    with pytest.raises(DataError, match=r"broken/manifest\.json: cannot be read as JSON"):
        open_records(broken)
    (broken / "manifest.json").write_text('{"format_version": 2}')
    with pytest.raises(DataError, match=r"entries \['cameras', .*are missing"):
        open_records(broken)
    (broken / "manifest.json").write_text("[1]")
    with pytest.raises(DataError, match="expected a JSON object, got list"):
        open_records(broken)


def test_missing_truncated_and_replaced_shards_are_refused(folder, tmp_path):
    missing = copy_folder(folder, tmp_path / "missing")
    shard_of(missing, 1).unlink()
    with pytest.raises(DataError, match=r"00001-of-00002: missing, but manifest\.json lists it"):
        open_records(missing)
    short = copy_folder(folder, tmp_path / "short")
    data = shard_of(short, 0).read_bytes()
    shard_of(short, 0).write_bytes(data[:-10])
    with pytest.raises(DataError, match=rf"00000-of-00002: has {len(data) - 10} bytes, but .* {len(data)}; it was cut"):
        open_records(short)


def test_stale_index_is_refused_and_an_absent_one_rebuilt(folder, tmp_path):
    copy = copy_folder(folder, tmp_path / "index")
    first, second = (tfrecord.index_path(shard_of(copy, k)) for k in (0, 1))
    second.unlink()
    assert open_records(copy)[4].sample_id == "sample-4"
    other = sample_factory.write_folder(tmp_path / "other", [small(1)], shards=1)
    first.write_bytes(tfrecord.index_path(shard_of(other, 0)).read_bytes())
    with pytest.raises(DataError, match=r"stale index.*delete .*\.index"):
        open_records(copy)


def test_bit_flip_names_file_and_record(folder, tmp_path):
    copy = copy_folder(folder, tmp_path / "flip")
    path = shard_of(copy, 1)
    data = bytearray(path.read_bytes())
    data[tfrecord.load_index(path)[1].item() + 500] ^= 4
    path.write_bytes(bytes(data))
    records = open_records(copy)
    assert records[2].sample_id == "sample-2"
    with pytest.raises(DataError, match=r"00001-of-00002, record 1: damaged data \(CRC mismatch\)"):
        records[3]


def test_foreign_bytes_with_a_good_checksum_are_not_a_sample(folder, tmp_path):
    copy = copy_folder(folder, tmp_path / "foreign")
    path = shard_of(copy, 0)
    tfrecord.write_records(path, [b"\xff\xff\xff not a tf.Example", b""])
    entries = json.loads((copy / "manifest.json").read_text())
    entries["shards"][0]["num_bytes"] = path.stat().st_size
    (copy / "manifest.json").write_text(json.dumps(entries))
    records = open_records(copy)
    with pytest.raises(DataError, match=r"00000-of-00002, record 0: not a tf\.Example"):
        records[0]
    with pytest.raises(DataError, match=r"record 1: entries .*are missing"):
        records[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": [{}]}, {"shards": [1]}, {"shards": {}}, {"num_samples": "5"}, {"num_samples": -1}, {"cameras": "ab"},
        {"cameras": [1]}, {"scenes": None}, {"complete_split": 1}, {"point_rule": "floor"}, {"image_size": [3]},
        {"image_size": "native"}, {"min_depth": "near"}, {"max_depth": None}, {"focal_by_width": [0.5]},
        {"options": []}, {"skipped": ["x"]}, {"statistics": 3}, {"fingerprint": None}, {"split": 7}, {"sweeps": True},
    ],
)  # fmt: skip
def test_manifest_entries_of_a_wrong_type_are_named(folder, tmp_path, changes):
    (name,) = changes
    with pytest.raises(DataError, match=rf"r/manifest\.json: damaged manifest: {name} cannot be .*; convert"):
        open_records(copy_folder(folder, tmp_path / "r", **changes))


def test_shared_scenes_are_those_of_one_dataset(folder, tmp_path):
    first = open_records(folder)
    same = open_records(copy_folder(folder, tmp_path / "a", scenes=["scene-1", "new", "scene-0"]))
    other = open_records(copy_folder(folder, tmp_path / "b", dataset="other"))
    assert shared_scenes(first, same) == ["scene-0", "scene-1"] and shared_scenes(first, other) == []
    assert shared_scenes(first, open_records([tmp_path / "b", tmp_path / "a"])) == ["scene-0", "scene-1"]
