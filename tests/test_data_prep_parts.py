"""Parts of data_prep: point rules, point cloud files, images and masks, statistics, leakage, flags."""

import argparse
import io
import os

import cv2
import numpy as np
import pytest
from PIL import Image

from data_prep import cli, images, leakage, lidar_depth, manifest, pointfiles
from data_prep.plan import Source, take
from fsmde_jax.errors import ConfigError, DataError
from tests import boxes, rendered

POINTS = np.random.default_rng(0).normal(0, 20, (50, 3))


# --- projection ----------------------------------------------------------------------------------------------------


def test_pixel_rules():
    uv = np.array([[-0.5, 0.49], [-0.51, 0.5], [1.5, 2.5], [0.999, -0.01]], np.float32)
    assert lidar_depth.pixel_of(uv, "round").tolist() == [[0, 0], [-1, 1], [2, 3], [1, 0]]
    assert lidar_depth.pixel_of(uv, "truncate").tolist() == [[-1, 0], [-1, 0], [1, 2], [0, -1]]


@pytest.mark.parametrize(("rule", "kept"), [("round", [0, 1, 4]), ("truncate", [1, 2, 4])])
def test_borders_order_and_sign(rule, kept):
    """A 4x6 image: points at chosen pixels; order is kept, z <= 0 and outside are dropped."""
    k = np.array([[10.0, 0, 2], [0, 10, 1], [0, 0, 1]])
    uvz = np.array([[-0.4, 0.2, 5], [5.2, 3.4, 2], [5.7, 0.2, 3], [2, 4.1, 4], [3, 1, 9], [3, 1, -9]])
    points = np.stack([(uvz[:, 0] - 2) / 10 * uvz[:, 2], (uvz[:, 1] - 1) / 10 * uvz[:, 2], uvz[:, 2]], 1)
    moved = points + np.array([1.0, 2.0, 3.0])
    to_camera = np.eye(4)
    to_camera[:3, 3] = [-1, -2, -3]
    got = lidar_depth.project_sweep(moved, to_camera, k, (4, 6), rule)
    np.testing.assert_allclose(got, uvz[kept], atol=1e-5)
    assert got.dtype == np.float32


@pytest.mark.parametrize("rule", ["round", "truncate"])
def test_stored_points_never_leave_the_image(rule):
    """float64 positions just inside the border may round to just outside in float32: they must not be kept."""
    k = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    edge = {"round": 1599.5, "truncate": 1600.0}[rule]
    u = np.concatenate([edge - np.logspace(-9, 0, 200), edge + np.linspace(0, 1, 50), [-0.5, -0.5 - 1e-12, -1e-12]])
    got = lidar_depth.project_sweep(np.stack([u, u * 0, u * 0 + 1], 1), np.eye(4), k, (900, 1600), rule)
    pixel = lidar_depth.pixel_of(got[:, :2], rule)
    assert len(got) > 50 and pixel.min() >= 0 and pixel[:, 0].max() == 1599


def test_projection_of_nothing_and_of_points_in_the_camera_plane():
    k = np.eye(3)
    assert lidar_depth.project_sweep(np.zeros((0, 3)), np.eye(4), k, (4, 4), "round").shape == (0, 3)
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        near = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1e-300], [0.0, 0.0, 1e-300]])
        assert len(lidar_depth.project_sweep(near, np.eye(4), k, (4, 4), "round")) == 0


