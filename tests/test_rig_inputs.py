"""Images, videos and datasets as prediction reads them: masks, EXIF tags, frame rates, frames that lack a camera."""

import re

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from data_prep import images
from fsmde_jax import rig_frames
from fsmde_jax.data import records as records_module
from fsmde_jax.errors import ConfigError, DataError
from tests import rendered, sample_factory
from tests.test_predict_frames import rotated

SIZE = (24, 48)
CAMERAS = {"front": 0.0, "left": 0.8}  # name and yaw


def write_rig(folder, camera=None, **top):
    """A rig file; `camera` are entries of the front one."""
    folder.mkdir(parents=True, exist_ok=True)
    k = [[30.0, 0, 23.5], [0, 30, 11.5], [0, 0, 1]]
    cameras = {
        name: {"image_size": list(SIZE), "intrinsics": k, "cam_to_ego": rotated(yaw).tolist()}
        for name, yaw in CAMERAS.items()
    }
    cameras["front"] |= camera or {}
    (folder / "rig.yaml").write_text(yaml.safe_dump({"cameras": cameras, **top}))
    return folder / "rig.yaml"


def write_images(folder, names):
    """{camera: file names} below folder/images."""
    for camera, files in names.items():
        (folder / "images" / camera).mkdir(parents=True, exist_ok=True)
        for file in files:
            picture = np.random.default_rng(len(file)).integers(0, 256, (*SIZE, 3), np.uint8)
            Image.fromarray(picture).save(folder / "images" / camera / file)


def opened(folder):
    return rig_frames.open_source(folder / "images", str(folder / "rig.yaml"))


@pytest.fixture
def masked(tmp_path, monkeypatch):
    """A drive with a mask of the front camera, seen from the folder above it."""
    write_rig(tmp_path / "drive", {"mask": "masks/front.png"})
    write_images(tmp_path / "drive", {"front": ["0.png"], "left": ["0.png"]})
    (tmp_path / "drive" / "masks").mkdir()
    mask = np.full(SIZE, 255, np.uint8)
    mask[-5:] = 0
    Image.fromarray(mask).save(tmp_path / "drive" / "masks" / "front.png")
    monkeypatch.chdir(tmp_path)
    return mask


@pytest.mark.parametrize("absolute", [False, True])
def test_a_mask_lies_beside_the_rig_file_wherever_that_is(masked, tmp_path, absolute):
    folder = tmp_path / "drive" if absolute else (tmp_path / "drive").relative_to(tmp_path)
    (frame,) = opened(folder).frames()
    np.testing.assert_array_equal(frame.visible[0], masked == 255)
    assert frame.visible[1].all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"drive/masks/front.png: cannot read this mask \(No such file"),
        (b"", r"drive/masks/front.png: truncated or damaged mask"),
        (b"no image", r"drive/masks/front.png: truncated or damaged mask"),
        (np.zeros((9, 9), np.uint8), r"drive/masks/front.png: the mask is 9x9, the camera's images are 24x48"),
        (np.full(SIZE, 128, np.uint8), r"drive/masks/front.png: mask values must be 255 \(visible\) or 0"),
    ],
)
def test_a_mask_that_cannot_be_used_is_named(masked, tmp_path, content, message):
    file = tmp_path / "drive" / "masks" / "front.png"
    if content is None:
        file.unlink()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        Image.fromarray(content).save(file)
    with pytest.raises(DataError, match=message):
        opened((tmp_path / "drive").relative_to(tmp_path))


def test_an_image_turned_by_a_tag_is_refused_as_by_the_converter(tmp_path):
    write_rig(tmp_path)
    write_images(tmp_path, {"front": ["0.jpg"], "left": ["0.jpg"]})
    file = tmp_path / "images" / "left" / "0.jpg"
    tag = Image.Exif()
    tag[0x0112] = 3  # upside down: of the same size
    Image.open(file).save(file, exif=tag)
    with pytest.raises(DataError) as of_converter:
        images.decode_image(file.read_bytes(), str(file))
    with pytest.raises(DataError, match=re.escape(str(of_converter.value))):
        list(opened(tmp_path).frames())
    assert "turned by an EXIF orientation tag" in str(of_converter.value)
    file.write_bytes((tmp_path / "images" / "front" / "0.jpg").read_bytes()[:400])
    with pytest.raises(DataError, match=r"left/0.jpg: .*; delete or replace it"):
        list(opened(tmp_path).frames())


def write_video(path, rate, count=6):
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), rate, SIZE[::-1])
    for _ in range(count):
        video.write(np.zeros((*SIZE, 3), np.uint8))
    video.release()


@pytest.mark.parametrize(
    ("rates", "suffixes", "refused"),
    [
        ((10, 12), (".avi", ".avi"), True),
        ((29.97, 30), (".avi", ".avi"), True),
        ((30, 29.97), (".mkv", ".mkv"), True),
        ((30, 30), (".avi", ".mkv"), False),
        ((29.97, 30000 / 1001), (".mkv", ".avi"), False),
    ],
)
def test_videos_of_different_rates_are_refused(tmp_path, rates, suffixes, refused):
    rig = str(write_rig(tmp_path))
    files = [tmp_path / f"{camera}{suffix}" for camera, suffix in zip(CAMERAS, suffixes, strict=True)]
    for file, rate in zip(files, rates, strict=True):
        write_video(file, rate)
    if not refused:
        assert len(list(rig_frames.open_source(tmp_path, rig).frames())) == 6
        return
    with pytest.raises(DataError) as error:
        rig_frames.open_source(tmp_path, rig)
    for file, rate in zip(files, rates, strict=True):
        assert re.search(rf"{re.escape(str(file))} has {rate:g}\b", str(error.value)), error.value


