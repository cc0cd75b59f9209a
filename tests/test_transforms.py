"""Pixels, calibration, masks and labels stay together through decoding, resize, zoom, crop and flip."""

import dataclasses

import cv2
import numpy as np
import pytest

from fsmde_jax import geometry
from fsmde_jax.data import transforms
from fsmde_jax.data.augment import Draw
from fsmde_jax.errors import DataError
from tests import sample_factory

SIZE = (48, 96)  # not the aspect of the 90x160 rigs: x and y scales differ


def load(sample, choice=None, size=SIZE, **options):
    batch = transforms.empty_batch(1, sample.num_cameras, size)
    arrays = {name: array[0] for name, array in batch.items() if name != "record_index"}
    transforms.load_rig(sample, arrays, choice=choice, **options)
    return arrays


def rasterize_by_hand(points, scale, shift, size):
    """One point after another; the nearest of those that share a pixel stays."""
    out = np.zeros(size, np.float64)
    for u, v, z in points.astype(np.float64):
        x = int(np.floor(u * scale[0] + shift[0] + 0.5))
        y = int(np.floor(v * scale[1] + shift[1] + 0.5))
        if 0 <= x < size[1] and 0 <= y < size[0] and (out[y, x] == 0 or z < out[y, x]):
            out[y, x] = z
    return out


def project_by_hand(cloud, arrays, camera):
    """Ego-frame cloud through the arrays' calibration: (u, v, z) of the points in front of the camera."""
    pose = arrays["cam_to_ego"][camera].astype(np.float64)
    local = (cloud - pose[:3, 3]) @ pose[:3, :3]
    local = local[local[:, 2] > 0.1]
    pixels = local @ arrays["intrinsics"][camera].astype(np.float64).T
    return np.concatenate([pixels[:, :2] / local[:, 2:], local[:, 2:]], 1)


