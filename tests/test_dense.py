"""Dense depth from a record to a batch: values, sizes, and agreement with the sparse labels after any augmentation."""

import dataclasses

import cv2
import numpy as np
import pytest

from fsmde_jax.data import augment, dense, pipeline, transforms
from fsmde_jax.data.augment import AugmentOptions, Draw
from fsmde_jax.data.records import open_records
from fsmde_jax.errors import ConfigError, DataError
from tests import rooms, sample_factory
from tests.test_transforms import CHOICES, project_by_hand

SIZE = (48, 96)


def load(sample, choice=None, size=SIZE, **options):
    batch = transforms.empty_batch(1, sample.num_cameras, size, dense_depth=True)
    arrays = {name: array[0] for name, array in batch.items() if name != "record_index"}
    transforms.load_rig(sample, arrays, choice=choice, **options)
    return arrays


def test_values_are_metres_times_256_and_nothing_else_is_depth():
    depth = np.array([[0.0, 0.001, 0.002, 1.0, 2.5], [255.99, 256.5, np.inf, np.nan, 80.00196]])
    units = cv2.imdecode(np.frombuffer(dense.encode(depth), np.uint8), cv2.IMREAD_UNCHANGED)
    assert units.dtype == np.uint16
    assert units.tolist() == [[0, 0, 1, 256, 640], [65533, 0, 0, 0, 20481]]  # 80.00196 * 256 = 20480.5018
    np.testing.assert_array_equal(dense.decode(dense.encode(depth), (2, 5), "x"), units / 256.0)
    assert dense.encode(depth) == dense.encode(depth.copy())


