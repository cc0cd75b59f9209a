"""Input sizes and normalisation of the teacher against transformers' processor and PyTorch's bicubic."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax.errors import ConfigError
from fsmde_jax.models import teacher_images

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def _reference(image):
    """The processor of transformers' Depth Anything checkpoints; [H, W, 3] -> [h, w, 3]."""
    processor = _dpt().DPTImageProcessorPil(
        size={"height": 518, "width": 518}, keep_aspect_ratio=True, ensure_multiple_of=14,
        image_mean=MEAN.tolist(), image_std=STD.tolist(),
    )  # fmt: skip
    return processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)


def _dpt():
    return pytest.importorskip("transformers.models.dpt.image_processing_pil_dpt")


def _smooth(height, width):
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(9 * x + 4 * y), np.cos(7 * y), np.sin(5 * x * y + 1)]
    return np.round(127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)


@pytest.mark.parametrize("size", [518, 266])
@pytest.mark.parametrize(
    "image_size", [(900, 1600), (1216, 1936), (518, 518), (600, 700), (2000, 523), (519, 1037), (1080, 1920)]
)
def test_size_is_that_of_transformers_where_no_side_is_too_small(image_size, size):
    image = np.broadcast_to(np.uint8(0), (3, *image_size))
    expected = _dpt().get_resize_output_image_size(image, (size, size), keep_aspect_ratio=True, multiple=14)
    assert teacher_images.reference_size(image_size, size) == (expected.height, expected.width)
    assert min(expected.height, expected.width) == size


@pytest.mark.parametrize(
    "image_size,size,expected",
    [
        # Worked out by hand from the official rule (the shorter side becomes `size`, the other never falls below it).
        ((400, 600), 518, (518, 784)),  # 777 = 55.5 patches: the tie goes to 56
        ((375, 1242), 518, (518, 1722)),  # 1715.6 = 122.5 patches
        ((256, 320), 518, (518, 644)),  # 647.5 = 46.25
        ((900, 1600), 500, (504, 882)),  # 35.7 and 63.49 patches
        ((900, 1600), 510, (518, 910)),  # 36.4 would fall below 510: 37; 906.7 = 64.8
        ((100, 100), 14, (14, 14)),
        ((1, 1), 518, (518, 518)),
    ],
)
def test_size_of_small_images_and_of_other_sizes(image_size, size, expected):
    assert teacher_images.reference_size(image_size, size) == expected


def test_normalisation_is_that_of_transformers():
    """An image that needs no resizing."""
    image = np.random.default_rng(0).integers(0, 256, (518, 532, 3), np.uint8)
    found = teacher_images.prepare_image(image)
    assert found.dtype == np.float32 and found.shape == (518, 532, 3)
    np.testing.assert_allclose(found, _reference(image), atol=2e-6)


@pytest.mark.parametrize("image_size", [(900, 1600), (560, 600)])
def test_resized_pictures_are_near_those_of_transformers(image_size):
    """Interpolators differ (see `prepare_image`), and transformers rounds to uint8: one level is .0175."""
    difference = np.abs(teacher_images.prepare_image(_smooth(*image_size)) - _reference(_smooth(*image_size)))
    assert difference.mean() < 0.005 and difference.max() < 0.025


@pytest.mark.parametrize("image_size", [(620, 940), (300, 420), (700, 560)])
def test_resizing_is_pytorchs_bicubic_before_normalisation(image_size):
    """OpenCV's INTER_CUBIC is a = -.75 without antialias, as PyTorch's; computed here in float64."""
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(1).integers(0, 256, (*image_size, 3), np.uint8)
    found = teacher_images.prepare_image(image)
    planes = torch.from_numpy(image / 255.0).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(planes, found.shape[:2], mode="bicubic", align_corners=False)
    np.testing.assert_allclose(found, (resized[0].permute(1, 2, 0).numpy() - MEAN) / STD, atol=5e-5)
    assert found.min() < -MEAN[2] / STD[2]  # overshoot is kept


