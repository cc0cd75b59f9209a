"""The record format: round trip, the same through TFDS, and every way a record can be wrong."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import manifest
from fsmde_jax.data import dense, schema
from fsmde_jax.errors import DataError


def make_sample(seed=0, points=(5, 3), extra=(0, 2)):
    """A rig of two cameras with random contents."""
    rng = np.random.default_rng(seed)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (8, 16, 3)).astype(np.uint8)).save(out, "PNG")
    k = np.array([[10.0, 0, 7.5], [0, 10, 3.5], [0, 0, 1]], np.float32)
    poses = np.tile(np.eye(4, dtype=np.float32), (2, 1, 1))
    poses[1, :3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]

    def cloud(count):
        return np.stack([rng.uniform(0, 31, count), rng.uniform(0, 15, count), rng.uniform(1, 60, count)], 1).astype(
            np.float32
        )

    return schema.RigSample(
        sample_id=f"s{seed}",
        scene="drive",
        timestamp_us=1_532_402_927_647_951,
        camera_names=["left", "right"],
        images=[out.getvalue(), b"\0\xff"],
        image_size=np.array([[8, 16], [8, 16]]),
        native_size=np.array([[16, 32], [16, 32]]),
        intrinsics=np.stack([k, k]),
        cam_to_ego=poses,
        ego_to_global=poses.copy(),
        global_origin=np.array([411, -1180, 0]),
        camera_timestamps_us=np.array([1, -5]),
        points=[cloud(n) for n in points],
        extra_points=[cloud(n) for n in extra],
        ego_masks=[b"", b"\x89PNG"],
        dense_depth=[dense.encode(rng.uniform(1, 90, (8, 16))), b""],
    )


def assert_equal(a, b):
    for field in dataclasses.fields(schema.RigSample):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name in ("points", "extra_points"):
            assert len(x) == len(y)
            for p, q in zip(x, y, strict=True):
                np.testing.assert_array_equal(p, q)
        else:
            np.testing.assert_array_equal(x, y, err_msg=field.name)


@pytest.mark.parametrize("points", [(5, 3), (0, 3), (3, 0), (0, 0), (3000, 1)])
def test_round_trip(points):
    sample = make_sample(points=points)
    data = schema.encode(sample)
    assert data == schema.encode(make_sample(points=points))
    assert_equal(schema.decode(data), sample)


def test_tfds_decodes_the_same_arrays(tmp_path):
    """TensorFlow Datasets' own decoder (it needs no TensorFlow), from the features.json that a conversion writes."""
    from tensorflow_datasets.core import features as tfds_features

    (tmp_path / "features.json").write_bytes(manifest._json(manifest._tfds_features()))
    features = tfds_features.FeaturesDict.from_config(str(tmp_path))
    sample = make_sample()
    got = features.deserialize_example_np(schema.encode(sample))
    assert set(got) == set(schema.FEATURES)
    assert got["sample_id"] == b"s0" and list(got["images"]) == sample.images
    assert [bytes(n) for n in got["camera_names"]] == [b"left", b"right"]
    for name in (
        "image_size",
        "native_size",
        "intrinsics",
        "cam_to_ego",
        "ego_to_global",
        "global_origin",
        "camera_timestamps_us",
    ):
        np.testing.assert_array_equal(got[name], getattr(sample, name), err_msg=name)
        assert got[name].dtype == schema.FEATURES[name].kind
    assert int(got["timestamp_us"]) == sample.timestamp_us
    np.testing.assert_array_equal(got["points_uvz"], np.concatenate(sample.points))
    np.testing.assert_array_equal(got["points_per_camera"], [5, 3])
    np.testing.assert_array_equal(got["extra_points_uvz"], np.concatenate(sample.extra_points))


def test_native_intrinsics():
    np.testing.assert_allclose(make_sample().native_intrinsics[0], [[20, 0, 15.5], [0, 20, 7.5], [0, 0, 1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"camera_names": ["left", "left"]}, "camera names repeat"),
        ({"camera_names": []}, "at least one camera"),
        ({"images": [b""]}, "images has 1 entries"),
        ({"intrinsics": np.zeros((2, 3, 3))}, "camera left, intrinsics: singular"),
        ({"cam_to_ego": np.stack([np.eye(4), np.diag([1, 1, -1, 1])])}, "camera right, cam_to_ego: not a rigid"),
        ({"ego_to_global": np.full((2, 4, 4), np.nan)}, "not finite"),
        ({"global_origin": np.zeros(2)}, "global_origin has shape"),
        ({"native_size": np.zeros((2, 2), int)}, "must be positive"),
        ({"points": [np.array([[1, 1, np.nan]], np.float32), np.zeros((0, 3), np.float32)]}, "points must be finite"),
        ({"points": [np.array([[32.0, 1, 5]], np.float32), np.zeros((0, 3), np.float32)]}, "1 points lie outside"),
        ({"points": [np.array([[3.0, 1, -5]], np.float32), np.zeros((0, 3), np.float32)]}, "1 points lie outside"),
    ],
)
def test_wrong_samples_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        schema.encode(dataclasses.replace(make_sample(), **change))


def test_wrong_bytes_are_refused():
    with pytest.raises(DataError, match=r"shard 3, record 7: not a tf.Example"):
        schema.decode(b"\xff\xff\xff\xff", "shard 3, record 7")
    with pytest.raises(DataError, match=r"entries .*cam_to_ego.* are missing"):
        schema.decode(b"")
    example = schema.tf_example_pb2.Example()
    example.ParseFromString(schema.encode(make_sample()))
    example.features.feature["intrinsics"].float_list.value.pop()
    with pytest.raises(DataError, match="intrinsics has 17 numbers"):
        schema.decode(example.SerializeToString())
    example.ParseFromString(schema.encode(make_sample()))
    example.features.feature["points_per_camera"].int64_list.value[0] = 4
    with pytest.raises(DataError, match="sums to 7, but there are 8"):
        schema.decode(example.SerializeToString())


def test_features_json_is_valid_json_with_every_entry():
    content = json.loads(manifest._json(manifest._tfds_features()))
    assert set(content["featuresDict"]["features"]) == set(schema.FEATURES)


def test_documentation_lists_every_entry():
    """docs/data_format.md holds the table of `FEATURES`, word for word."""
    text = (Path(__file__).parents[1] / "docs" / "data_format.md").read_text()
    for name, feature in schema.FEATURES.items():
        shape = ", ".join(map(str, feature.shape))
        assert f"| `{name}` | {feature.kind} | [{shape}] | {feature.doc} |" in text, name