def assert_labels_agree(arrays, cloud):
    """Every label is the projection of a point of the cloud, within half a pixel, and no point inside is missing."""
    labels = 0
    for camera, depth in enumerate(arrays["depth"]):
        uvz = project_by_hand(cloud, arrays, camera)
        height, width = depth.shape
        ys, xs = np.nonzero(depth)
        labels += len(ys)
        for y, x in zip(ys, xs, strict=True):
            near = (np.abs(uvz[:, 0] - x) <= 0.51) & (np.abs(uvz[:, 1] - y) <= 0.51)
            assert np.any(near & (np.abs(uvz[:, 2] - depth[y, x]) < 1e-3)), (camera, y, x)
        inner = (uvz[:, 0] > 0) & (uvz[:, 0] < width - 1) & (uvz[:, 1] > 0) & (uvz[:, 1] < height - 1)
        for u, v, z in uvz[inner]:
            y, x = round(v), round(u)
            window = depth[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            assert np.any((window > 0) & (window <= z + 1e-3)), (camera, u, v, z)
    assert labels > 50


CHOICES = {
    "whole": Draw(),
    "zoom": Draw(scale=1.31, offset=(0.4, 0.7)),
    "flip": Draw(flip=True),
    "zoom and flip": Draw(flip=True, scale=1.15, offset=(0.99, 0.01)),
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
@pytest.mark.parametrize("stored", [None, (60, 100), (48, 96)], ids=["native", "stored", "network"])
def test_labels_land_where_the_final_calibration_projects_the_points(choice, stored):
    rig = sample_factory.make_rig(3, image_size=stored, num_points=500)
    arrays = load(rig.sample, choice)
    cloud = rig.cloud
    if choice.flip:  # the mirrored rig drives through the mirrored world
        cloud = cloud * [1, -1, 1]
    assert_labels_agree(arrays, cloud)


def test_labels_of_a_jpeg_that_is_shrunk_while_decoding():
    rig = sample_factory.make_rig(4, native_size=(192, 384), image_format=".jpg", num_points=500)
    choice = Draw(scale=1.1, offset=(0.3, 0.6))
    assert transforms.decode_step(rig.sample.images[0], (192, 384), 1.1, SIZE) == 2
    assert transforms.decode_step(rig.sample.images[0], (192, 384), 1.0, SIZE) == 4
    for option in (choice, Draw()):
        assert_labels_agree(load(rig.sample, option), rig.cloud)


def test_decode_step_only_where_it_is_exact_and_still_shrinks():
    jpeg = b"\xff\xd8rest"
    assert transforms.decode_step(jpeg, (900, 1600), 1.0, (352, 640)) == 2
    assert transforms.decode_step(jpeg, (900, 1600), 1.4, (352, 640)) == 1  # 643 rows left for 352
    assert transforms.decode_step(jpeg, (901, 1600), 1.0, (352, 640)) == 1  # the last block would be cut
    assert transforms.decode_step(b"\x89PNG", (900, 1600), 1.0, (352, 640)) == 1


def test_half_decoded_jpeg_is_the_area_average():
    rig = sample_factory.make_rig(5, native_size=(96, 192), image_format=".jpg", cameras=3)
    whole = transforms.decode_image(rig.sample.images[0], (96, 192), "x").astype(np.float64)
    half = transforms.decode_image(rig.sample.images[0], (96, 192), "x", 2).astype(np.float64)
    average = whole.reshape(48, 2, 96, 2, 3).mean((1, 3))
    error = np.abs(half - average).mean()
    shifted = np.abs(half[:, 1:] - (average[:, 1:] + average[:, :-1]) / 2).mean()  # were it off by half a pixel
    assert error < 0.6 and shifted > 1.5 * error
    assert np.abs(half - average[..., ::-1]).mean() > 10  # RGB, not BGR


def test_flip_mirrors_pixels_labels_masks_and_keeps_rotations_proper():
    rig = sample_factory.make_rig(6, masks=True)
    plain, flipped = load(rig.sample), load(rig.sample, Draw(flip=True))
    for name in ("images", "depth", "ego_mask"):
        np.testing.assert_array_equal(flipped[name], plain[name][:, :, ::-1])
    assert not flipped["ego_mask"].all()
    for i in range(6):
        for j in range(6):
            between = np.linalg.inv(flipped["cam_to_ego"][j].astype(np.float64)) @ flipped["cam_to_ego"][i]
            np.testing.assert_allclose(between[:3, :3].T @ between[:3, :3], np.eye(3), atol=1e-5)
            assert np.linalg.det(between[:3, :3]) == pytest.approx(1, abs=1e-5)
    # a camera-to-camera transform of the mirrored rig is the mirror image of the original one
    mirror = np.diag([-1.0, 1, 1, 1])
    before = np.linalg.inv(plain["cam_to_ego"][1].astype(np.float64)) @ plain["cam_to_ego"][0]
    after = np.linalg.inv(flipped["cam_to_ego"][1].astype(np.float64)) @ flipped["cam_to_ego"][0]
    np.testing.assert_allclose(after, mirror @ before @ mirror, atol=1e-5)


def test_flip_keeps_the_way_to_the_global_frame_through_the_mirrored_ego():
    """Points of the mirrored camera, lifted and sent to the world, are the original world points."""
    rig = sample_factory.make_rig(7)
    plain, flipped = load(rig.sample), load(rig.sample, Draw(flip=True))
    camera_points = np.random.default_rng(0).uniform(1, 20, (10, 3))
    mirrored = camera_points * [-1, 1, 1]
    for i in range(6):
        ways = []
        for arrays, points in ((plain, camera_points), (flipped, mirrored)):
            chain = arrays["ego_to_global"][i].astype(np.float64) @ arrays["cam_to_ego"][i]
            ways.append(points @ chain[:3, :3].T + chain[:3, 3])
        np.testing.assert_allclose(ways[0], ways[1], atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1.07, 1.6])
@pytest.mark.parametrize("size", [(48, 96), (180, 320)], ids=["shrink", "enlarge"])
def test_pixels_follow_the_intrinsics(scale, size):
    """The image is a linear ramp in the ray direction, so every output pixel's value tells which ray it shows."""
    height, width = 120, 200
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.arange(width)[None]
    ramp[..., 1] = np.arange(height)[:, None]
    k = np.array([[150.0, 0, 97.0], [0, 140.0, 61.0], [0, 0, 1]])
    box = transforms.crop_box((height, width), scale, (0.3, 0.8))
    out = np.empty((*size, 3), np.uint8)
    transforms.resize_box(ramp, box, out)
    new = transforms.box_intrinsics(k, np.array(box), size)
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]]
    seen_u = (columns - new[0, 2]) / new[0, 0] * k[0, 0] + k[0, 2]
    seen_v = (rows - new[1, 2]) / new[1, 1] * k[1, 1] + k[1, 2]
    inside = np.s_[2:-2, 2:-2]  # at the border a bilinear filter clamps
    assert np.abs(out[inside][..., 0] - seen_u[inside]).max() <= 0.75  # rounding to whole grey levels
    assert np.abs(out[inside][..., 1] - seen_v[inside]).max() <= 0.75


