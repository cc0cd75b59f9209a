"""Colours and the panorama: right places, right colours, any number of cameras."""

import numpy as np
import pytest

from fsmde_jax.viz import colour, panorama

RING = np.radians(
    [0.0, 55.0, 110.0, 180.0, -110.0, -55.0]
)  # front, front left, back left, back, back right, front right


def test_six_cameras_stand_where_people_expect_them_and_neighbours_touch():
    assert panorama.arrange(RING) == [[1, 0, 5], [4, 3, 2]]
    assert panorama.arrange(np.radians([0.5, 55, 108, -179.9, -110, -56])) == [
        [1, 0, 5],
        [4, 3, 2],
    ]  # either side of 180
    order = [3, 5, 0, 2, 4, 1]  # another order of the arrays gives the same picture
    rows = panorama.arrange(RING[order])
    assert [[order[i] for i in row] for row in rows] == [[1, 0, 5], [4, 3, 2]]


@pytest.mark.parametrize(
    ("yaw", "rows"),
    [
        ([10], [[0]]),
        ([0, 120, -120], [[1, 0, 2]]),
        ([-30, 30], [[1, 0]]),
        ([0, 72, 144, -144, -72], [[1, 0, 4], [3, 2]]),
    ],
)
def test_any_number_of_cameras(yaw, rows):
    assert panorama.arrange(np.radians(yaw)) == rows


@pytest.mark.parametrize("count", range(1, 13))
def test_every_camera_once(count):
    rows = panorama.arrange(np.random.default_rng(count).uniform(-np.pi, np.pi, count))
    assert sorted(i for row in rows for i in row) == list(range(count))


def test_log_scale_and_its_limits():
    found = colour.position(np.array([1.0, 10.0, 100.0, 0.5, 500.0, 0.0, np.nan, np.inf]), 1.0, 100.0)
    np.testing.assert_allclose(found, [0, 0.5, 1, 0, 1, 0, 0, 0])
    np.testing.assert_allclose(colour.position(np.array([1.0, 50.5, 100.0]), 1.0, 100.0, log=False), [0, 0.5, 1])
    with pytest.raises(ValueError, match="low < high"):
        colour.position(np.ones(1), 5.0, 5.0)


def test_near_is_warm_far_is_cold_and_nothing_is_black():
    near, middle, far, none, broken = colour.colour_depth(np.array([1.0, 9.0, 80.0, 0.0, np.nan]), 1.0, 80.0).astype(
        int
    )
    assert near[0] > near[2] + 80 and far[2] > far[0] + 50 and middle[1] > max(middle[0], middle[2])
    assert none.tolist() == broken.tolist() == [0, 0, 0]
    small, large = colour.colour_error(np.array([0.0, 2.0]), 0.5).astype(int)
    assert small[2] > small[0] and large[0] > large[2]


@pytest.mark.parametrize(("low", "high"), [(1.0, 80.0), (1.0, 200.0), (0.1, 10.0), (1.0, 3.0)])
def test_ticks_span_the_scale_without_crowding(low, high):
    ticks = colour.depth_ticks(low, high)
    assert ticks[0] == low and ticks[-1] == high
    assert np.all(np.diff(colour.position(np.array(ticks), low, high)) > 0.07)


def _rig(count, height=24, width=40, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, height, width, 3), np.uint8)
    pred = np.exp(rng.uniform(0, 4, (count, height, width))).astype(np.float32)
    depth = np.where(rng.random(pred.shape) < 0.1, pred * 1.1, 0).astype(np.float32)
    return images, pred, depth, [f"CAM_{i}" for i in range(count)], 2 * np.pi * np.arange(count) / count


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 8])
def test_panorama_of_any_rig(count):
    picture = panorama.panorama(*_rig(count), max_depth=80.0, title="a title")
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    assert picture.shape[0] < 4000 and picture.shape[1] < 4000
    without = panorama.panorama(*_rig(count)[:2], None, *_rig(count)[3:], max_depth=80.0)
    assert without.shape[0] * without.shape[1] < picture.shape[0] * picture.shape[1]
    if count in (5, 6):  # two rows of three: depth below the images, not beside them
        assert without.shape[1] < 0.6 * picture.shape[1] and without.shape[0] > 0.9 * picture.shape[0]


def test_prediction_is_drawn_in_its_cell_with_the_scale_s_colour():
    """Each camera predicts its own constant; the centre of its cell shows that depth's colour."""
    images, _, depth, names, _ = _rig(6)
    depths = np.array([2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    pred = np.broadcast_to(depths[:, None, None], images.shape[:3]).astype(np.float32)
    picture = panorama.panorama(images, pred, depth, names, RING, max_depth=80.0, cell_width=100)
    block = 3 * (100 + panorama._GAP) - panorama._GAP
    for r, row in enumerate([[1, 0, 5], [4, 3, 2]]):
        for c, camera in enumerate(row):
            y = panorama._MARGIN + 24 + r * (60 + panorama._GAP) + 40
            x = panorama._MARGIN + block + panorama._BLOCK_GAP + c * (100 + panorama._GAP) + 50
            expected = colour.colour_depth(depths[camera : camera + 1], 1.0, 80.0)[0]
            np.testing.assert_array_equal(picture[y, x], expected)


def test_shapes_are_checked():
    images, pred, depth, names, yaw = _rig(3)
    with pytest.raises(ValueError, match="disagree"):
        panorama.panorama(images[:2], pred, depth, names, yaw)
    with pytest.raises(ValueError, match="disagree"):
        panorama.panorama(images, pred, depth[:, :-1], names, yaw)