def test_prepare_image_refuses_what_is_no_picture():
    for image in (np.zeros((20, 30), np.uint8), np.zeros((20, 30, 4), np.uint8), np.zeros((20, 30, 3), np.float32)):
        with pytest.raises(ValueError, match="uint8"):
            teacher_images.prepare_image(image)
    with pytest.raises(ConfigError, match="at least 14"):
        teacher_images.prepare_image(np.zeros((20, 30, 3), np.uint8), size=13)
    with pytest.raises(ValueError, match="positive"):
        teacher_images.prepare_image(np.zeros((0, 30, 3), np.uint8))


@pytest.mark.parametrize(
    "image_size,longer,expected",
    [
        ((900, 1600), 630, (350, 630)),
        ((352, 640), 630, (350, 630)),
        ((1600, 900), 630, (630, 350)),
        ((384, 640), 518, (308, 518)),
        ((96, 160), 84, (56, 84)),
        ((56, 84), 84, (56, 84)),
        ((64, 64), 100, (98, 98)),
        ((10, 1000), 140, (14, 140)),
    ],
)
def test_teacher_size_keeps_the_aspect(image_size, longer, expected):
    assert teacher_images.teacher_size(image_size, longer) == expected


def test_teacher_size_is_the_best_of_all():
    """No other multiple of 14 is nearer on the longer side, and none nearer in aspect on the shorter."""
    rng = np.random.default_rng(0)
    multiples = 14 * np.arange(1, 200)
    for _ in range(200):
        h, w = (int(v) for v in rng.integers(60, 1500, 2))
        longer = int(rng.integers(100, 1200))
        size = teacher_images.teacher_size((h, w), longer)
        least, most = sorted(size)
        assert abs(most - longer) == np.abs(multiples - longer).min()
        ratio = min(h, w) / max(h, w)
        assert abs(least / most - ratio) <= np.abs(multiples / most - ratio).min() + 1e-12
        assert (size[0] <= size[1]) == (h <= w) or least == most
    with pytest.raises(ConfigError, match="longer side"):
        teacher_images.teacher_size((100, 100), 5)
    with pytest.raises(ValueError, match="positive"):
        teacher_images.teacher_size((0, 100), 140)


@pytest.mark.parametrize("dtype,atol", [(jnp.float32, 5e-5), (jnp.bfloat16, 0.02)])
def test_resize_for_teacher_inside_jit(dtype, atol):
    """Bicubic near the same size and upwards, area weights from half the size on, axis by axis (OpenCV's)."""
    images = np.random.default_rng(2).normal(size=(2, 2, 48, 100, 3)).astype(np.float32)
    images = jnp.asarray(images, dtype)
    exact = np.asarray(images.astype(jnp.float32))
    for size, filters in {
        (42, 98): (cv2.INTER_CUBIC, cv2.INTER_CUBIC),
        (56, 42): (cv2.INTER_CUBIC, cv2.INTER_AREA),
        (14, 28): (cv2.INTER_AREA, cv2.INTER_AREA),
    }.items():
        found = jax.jit(lambda x, size=size: teacher_images.resize_for_teacher(x, *size))(images)
        assert found.dtype == dtype and found.shape == (2, 2, *size, 3)
        for view in np.ndindex(2, 2):
            rows = cv2.resize(exact[view], (100, size[0]), interpolation=filters[0])
            expected = cv2.resize(rows, size[::-1], interpolation=filters[1])
            np.testing.assert_allclose(np.asarray(found.astype(jnp.float32))[view], expected, atol=atol)


def test_resize_for_teacher_leaves_the_right_size_alone_and_refuses_wrong_ones():
    images = jnp.asarray(np.random.default_rng(3).normal(size=(1, 2, 28, 42, 3)), jnp.float32)
    np.testing.assert_array_equal(teacher_images.resize_for_teacher(images, 28, 42), images)
    for size in ((28, 43), (0, 42), (27, 42)):
        with pytest.raises(ConfigError, match="multiples of 14"):
            teacher_images.resize_for_teacher(images, *size)
    with pytest.raises(ValueError, match="expected"):
        teacher_images.resize_for_teacher(images[0], 28, 42)