def test_crop_box_stays_inside_and_reaches_both_ends():
    rng = np.random.default_rng(0)
    for _ in range(500):
        size = tuple(rng.integers(1, 400, 2))
        y0, x0, height, width = transforms.crop_box(size, rng.uniform(1, 3), tuple(rng.random(2)))
        assert 0 <= y0 <= size[0] - height and 0 <= x0 <= size[1] - width and min(height, width) >= 1
    starts = {transforms.crop_box((10, 10), 1.25, (f, 0.0))[0] for f in np.linspace(0, 0.9999, 50)}
    assert starts == {0, 1, 2}


def test_shrinking_uses_area_weights():
    """A one-pixel checkerboard has no grey in any bilinear 3:1 sample, but its area average is the mean."""
    board = ((np.indices((90, 90)).sum(0) % 2) * 255).astype(np.uint8)
    out = np.empty((30, 30), np.uint8)
    transforms.resize_box(board, (0, 0, 90, 90), out)
    assert np.all(np.abs(out.astype(int) - 127) <= 15)


def test_rasterize_equals_a_plain_loop():
    rng = np.random.default_rng(1)
    for count in (0, 1, 3000):
        points = [rng.uniform([-3, -3, 0.5], [210, 120, 80], (count, 3)).astype(np.float32) for _ in range(3)]
        scale, shift = rng.uniform(0.1, 0.6, (3, 2)), rng.uniform(-4, 4, (3, 2))
        out = np.zeros((3, 40, 70), np.float32)
        transforms.rasterize(points, scale, shift, out)
        for camera in range(3):
            expected = rasterize_by_hand(points[camera], scale[camera], shift[camera], (40, 70))
            np.testing.assert_array_equal(out[camera], expected.astype(np.float32))


def test_rasterize_nearest_point_wins_and_the_border_is_half_a_pixel():
    points = np.array([[2, 1, 9], [2.4, 1.4, 5], [1.6, 0.6, 7], [-0.5, 0, 3], [-0.51, 0, 2], [4.49, 0, 4], [4.5, 0, 1]])
    out = np.zeros((1, 3, 5), np.float32)
    transforms.rasterize([points.astype(np.float32)], np.ones((1, 2)), np.zeros((1, 2)), out)
    expected = np.zeros((3, 5))
    expected[1, 2], expected[0, 0], expected[0, 4] = 5, 3, 4
    np.testing.assert_array_equal(out[0], expected)


def test_label_positions_are_the_documented_formula():
    """u' = (u + .5) s - .5 from the native size, whatever the stored size in between."""
    rig = sample_factory.make_rig(10, image_size=(60, 100))
    depth = load(rig.sample)["depth"]
    scale = np.array([SIZE[1] / 160, SIZE[0] / 90])
    for camera in range(6):
        expected = rasterize_by_hand(rig.sample.points[camera], scale, 0.5 * scale - 0.5, SIZE)
        np.testing.assert_array_equal(depth[camera], expected.astype(np.float32))


def test_extra_sweeps_add_labels_only_when_asked():
    rig = sample_factory.make_rig(11, extra_points=600)
    own, more = load(rig.sample)["depth"], load(rig.sample, use_extra=True)["depth"]
    scale = np.array([SIZE[1] / 160, SIZE[0] / 90])
    for camera in range(6):
        both = np.concatenate([rig.sample.points[camera], rig.sample.extra_points[camera]])
        expected = rasterize_by_hand(both, scale, 0.5 * scale - 0.5, SIZE)
        np.testing.assert_array_equal(more[camera], expected.astype(np.float32))
    assert (more > 0).sum() > (own > 0).sum()


def test_ego_mask_hides_every_pixel_that_touches_the_body():
    rig = sample_factory.make_rig(12, masks=True)
    native = cv2.imdecode(np.frombuffer(rig.sample.ego_masks[0], np.uint8), cv2.IMREAD_GRAYSCALE)
    arrays = load(rig.sample, size=(30, 40))  # 3x4 native pixels each
    np.testing.assert_array_equal(arrays["ego_mask"][0], native.reshape(30, 3, 40, 4).min((1, 3)) == 255)
    assert arrays["ego_mask"][1].all()  # no mask: everything is visible
    zoomed = load(rig.sample, Draw(scale=1.5, offset=(0.999, 0.3)), size=(120, 200))  # an enlarging zoom
    y0, x0, height, width = transforms.crop_box((90, 160), 1.5, (0.999, 0.3))
    rows = np.clip(np.rint((np.arange(120) + 0.5) * height / 120 - 0.5).astype(int), 0, height - 1) + y0
    columns = np.clip(np.rint((np.arange(200) + 0.5) * width / 200 - 0.5).astype(int), 0, width - 1) + x0
    nearest = native[np.ix_(rows, columns)] == 255
    assert not np.any(zoomed["ego_mask"][0] & ~nearest)  # never visible where the nearest native pixel is body
    assert (zoomed["ego_mask"][0] != nearest).mean() < 0.03