def test_a_rate_that_a_video_does_not_say_says_nothing(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    rig_frames._check_rates({a: 0.0, b: 30.0, c: float("nan")})
    rig_frames._check_rates({a: 0.0, b: -1.0})
    with pytest.raises(DataError, match=r"b has 10 frames a second, but .*c has 20"):
        rig_frames._check_rates({a: 0.0, b: 10.0, c: 20.0})


def test_frames_that_lack_a_camera_are_left_out_with_one_note(tmp_path, capsys):
    write_rig(tmp_path)
    write_images(tmp_path, {"front": ["0.png", "1.png", "2.png"], "left": ["0.png", "2.png", "3.png"]})
    source = opened(tmp_path)  # files alone say so: before anything is decoded
    said = "2 of 4 frames lack a camera and are left out, first 1.* (no image of camera left)"
    assert capsys.readouterr().out.splitlines() == [f"note: {tmp_path / 'images'}: {said}"]
    assert source.count == 2 and [frame.name for frame in source.frames()] == ["0", "2"]
    assert not capsys.readouterr().out


def test_no_common_name_suggests_times(tmp_path):
    rig = write_rig(tmp_path)
    write_images(tmp_path, {"front": ["1000.png", "2000.png"], "left": ["1030.png", "2030.png"]})
    with pytest.raises(DataError, match=r"of 4 frames not one has .*e\.g\. 1000\.\* .*say `match: nearest` in .*rig"):
        opened(tmp_path)
    write_rig(tmp_path, match="nearest", time_unit="ms")
    assert [(frame.name, frame.time_us) for frame in opened(tmp_path).frames()] == [
        ("1000", 1_000_000), ("2000", 2_000_000),
    ]  # fmt: skip
    assert rig.is_file()


def test_nearest_leaves_out_what_is_too_far_and_needs_times(tmp_path, capsys):
    write_rig(tmp_path, match="nearest", time_unit="ms")
    write_images(
        tmp_path, {"front": ["1000.png", "2000.png", "3000.png"], "left": ["1030.png", "2080.png", "2999.png"]}
    )
    source = opened(tmp_path)
    said = capsys.readouterr().out
    assert "1 of 3 frames lack a camera and are left out, first" in said
    assert "front/2000.png: the nearest image of camera left is 80.0 ms away, tolerance_ms is 50" in said
    assert [frame.name for frame in source.frames()] == ["1000", "3000"]
    write_rig(tmp_path, match="nearest", time_unit="ms", tolerance_ms=0.5)
    with pytest.raises(DataError, match=r"of 3 frames not one has .*1000\.png.* 30\.0 ms away.*raise tolerance_ms in"):
        opened(tmp_path)
    (tmp_path / "images" / "left" / "2999.png").rename(tmp_path / "images" / "left" / "last.png")
    with pytest.raises(DataError, match=r"images/left: `match: nearest` needs times; name the files by timestamp or"):
        opened(tmp_path)


def test_ddad_as_it_was_downloaded_takes_masks(tmp_path, capsys):
    size = (48, 64)
    place = rendered.dgp(tmp_path / "data", (("000150", "1"),), frames=1, size=size)
    masks = str(tmp_path / "data" / "masks")
    (bare,) = rig_frames.open_source(place).frames()
    assert all(visible.all() for visible in bare.visible)
    assert "ddad.json: without masks (predict: --masks DIR) clouds show the car's own body" in capsys.readouterr().out
    for given in ((masks,), (masks, "0")):
        (frame,) = rig_frames.open_source(place, "", "", *given).frames()
        for name, visible in zip(frame.cameras, frame.visible, strict=True):
            np.testing.assert_array_equal(visible, images_of(tmp_path / "data" / "masks" / "0" / f"{name}_mask.png"))
        assert not frame.visible[1].all()
    assert not capsys.readouterr().out
    with pytest.raises(
        ConfigError, match=rf"^{place}: mask set 0 needs the folder of the masks \(predict: --masks DIR\)"
    ):
        rig_frames.open_source(place, mask_set="0")
    with pytest.raises(ConfigError, match=r"--mask_set=7: no such set"):
        rig_frames.open_source(place, masks=masks, mask_set="7")
    with pytest.raises(ConfigError, match=rf"^{tmp_path}: masks .* are of DDAD's index \(ddad.json\) only"):
        rig_frames.open_source(tmp_path, str(write_rig(tmp_path)), masks=masks)


def images_of(mask):
    return np.array(Image.open(mask)) == 255


def test_a_sample_is_looked_for_no_further_than_needed(tmp_path, monkeypatch):
    folder = sample_factory.write_folder(
        tmp_path / "records", [sample_factory.make_rig(seed, cameras=3).sample for seed in range(5)]
    )
    decoded, decode = [], records_module.schema.decode
    monkeypatch.setattr(
        records_module.schema, "decode", lambda data, where: decoded.append(where) or decode(data, where)
    )
    source = rig_frames.open_source(folder, sample="sample-1")
    assert len(decoded) == 2
    for _ in range(2):
        assert [frame.name for frame in source.frames()] == ["sample-1"]
    assert len(decoded) == 2 and source.count == 1