# --- point cloud files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bin", "npz", "npy", "ply", "ply_ascii", "pcd", "pcd_ascii"])
def test_point_files_round_trip(tmp_path, kind):
    path = tmp_path / f"p.{kind.split('_')[0]}"
    if kind == "bin":
        np.concatenate([POINTS, np.ones((50, 2))], 1).astype("<f4").tofile(path)
    elif kind == "npz":
        np.savez(path, data=np.concatenate([POINTS, np.ones((50, 1))], 1))
    elif kind == "npy":
        np.save(path, POINTS)
    elif kind.startswith("ply"):
        rendered.write_ply(path, POINTS, binary=kind == "ply")
    else:
        rendered.write_pcd(path, POINTS, "binary" if kind == "pcd" else "ascii")
    got = pointfiles.read_points(path)
    np.testing.assert_allclose(got, POINTS, atol=1e-5 if kind == "bin" else 0)
    assert got.dtype == np.float64
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 if "ascii" in kind else len(data) - 17])
    with pytest.raises(DataError, match=rf"p\.{path.suffix[1:]}: "):
        pointfiles.read_points(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"x" * 41, "41 bytes is not a whole number of points of 5 float32"),
        ("a.npz", b"PK broken", "truncated or damaged"),
        ("a.ply", b"solid", "no 'end_header' line"),
        (
            "a.pcd",
            b"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 1\nDATA binary_compressed\n",
            "expected ascii or binary",
        ),
        ("a.pcd", b"FIELDS a b\nSIZE 4 4\nTYPE F F\nPOINTS 1\nDATA ascii\n1 2\n", r"no field \['x', 'y', 'z'\]"),
        ("a.ply", b"ply\nformat ascii 1.0\nelement face 1\nend_header\n", "expected 'vertex'"),
        ("a.las", b"", "unknown point cloud format '.las'"),
        ("a.bin", b"", r"the file is empty \(0 bytes\)"),
    ],
)
def test_wrong_point_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        pointfiles.read_points(tmp_path / name)
    assert name in str(error.value)


def test_not_finite_points_are_counted(tmp_path):
    bad = POINTS.copy()
    bad[7, 1], bad[9, 2] = np.nan, np.inf
    np.save(tmp_path / "p.npy", bad)
    with pytest.raises(DataError, match=r"p\.npy: 2 of 50 points are NaN or infinite \(first: point 7\)"):
        pointfiles.read_points(tmp_path / "p.npy")
    np.save(tmp_path / "p.npy", POINTS[:, :2])
    with pytest.raises(DataError, match="expected points"):
        pointfiles.read_points(tmp_path / "p.npy")
    with pytest.raises(DataError, match=r"none\.bin: cannot read"):
        pointfiles.read_points(tmp_path / "none.bin")


# --- images --------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture():
    """A smooth RGB picture [90, 160, 3]."""
    y, x = np.mgrid[:90, :160]
    return np.stack([x * 1.5, y * 2.5, 255 - x - y * 0.5], -1).clip(0, 255).astype(np.uint8)


def test_native_jpeg_is_copied_byte_for_byte(tmp_path, picture):
    data = images.encode_jpeg(picture, 90)
    (tmp_path / "a.jpg").write_bytes(data)
    assert images.prepare_image(tmp_path / "a.jpg", (90, 160), None, 50) == (data, (90, 160))
    assert images.prepare_image(tmp_path / "a.jpg", (90, 160), (90, 160), 50)[0] == data


