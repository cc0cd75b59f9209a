"""Random choices, colour jitter against plain float arithmetic, and the mirror's own algebra."""

import colorsys
import dataclasses

import numpy as np
import pytest

from fsmde_jax.data import augment, transforms
from fsmde_jax.data.augment import AugmentOptions, draw
from fsmde_jax.errors import ConfigError
from tests import sample_factory


def test_flipping_twice_is_the_identity():
    sample = sample_factory.make_rig(8, masks=True).sample
    batch = transforms.empty_batch(1, sample.num_cameras, (48, 96))
    arrays = {name: array[0] for name, array in batch.items() if name != "record_index"}
    transforms.load_rig(sample, arrays)
    before = {name: array.copy() for name, array in arrays.items()}
    augment.flip_rig(arrays)
    augment.flip_rig(arrays)
    for name, array in arrays.items():
        np.testing.assert_allclose(array, before[name], atol=1e-4, err_msg=name)


def test_camera_names_swap_sides():
    rig = sample_factory.make_rig(9)
    assert augment.flipped_names(rig.sample.camera_names, rig.sample.cam_to_ego) == [
        "FRONT", "FRONT_RIGHT", "BACK_RIGHT", "BACK", "BACK_LEFT", "FRONT_LEFT",
    ]  # fmt: skip
    three = sample_factory.make_rig(9, cameras=3)
    names = augment.flipped_names(three.sample.camera_names, three.sample.cam_to_ego)
    assert names == ["FRONT", "BACK_RIGHT", "BACK_LEFT"]


def reference_jitter(image, brightness, contrast, saturation, hue, mean):
    """Step by step on floats, clipped once at the end; the hue by rotating I and Q with `colorsys`' conversion."""
    x = image.astype(np.float64) * brightness
    x = contrast * x + (1 - contrast) * brightness * mean
    grey = 0.299 * x[..., :1] + 0.587 * x[..., 1:2] + 0.114 * x[..., 2:]
    x = saturation * x + (1 - saturation) * grey
    out = np.empty_like(x)
    for index in np.ndindex(*x.shape[:-1]):
        r, g, b = x[index]
        y = 0.299 * r + 0.587 * g + 0.114 * b
        i, q = 0.595716 * r - 0.274453 * g - 0.321263 * b, 0.211456 * r - 0.522591 * g + 0.311135 * b
        c, s = np.cos(2 * np.pi * hue), np.sin(2 * np.pi * hue)
        i, q = c * i - s * q, s * i + c * q
        out[index] = y + 0.9563 * i + 0.6210 * q, y - 0.2721 * i - 0.6474 * q, y - 1.1070 * i + 1.7046 * q
    return np.clip(np.rint(out), 0, 255)


@pytest.mark.parametrize("per_camera", [False, True])
def test_jitter_equals_plain_float_arithmetic(per_camera):
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (3, 8, 9, 3)).astype(np.uint8)
    colour = np.array([[1.2, 0.85, 1.15, 0.04], [0.8, 1.2, 0.8, -0.05], [1.0, 1.1, 1.0, 0.3]])[: 3 if per_camera else 1]
    luma = images.reshape(3, -1, 3).astype(np.float64).mean(1) @ [0.299, 0.587, 0.114]
    result = images.copy()
    augment.jitter(result, colour)
    for i in range(3):
        expected = reference_jitter(images[i], *colour[i if per_camera else 0], luma[i] if per_camera else luma.mean())
        assert np.abs(result[i] - expected).max() <= 1  # a value at a half may round either way


def test_jitter_of_one_is_the_identity_and_a_hue_turn_keeps_greys():
    images = np.random.default_rng(3).integers(0, 256, (2, 8, 9, 3)).astype(np.uint8)
    same = images.copy()
    augment.jitter(same, np.array([[1.0, 1.0, 1.0, 0.0]]))
    np.testing.assert_array_equal(same, images)
    grey = np.repeat(images[..., :1], 3, -1)
    turned = grey.copy()
    augment.jitter(turned, np.array([[1.0, 1.0, 1.3, 0.25]]))
    assert np.abs(turned.astype(int) - grey).max() <= 1


def test_hue_turn_moves_the_hue_the_right_way():
    """Red goes towards magenta for one sign and towards yellow for the other."""
    red = np.full((1, 2, 2, 3), (200, 60, 60), np.uint8)
    hues = []
    for hue in (-0.05, 0.05):
        image = red.copy()
        augment.jitter(image, np.array([[1, 1, 1, hue]]))
        h = colorsys.rgb_to_hsv(*(image[0, 0, 0] / 255))[0]
        hues.append((h + 0.5) % 1 - 0.5)
    assert abs(hues[0]) > 0.02 and abs(hues[1]) > 0.02 and hues[0] * hues[1] < 0


def test_jitter_leaves_absent_cameras_black():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0] = 120
    augment.jitter(images, np.array([[1.2, 0.5, 1, 0]]), np.array([True, False]))
    assert np.all(images[0] == 144) and np.all(images[1] == 0)  # contrast turns around the only camera's mean


def test_draw_follows_the_options():
    options = AugmentOptions(flip=0.3, scale=(1.1, 1.4), jitter_probability=0.7)
    draws = [draw(options, 6, np.random.default_rng([5, i])) for i in range(2000)]
    assert abs(np.mean([d.flip for d in draws]) - 0.3) < 0.04
    assert abs(np.mean([d.colour is not None for d in draws]) - 0.7) < 0.04
    scales = np.array([d.scale for d in draws])
    assert scales.min() >= 1.1 and scales.max() <= 1.4 and abs(scales.mean() - 1.25) < 0.01
    colour = np.concatenate([d.colour for d in draws if d.colour is not None])
    assert np.all(np.abs(colour - [1, 1, 1, 0]) <= [0.2, 0.2, 0.2, 0.05]) and colour.std(0).min() > 0.02
    each = dataclasses.replace(options, jitter_per_camera=True, jitter_probability=1.0)
    assert draw(each, 6, np.random.default_rng(0)).colour.shape == (6, 4)
    off = draw(augment.NO_AUGMENT, 6, np.random.default_rng(0))
    assert (off.flip, off.scale, off.colour) == (False, 1.0, None)


def test_turning_one_option_off_leaves_the_other_draws_alone():
    full = draw(AugmentOptions(jitter_probability=1.0), 6, np.random.default_rng(9))
    other = draw(AugmentOptions(jitter_probability=1.0, flip=0.0, jitter_per_camera=True), 6, np.random.default_rng(9))
    assert (full.scale, full.offset) == (other.scale, other.offset)
    np.testing.assert_array_equal(full.colour[0], other.colour[0])


@pytest.mark.parametrize(
    "wrong", [{"flip": 1.5}, {"scale": (0.9, 1.1)}, {"scale": (1.2, 1.1)}, {"brightness": -0.1}, {"hue": 0.7}]
)
def test_wrong_options_name_their_key(wrong):
    with pytest.raises(ConfigError, match=f"augment.{next(iter(wrong))}"):
        AugmentOptions(**wrong)