def test_cameras_of_different_native_sizes():
    small = sample_factory.make_rig(13, cameras=3)
    large = sample_factory.make_rig(13, cameras=3, native_size=(120, 240))
    mixed = dataclasses.replace(small.sample)
    for name in ("image_size", "native_size", "intrinsics"):
        setattr(mixed, name, getattr(mixed, name).copy())
        getattr(mixed, name)[1] = getattr(large.sample, name)[1]
    mixed.images = [small.sample.images[0], large.sample.images[1], small.sample.images[2]]
    mixed.points = [small.sample.points[0], large.sample.points[1], small.sample.points[2]]
    arrays = load(mixed, Draw(scale=1.2, offset=(0.5, 0.5)))
    for i, rig in ((0, small), (1, large), (2, small)):
        alone = load(rig.sample, Draw(scale=1.2, offset=(0.5, 0.5)))
        for name in ("images", "depth", "intrinsics"):
            np.testing.assert_array_equal(arrays[name][i], alone[name][i])


def test_absent_camera_is_black_masked_and_has_no_labels():
    sample = dataclasses.replace(sample_factory.make_rig(14, cameras=3).sample)
    sample.images = [sample.images[0], b"", sample.images[2]]
    sample.points = [sample.points[0], sample.points[1][:0], sample.points[2]]
    arrays = load(sample, Draw(flip=True, colour=np.array([[1.1, 0.9, 1, 0]])))
    assert arrays["view_mask"].tolist() == [True, False, True]
    assert not arrays["images"][1].any() and not arrays["depth"][1].any() and not arrays["ego_mask"][1].any()
    geometry.check_intrinsics(arrays["intrinsics"], "absent")


def test_broken_images_and_masks_name_the_place():
    rig = sample_factory.make_rig(15, cameras=3, image_format=".jpg", masks=True)
    whole = rig.sample.images[1]
    for data, words in (
        (whole[: len(whole) // 2], "truncated"),
        (b"no image at all", "cannot be decoded"),
        (sample_factory.make_rig(1, cameras=3, native_size=(30, 40), image_format=".jpg").sample.images[0], "30x40"),
    ):
        broken = dataclasses.replace(rig.sample, images=[rig.sample.images[0], data, rig.sample.images[2]])
        with pytest.raises(DataError, match=rf"file x, record 3, camera BACK_LEFT: .*{words}"):
            load(broken, where="file x, record 3")
    for data, words in ((b"junk", "cannot be decoded"), (_png((10, 10)), "10x10")):
        broken = dataclasses.replace(rig.sample, ego_masks=[data, b"", b""])
        with pytest.raises(DataError, match=rf"record 3, camera FRONT: the ego mask .*{words}"):
            load(broken, where="record 3")


def _png(size):
    return cv2.imencode(".png", np.zeros(size, np.uint8))[1].tobytes()


def test_truncation_is_seen_in_spite_of_a_thumbnail():
    """A camera's JPEG may hold a whole small JPEG in its header; the end marker of that one does not count."""
    rig = sample_factory.make_rig(16, cameras=3, native_size=(48, 64), image_format=".jpg")
    small = sample_factory.make_rig(17, cameras=3, native_size=(16, 16), image_format=".jpg").sample.images[0]
    data = rig.sample.images[0]
    header = b"\xff\xe1" + (len(small) + 2).to_bytes(2, "big") + small
    with_thumbnail = data[:2] + header + data[2:]
    assert transforms.decode_image(with_thumbnail, (48, 64), "x").shape == (48, 64, 3)
    assert transforms.decode_image(with_thumbnail + b"trailing bytes", (48, 64), "x").shape == (48, 64, 3)
    with pytest.raises(DataError, match="truncated"):
        transforms.decode_image(with_thumbnail[:-200], (48, 64), "x")