def test_png_and_grey_become_rgb_jpeg(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.png")
    data, size = images.prepare_image(tmp_path / "a.png", (90, 160), None, 95)
    got = images.decode_image(data, "x")
    assert size == (90, 160) and data[:2] == b"\xff\xd8"
    assert np.abs(got.astype(int) - picture).mean() < 2  # also: red and blue are not swapped
    Image.fromarray(picture[..., 0]).save(tmp_path / "g.png")
    grey = images.decode_image((tmp_path / "g.png").read_bytes(), "x")
    np.testing.assert_array_equal(grey, np.repeat(picture[..., :1], 3, 2))


def test_resize_is_by_area(tmp_path):
    """Means over exact blocks, in closed form; nearest or bilinear sampling would give other values."""
    noise = (
        np.random.default_rng(0).integers(0, 256, (80, 120, 1)).astype(np.uint8).repeat(3, 2)
    )  # grey: chroma is halved
    Image.fromarray(noise).save(tmp_path / "a.png")
    data, size = images.prepare_image(tmp_path / "a.png", (80, 120), (8, 12), 100)
    expected = noise.reshape(8, 10, 12, 10, 3).astype(float).mean((1, 3))
    assert size == (8, 12)
    assert np.abs(images.decode_image(data, "x") - expected).max() < 2


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated_images_are_refused(tmp_path, picture, suffix, keep):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(picture).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(DataError, match=rf"a\.{suffix}.*--on_error skip"):
        images.prepare_image(path, (90, 160), None, 95)


def test_zero_filled_download_is_refused(tmp_path, picture):
    data = images.encode_jpeg(picture, 95)
    (tmp_path / "a.jpg").write_bytes(data[:500] + bytes(len(data) - 500))
    with pytest.raises(DataError, match="truncated or damaged"):
        images.prepare_image(tmp_path / "a.jpg", (90, 160), None, 95)


def test_bytes_after_the_end_marker_are_harmless(picture):
    data = images.encode_jpeg(picture, 95)
    np.testing.assert_array_equal(images.decode_image(data + b"\0\0trailer", "x").shape, picture.shape)


def test_wrong_images_are_named(tmp_path, picture):
    with pytest.raises(DataError, match=r"none\.jpg: cannot read"):
        images.prepare_image(tmp_path / "none.jpg", (90, 160), None, 95)
    Image.fromarray(picture).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: the image is 90x160, but its calibration is for 900x1600"):
        images.prepare_image(tmp_path / "a.png", (900, 1600), None, 95)
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(out, "JPEG", exif=exif)
    with pytest.raises(DataError, match="EXIF orientation"):
        images.decode_image(out.getvalue(), "x")
    cv2.imwrite(str(tmp_path / "deep.png"), np.zeros((90, 160), np.uint16))
    with pytest.raises(DataError, match="8-bit"):
        images.prepare_image(tmp_path / "deep.png", (90, 160), None, 95)


@pytest.mark.parametrize("image_size", [None, (45, 80)])
def test_a_damaged_middle_of_a_jpeg_is_found(tmp_path, capfd, image_size):
    """The end marker is there, OpenCV decodes, half of the picture is grey: only libjpeg's warning tells."""
    picture = np.random.default_rng(0).integers(0, 255, (90, 160, 3), np.uint8)
    data = images.encode_jpeg(picture, 95)
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    images.prepare_image(path, (90, 160), image_size, 95)
    for start, count in ((len(data) // 2, 3000), (len(data) // 3, 200)):
        path.write_bytes(data[:start] + bytes(count) + data[start + count :])
        assert path.stat().st_size == len(data)
        with pytest.raises(DataError, match=r"a\.jpg: damaged JPEG \(Corrupt JPEG data.*--on_error skip"):
            images.prepare_image(path, (90, 160), image_size, 95)
    path.write_bytes(data)
    images.prepare_image(path, (90, 160), image_size, 95)  # no warning stays behind
    assert capfd.readouterr().err == ""


def test_other_output_is_passed_on_and_grey_jpegs_are_read(tmp_path, capfd):
    with images._libjpeg_warnings() as warnings:
        os.write(2, b"another line\nCorrupt JPEG data: 3 extraneous bytes before marker 0xd9\n")
    assert warnings == ["Corrupt JPEG data: 3 extraneous bytes before marker 0xd9"]
    assert capfd.readouterr().err == "another line\n"
    Image.fromarray(np.full((16, 16), 77, np.uint8)).save(tmp_path / "grey.jpg")
    pixels = images.decode_image((tmp_path / "grey.jpg").read_bytes(), "x")
    assert pixels.shape == (16, 16, 3) and np.all(np.abs(pixels.astype(int) - 77) < 3)


@pytest.mark.real_data
def test_a_damaged_real_jpeg_is_found(real_data, tmp_path):
    source = next((real_data / "nuscenes_keyframe" / "samples" / "CAM_FRONT").glob("*.jpg"))
    data = bytearray(source.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20_000] = bytes(20_000)
    with pytest.raises(DataError, match="damaged JPEG"):
        images.decode_image(bytes(data), "x")


# --- manifest, leakage, flags --------------------------------------------------------------------------------------


def test_statistics_do_not_depend_on_the_cut():
    from tests.test_schema import make_sample

    samples = [make_sample(seed=i, points=(5 + i, 0)) for i in range(4)]
    whole = manifest.new_statistics(["left", "right"])
    parts = [manifest.new_statistics(["left", "right"]) for _ in range(3)]
    for i, sample in enumerate(samples):
        manifest.add_sample(whole, sample)
        manifest.add_sample(parts[i % 2], sample)
    merged = manifest.merge_statistics(parts, ["left", "right"])
    assert merged == whole
    left, right = whole["cameras"]["left"], whole["cameras"]["right"]
    assert (left["points"], left["fewest_points"], left["most_points"]) == (26, 5, 8)
    assert (right["points"], right["samples_without_points"]) == (0, 4)
    z = np.concatenate([s.points[0][:, 2] for s in samples])
    assert whole["depth_counts"] == np.histogram(z, [*manifest.DEPTH_EDGES, np.inf])[0].tolist()


def test_leakage_of_lists():
    leakage.check_lists({"train": ["a", "b"], "mini_train": ["a"], "val": ["c"]}, "x")
    with pytest.raises(DataError, match="x: scene 'b' is in split 'train' and in split 'val'"):
        leakage.check_lists({"train": ["a", "b"], "val": ["b"]}, "x")


def test_sizes_and_ranges():
    import argparse

    assert cli.parse_size("352x640") == (352, 640) and cli.parse_size("native") is None
    for wrong in ("640", "0x5", "axb", "1x2x3", "65536x8"):
        with pytest.raises(argparse.ArgumentTypeError, match="352x640"):
            cli.parse_size(wrong)
    with pytest.raises(ConfigError, match="--jpeg_quality=101: expected 1 to 100"):
        cli.check_flags(argparse.Namespace(jpeg_quality=101))


def test_boxes_cast_in_closed_form():
    """One box: distances to its front face, its top from above, the ground, and the sky."""
    street = boxes.Boxes(np.array([[[10.0, -2, 0], [12, 2, 3]]]), np.ones((1, 3)))
    rays = np.array([[1.0, 0, 0], [2, 0, 0], [1, 0, -0.5], [-1, 0, 0], [1, 0, 0.5]])
    t, which, axis = boxes.cast(street, np.array([0.0, 0, 1]), rays)
    np.testing.assert_allclose(t, [10, 5, 2, np.inf, np.inf])
    assert which[:3].tolist() == [0, 0, -1] and axis[:3].tolist() == [0, 0, 2]
    t, which, axis = boxes.cast(street, np.array([11.0, 0, 8]), np.array([[0.0, 0, -1]]))
    assert (t[0], which[0], axis[0]) == (5, 0, 2)


def test_samples_and_limit_choose_in_order_and_are_never_complete():
    source = Source(
        dataset="x", version="1", split="val", sample_ids=[f"s{i}" for i in range(7)], sample_scenes=list("aabbbcc"),
        cameras=["C"], point_rule="round", min_depth=0.1, max_depth=80.0, complete=True, options={},
        describe=lambda i: i,
    )  # fmt: skip
    assert source.scenes == ["a", "b", "c"]
    every_other = take(take(source, cli.parse_slice("1::2")), slice(2))
    assert (every_other.sample_ids, every_other.scenes, every_other.complete) == (["s1", "s3"], ["a", "b"], False)
    assert [every_other.describe(i) for i in range(2)] == [1, 3]
    assert take(source, slice(None)).complete
    with pytest.raises(ConfigError, match="none of the 7 samples"):
        take(source, slice(9, 12))


@pytest.mark.parametrize("text", ["3", "a:b", "::0", "1:2:3:4", "::-1"])
def test_samples_that_are_no_slice_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="START:STOP"):
        cli.parse_slice(text)


def test_the_use_of_a_split_is_not_guessed():
    uses = {"train": "train", "mini_train": "train", "val": "held-out", "mini_val": "held-out", "test": "held-out"}
    assert {name: leakage.use_of(name) for name in uses} == uses and leakage.use_of("drive_3") == "unknown"
    assert leakage.may_share("train", "mini_train") and leakage.may_share("a", "a")
    assert not leakage.may_share("a", "b") and not leakage.may_share("train", "a")


def test_workers_default_to_the_cores_of_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert cli.usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cli.usable_cores() == (os.cpu_count() or 1)