def test_damaged_planes_name_the_place():
    good = dense.encode(np.full((4, 6), 3.0))
    eight_bit = cv2.imencode(".png", np.zeros((4, 6), np.uint8))[1].tobytes()
    colour = cv2.imencode(".png", np.zeros((4, 6, 3), np.uint16))[1].tobytes()
    for data, words in (
        (b"", "cannot be decoded"),
        (good[: len(good) // 2], "cannot be decoded"),
        (eight_bit, "uint8"),
        (colour, r"\(4, 6, 3\)"),
        (dense.encode(np.ones((4, 5))), "4x5, expected 4x6"),
    ):
        with pytest.raises(DataError, match=rf"record 3: the dense depth .*{words}"):
            dense.decode_units(data, (4, 6), "record 3")


@pytest.mark.parametrize(("count", "old"), [(5, 5), (4, 12), (352, 900), (640, 1600), (7, 3), (12, 4), (1, 9)])
def test_nearest_pixel_is_the_one_that_holds_the_centre(count, old):
    from fractions import Fraction

    expected = [int((Fraction(2 * i + 1, 2 * count) * old) // 1) for i in range(count)]
    assert dense.nearest_pixels(count, old).tolist() == expected
    assert expected[0] >= 0 and expected[-1] < old


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
@pytest.mark.parametrize("stored", [None, (60, 100), (48, 96)], ids=["native", "stored", "network"])
def test_every_pixel_holds_the_depth_of_the_stored_pixel_under_its_centre(choice, stored):
    """Each pixel's centre, taken back to the stored image by the final calibration, lands in the pixel it came from."""
    sample = rooms.make(3, image_size=stored)
    arrays = load(sample, choice)
    size = tuple(sample.image_size[0])
    for camera in range(6):
        k = arrays["intrinsics"][camera].astype(float)
        rays = np.concatenate([rooms.pixels_of(SIZE), np.ones((SIZE[0] * SIZE[1], 1))], 1) @ np.linalg.inv(k).T
        if choice.flip:
            rays[:, 0] *= -1
        u, v = ((rays / rays[:, 2:]) @ sample.intrinsics[camera].astype(float).T)[:, :2].T
        plane = np.round(rooms.plane(sample, camera) * 256) / 256
        found = arrays["dense_depth"][camera].ravel()
        certain = (np.abs(u % 1 - 0.5) > 1e-3) & (np.abs(v % 1 - 0.5) > 1e-3)  # not on an edge between two pixels
        rows, cols = np.rint(v).astype(int), np.rint(u).astype(int)
        assert certain.mean() > 0.3 and rows[certain].max() < size[0] and cols[certain].max() < size[1]
        np.testing.assert_array_equal(found[certain], plane[rows, cols][certain].astype(np.float32))
        near = [np.abs(plane[np.clip(rows + i, 0, size[0] - 1), np.clip(cols + j, 0, size[1] - 1)] - found)
                for i in (-1, 0, 1) for j in (-1, 0, 1)]  # fmt: skip
        assert np.min(near, 0).max() < 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_dense_and_sparse_labels_agree_after_any_augmentation(seed):
    """The dense depth at a labelled pixel is the depth of the room within two pixels of the LiDAR point."""
    rng = np.random.default_rng(seed)
    options = AugmentOptions(flip=0.5, scale=(1.0, 1.6))
    choice = augment.draw(options, 6, rng)
    sample = rooms.make(seed, image_size=(72, 128), points=500)
    arrays = load(sample, choice)
    labelled = arrays["depth"] > 0
    labelled[:, [0, 1, -2, -1]] = labelled[:, :, [0, 1, -2, -1]] = (
        False  # a point may lie outside the outermost centres
    )
    assert labelled.sum() > 800 and (arrays["dense_depth"] > 0).all()
    bounds = []
    for depth in arrays["dense_depth"]:  # the room's own range around each pixel
        window = np.ones((5, 5))
        bounds.append((cv2.erode(depth, window), cv2.dilate(depth, window)))
    low, high = np.array(bounds).swapaxes(0, 1)
    sparse = arrays["depth"][labelled]
    inside = (sparse >= low[labelled] * 0.997 - 0.01) & (sparse <= high[labelled] * 1.003 + 0.01)
    assert inside.mean() > 0.995
    relative = np.abs(arrays["dense_depth"][labelled] - sparse) / sparse
    assert np.median(relative) < 0.012
    mirrored = np.abs(arrays["dense_depth"][..., ::-1][labelled] - sparse) / sparse  # what a forgotten flip would give
    assert np.median(mirrored) > 5 * np.median(relative)


def test_dense_depth_lifts_to_the_walls_of_the_room():
    """Unprojected by the final calibration, the pixels lie on the walls (mirrored for a mirrored rig)."""
    choice = Draw(flip=True, scale=1.2, offset=(0.3, 0.6))
    sample = rooms.make(7, native_size=(180, 320))
    arrays = load(sample, choice, size=(90, 160))
    low, high = rooms.LOW.copy(), rooms.HIGH.copy()
    low[1], high[1] = -rooms.HIGH[1], -rooms.LOW[1]
    for camera in range(6):
        pose, k = arrays["cam_to_ego"][camera].astype(float), arrays["intrinsics"][camera].astype(float)
        uv = rooms.pixels_of((90, 160))
        rays = np.concatenate([uv, np.ones((len(uv), 1))], 1) @ np.linalg.inv(k).T
        points = rays * arrays["dense_depth"][camera].reshape(-1, 1) @ pose[:3, :3].T + pose[:3, 3]
        to_wall = np.minimum(np.abs(points - low), np.abs(points - high)).min(1)
        assert np.quantile(to_wall, 0.95) < 0.08 and np.median(to_wall) < 0.03
        back = project_by_hand(points, arrays, camera)
        np.testing.assert_allclose(back[:, :2], uv[: len(back)], atol=1e-2)


def test_sky_and_absent_cameras_have_no_depth():
    sample = rooms.make(1, cameras=3, sky_rows=30)
    sample = dataclasses.replace(sample, images=[sample.images[0], b"", sample.images[2]])
    found = load(sample)["dense_depth"]
    assert not found[1].any()
    expected = (np.arange(SIZE[0]) + 0.5) * 90 / SIZE[0] >= 30
    for camera in (0, 2):
        np.testing.assert_array_equal((found[camera] > 0).all(1), expected)
        np.testing.assert_array_equal((found[camera] > 0).any(1), expected)


def test_batches_hold_dense_depth_only_when_asked(tmp_path):
    samples = [rooms.make(seed, cameras=3, image_size=(60, 100)) for seed in range(4)]
    records = open_records(sample_factory.write_folder(tmp_path / "dense", samples))
    assert records.manifest.dense_depth
    options = {"image_size": SIZE, "batch_size": 2, "seed": 5, "augment": AugmentOptions(), "num_threads": 0}
    plain = next(iter(pipeline.train_dataset(records, **options)))
    exact = next(iter(pipeline.train_dataset(records, **options, dense_depth=True)))
    assert set(exact) - set(plain) == {"dense_depth"}
    for name, values in plain.items():
        np.testing.assert_array_equal(values, exact[name])
    assert exact["dense_depth"].dtype == np.float32 and exact["dense_depth"].shape == exact["depth"].shape
    for row, index in enumerate(exact["record_index"]):
        labelled = exact["depth"][row] > 0
        relative = np.abs(exact["dense_depth"][row] - exact["depth"][row])[labelled] / exact["depth"][row][labelled]
        assert np.median(relative) < 0.02, index


def test_records_without_dense_depth_are_refused_where_it_is_needed(tmp_path):
    with_it = sample_factory.write_folder(tmp_path / "with", [rooms.make(0, cameras=3)])
    without = sample_factory.make_folder(tmp_path / "without", 2, cameras=3)
    for folders in (without, [with_it, without]):
        records = open_records(folders)
        assert not records.manifest.dense_depth
        with pytest.raises(ConfigError, match=r"data.dense_depth = True.*none in .*without.*data_prep.world"):
            pipeline.train_dataset(records, image_size=SIZE, batch_size=1, seed=0, dense_depth=True)
    pipeline.train_dataset(open_records(with_it), image_size=SIZE, batch_size=1, seed=0, dense_depth=True)
