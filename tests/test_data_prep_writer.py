"""The record writer: same bytes for any number of workers, resume after a kill, refusals, skips, full disks, verify."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import leakage, nuscenes, overlay, record_writer, verify
from data_prep.plan import BuildOptions
from fsmde_jax.data import tfrecord
from fsmde_jax.data.records import load_manifest
from fsmde_jax.errors import DataError
from tests import boxes, rendered

OPTIONS = BuildOptions((32, 64))
FRAMES = 18  # more than 16 samples: shards of two


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return rendered.nuscenes(
        tmp_path_factory.mktemp("nuscenes"), (FRAMES, 2), cameras=rendered.RIG_OF_3, beams=4, columns=60
    )


@pytest.fixture
def source(root):
    return nuscenes.open_split(root, "v1.0-mini", "mini_train")


@pytest.fixture
def copy(root, tmp_path):
    shutil.copytree(root, tmp_path / "d")
    return tmp_path / "d"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_shards_depend_on_the_number_of_samples_only():
    for n in (1, 2, 16, 17, 323, 6019, 28130):
        bounds = record_writer.shard_bounds(n)
        assert [i for a, b in bounds for i in range(a, b)] == list(range(n))
        assert max(b - a for a, b in bounds) <= 128
    assert len(record_writer.shard_bounds(28130)) == 220


def test_same_bytes_for_any_number_of_workers(source, tmp_path):
    for workers in (1, 2):
        record_writer.convert(source, tmp_path / str(workers), OPTIONS, workers=workers)
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert one == two and len([n for n in one if n.endswith(".index")]) == 9
    assert not list(tmp_path.rglob("*.tmp-*")) and not list(tmp_path.rglob(".parts"))
    verify.verify_folder(tmp_path / "1")


def test_killed_run_is_resumed(root, tmp_path):
    """SIGKILL after the first shard: no manifest, no worker left behind; the next run finishes with the same bytes."""
    out, clean = tmp_path / "r", tmp_path / "clean"
    command = [
        sys.executable,
        "-m",
        "data_prep.nuscenes",
        "--dataroot",
        str(root),
        "--image_size",
        "32x64",
        "--workers",
        "2",
    ]
    script = tmp_path / "slow.py"
    script.write_text(rendered.SLOW_CONVERTER)
    process = subprocess.Popen(
        [sys.executable, str(script), *command[3:], "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    limit = time.monotonic() + 60
    while not list(out.glob(".parts/*.json")) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.001)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    assert process.wait() == -signal.SIGKILL and list(out.glob(".parts/*.json"))
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < limit:
        time.sleep(0.05)
    assert workers and time.monotonic() < limit
    with pytest.raises(DataError, match="conversion did not finish"):
        load_manifest(out)
    done = {p.name: p.stat().st_ino for p in out.glob("*.tfrecord-*")}
    (out / "fsmde_rig-mini_train.tfrecord-00008-of-00009.tmp-1-1").write_bytes(b"half")
    kept = {p.stem for p in out.glob(".parts/*.json")}
    second = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=True)
    assert "resuming" in second.stderr
    for name in kept:  # finished shards were not written again
        assert (out / name).stat().st_ino == done[name]
    subprocess.run([*command, "--out", str(clean)], capture_output=True, check=True)
    assert contents(out) == contents(clean)


def test_part_of_another_conversion_is_refused(source, tmp_path):
    out = tmp_path / "r"
    failing = dataclasses.replace(
        source, describe=lambda i: source.describe(i) if i < 4 else (_ for _ in ()).throw(DataError("stop"))
    )
    with pytest.raises(DataError, match="stop"):
        record_writer.convert(failing, out, OPTIONS)
    assert len(list(out.glob(".parts/*.json"))) == 2
    with pytest.raises(DataError, match="unfinished conversion of other"):
        record_writer.convert(source, out, BuildOptions((64, 32)))
    assert record_writer.convert(source, out, OPTIONS).num_samples == FRAMES


def test_a_damaged_part_is_converted_again(source, tmp_path):
    out, clean = tmp_path / "r", tmp_path / "clean"
    failing = dataclasses.replace(
        source, describe=lambda i: source.describe(i) if i < 4 else (_ for _ in ()).throw(DataError("stop"))
    )
    with pytest.raises(DataError):
        record_writer.convert(failing, out, OPTIONS)
    shard = sorted(out.glob("*-00000-of-00009"))[0]
    shard.write_bytes(shard.read_bytes()[:-5])
    record_writer.convert(source, out, OPTIONS)
    record_writer.convert(source, clean, OPTIONS)
    assert contents(out) == contents(clean)


def test_two_writers_are_refused(source, tmp_path):
    with (
        record_writer._locked_folder(tmp_path / "r"),
        pytest.raises(DataError, match="another data_prep process is writing"),
    ):
        record_writer.convert(source, tmp_path / "r", OPTIONS)


def test_unwritable_output_is_named(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/r: cannot make this records folder .*Not a dir.*choose another"):
        record_writer.convert(source, tmp_path / "file" / "r", OPTIONS)


def test_full_disk_leaves_nothing_half_written(source, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(tfrecord.os, "fsync", full)
        with pytest.raises(DataError, match=r"tfrecord-00000.*No space left on device.*free space"):
            record_writer.convert(source, tmp_path / "r", OPTIONS)
    assert [p for p in (tmp_path / "r").rglob("*") if p.is_file()] == []
    assert record_writer.convert(source, tmp_path / "r", OPTIONS).num_samples == FRAMES


def break_sample(folder: Path) -> None:
    """A truncated image in the third sample, a short LiDAR file in the fifth."""
    image = sorted((folder / "samples" / "CAM_FRONT").iterdir(), key=lambda p: p.name)[2]
    image.write_bytes(image.read_bytes()[:300])
    cloud = sorted((folder / "samples" / "LIDAR_TOP").iterdir())[4]
    cloud.write_bytes(cloud.read_bytes()[:-3])


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_stop_or_are_skipped(copy, tmp_path, workers):
    break_sample(copy)
    source = nuscenes.open_split(copy, "v1.0-mini", "mini_train")
    with pytest.raises(
        DataError, match=r"(?s)sample '.*(CAM_FRONT__.*truncated|LIDAR_TOP__.*whole number).*--on_error skip"
    ):
        record_writer.convert(source, tmp_path / "r", OPTIONS, workers=workers)
    made = record_writer.convert(source, tmp_path / "r", OPTIONS, workers=workers, on_error="skip")
    assert made.num_samples == FRAMES - 2 and not made.complete_split
    assert [s["sample_id"] for s in made.skipped] == [source.sample_ids[2], source.sample_ids[4]]
    assert "truncated" in made.skipped[0]["reason"] and "20 bytes each" in made.skipped[1]["reason"]
    found, ids = verify.verify_folder(tmp_path / "r")
    assert found.num_samples == len(ids) == FRAMES - 2


def test_nothing_left_is_an_error(copy, tmp_path):
    for path in (copy / "samples" / "LIDAR_TOP").iterdir():
        path.unlink()
    source = nuscenes.open_split(copy, "v1.0-mini", "mini_val")
    with pytest.raises(DataError, match=r"no sample could be converted; the first problem: .*cannot read"):
        record_writer.convert(source, tmp_path / "r", OPTIONS, on_error="skip")


def test_camera_without_points_is_counted(copy, tmp_path, capsys):
    cloud = min((copy / "samples" / "LIDAR_TOP").iterdir())
    points = np.fromfile(cloud, "<f4").reshape(-1, 5)
    points[points[:, 1] > 0][:].tofile(cloud)  # the sensor's +y is forward: nothing behind the car
    nuscenes.main(["--dataroot", str(copy), "--out", str(tmp_path / "r"), "--image_size", "32x64", "--workers", "1"])
    assert load_manifest(tmp_path / "r").statistics["cameras"]["CAM_BACK_LEFT"]["samples_without_points"] <= 1
    np.array([[0, 0, 1000, 0, 0]], "<f4").tofile(cloud)  # one point, high above
    nuscenes.main(["--dataroot", str(copy), "--out", str(tmp_path / "r2"), "--image_size", "32x64", "--workers", "1"])
    statistics = load_manifest(tmp_path / "r2").statistics["cameras"]
    assert [one["samples_without_points"] for one in statistics.values()] == [1, 1, 1]
    assert "no LiDAR point in 1 samples" in capsys.readouterr().out
    verify.main([str(tmp_path / "r2"), "--overlay", str(tmp_path / "o.png")])


def test_dry_run_writes_nothing(root, tmp_path, capsys):
    nuscenes.main(["--dataroot", str(root), "--out", str(tmp_path / "r"), "--dry_run", "--workers", "3"])
    printed = capsys.readouterr().out
    assert (
        f"{FRAMES} samples of 1 scenes, 3 cameras" in printed
        and "minutes with 3 workers" in printed
        and "GB of records" in printed
    )
    assert not (tmp_path / "r").exists()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        nuscenes.main(["--dataroot", str(root), "--out", str(tmp_path / "file" / "r"), "--dry_run"])
    assert end.value.code == 1 and f"{tmp_path}/file is not a folder" in capsys.readouterr().out


# --- verify -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("records")
    for split in ("mini_train", "mini_val"):
        record_writer.convert(nuscenes.open_split(root, "v1.0-mini", split), out / split, OPTIONS)
    return out


def test_verify_prints_and_draws(records, tmp_path, capsys):
    argv = [
        str(records / "mini_train"),
        str(records / "mini_val"),
        "--overlay",
        str(tmp_path / "o.png"),
        "--sample",
        "3",
    ]
    verify.main(argv)
    printed = capsys.readouterr().out
    assert (
        "a subset, n = 18" in printed
        and "CAM_BACK_LEFT" in printed
        and "no scene is in both (1 and 1 scenes)" in printed
    )
    picture = np.array(Image.open(tmp_path / "o.png").convert("RGB")).astype(int)
    assert picture.shape[1] > 1280 and (np.ptp(picture, axis=-1) > 100).mean() > 0.01  # turbo dots and bar
    with pytest.raises(SystemExit):
        verify.main([str(records / "mini_val"), "--overlay", str(tmp_path / "o.png"), "--sample", "9"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f, m: next(f.glob("*00003-of-00009")).unlink(),
            r"missing shards \['fsmde_rig-mini_train\.tfrecord-00003",
        ),
        (lambda f, m: (f / "x.tfrecord-00000-of-00001").touch(), "unlisted files"),
        (lambda f, m: flip(next(f.glob("*00003-of-00009"))), "00003-of-00009: size or sha256 differs"),
        (lambda f, m: (f / "dataset_info.json").unlink(), r"dataset_info\.json: missing or broken"),
        (lambda f, m: (f / "dataset_info.json").write_text("{}"), r"dataset_info\.json: no shard lengths"),
        (lambda f, m: (f / "manifest.json").write_text(json.dumps({**m, "shards": [{}]})), "shards cannot be"),
        (lambda f, m: (f / "manifest.json").write_text("{"), r"manifest\.json: cannot be read as JSON"),
        (lambda f, m: (f / "manifest.json").write_text(json.dumps({**m, "format_version": 99})), "format version 99"),
        (
            lambda f, m: (f / "manifest.json").write_text(json.dumps({**m, "num_samples": 17})),
            "18 samples, the manifest says 17",
        ),
        (lambda f, m: (f / "manifest.json").write_text(json.dumps({**m, "scenes": []})), "not in the manifest"),
        (lambda f, m: (f / "manifest.json").write_text(json.dumps({**m, "cameras": ["a"]})), "the manifest says"),
    ],
)
def test_verify_finds_damage(records, tmp_path, damage, message):
    shutil.copytree(records / "mini_train", tmp_path / "r")
    damage(tmp_path / "r", json.loads((tmp_path / "r" / "manifest.json").read_text()))
    with pytest.raises(DataError, match=message):
        verify.verify_folder(tmp_path / "r")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_flipped_bit_is_found_by_the_record_checksum(records, tmp_path):
    path = tmp_path / "s"
    path.write_bytes(next((records / "mini_train").glob("*00003-of-00009")).read_bytes())
    flip(path)
    with pytest.raises(DataError, match=r"record \d"):
        reader = tfrecord.TFRecordReader([path])
        [reader[i] for i in range(len(reader))]


def test_leakage_between_folders(records, tmp_path, source, capsys):
    shutil.copytree(records / "mini_train", tmp_path / "train")
    shutil.copytree(records / "mini_train", tmp_path / "val")
    content = json.loads((tmp_path / "val" / "manifest.json").read_text())
    (tmp_path / "val" / "manifest.json").write_text(json.dumps({**content, "split": "val"}))
    with pytest.raises(DataError, match=r"share 1 scenes, e.g. 'scene-0061'"):
        leakage.check_manifests(*(load_manifest(tmp_path / s) for s in ("train", "val")), names=("a", "b"))
    with pytest.raises(SystemExit):
        verify.main([str(tmp_path / "train"), str(tmp_path / "val")])
    (tmp_path / "val" / "manifest.json").write_text(json.dumps({**content, "split": "drive_2"}))
    with pytest.raises(SystemExit):  # a name that says nothing about its use
        verify.main([str(tmp_path / "train"), str(tmp_path / "val")])
    (tmp_path / "val" / "manifest.json").write_text(json.dumps({**content, "split": "val"}))
    with pytest.raises(DataError, match=r"split 'mini_train' shares 1 scenes with .*val"):
        leakage.check_siblings(tmp_path / "new", source)
    leakage.check_siblings(tmp_path / "elsewhere" / "new", source)
    (tmp_path / "val" / "manifest.json").write_text(json.dumps({**content, "dataset": "other"}))
    capsys.readouterr()
    verify.main([str(tmp_path / "train"), str(tmp_path / "val")])
    assert "nothing compared, different datasets (nuscenes, other)" in capsys.readouterr().out
    verify.main([str(tmp_path / "train"), str(tmp_path / "train") + "/."])
    assert "1 scenes are in both" in (printed := capsys.readouterr().out) and "18 samples are in both" in printed


def test_grid_shows_front_above_back():
    poses = np.stack([boxes.camera_pose(c[0], c[2]) for c in boxes.NUSCENES_CAMERAS.values()])
    assert overlay.grid_rows(poses) == [
        [1, 0, 5],
        [2, 3, 4],
    ]  # front-left, front, front-right; back-left, back, back-right
    assert overlay.grid_rows(poses[:1]) == [[0]]
    colours = overlay.depth_colours(np.array([1.0, 80.0]), 1.0, 80.0).astype(int)
    assert colours[0, 0] > colours[0, 2] + 50 and colours[1, 2] > colours[1, 0] + 50  # near red, far blue
