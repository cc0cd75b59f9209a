"""A conversion that goes on later: only from the same calibration, poses, times and files; strays; SIGTERM; memory."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import data_prep as benchmark
from data_prep import nuscenes, record_writer, verify
from data_prep.plan import BuildOptions
from fsmde_jax.data.records import load_manifest
from fsmde_jax.errors import DataError
from tests import rendered

OPTIONS = BuildOptions((32, 64))
FRAMES = 18  # shards of two


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nuscenes")
    return rendered.nuscenes(folder, (FRAMES, 0), cameras=rendered.RIG_OF_3, beams=4, columns=60)


@pytest.fixture
def copy(root, tmp_path):
    shutil.copytree(root, tmp_path / "d")
    return tmp_path / "d"


def open_source(folder):
    return nuscenes.open_split(folder, "v1.0-mini", "mini_train")


def convert_two_shards(folder, out):
    source = open_source(folder)

    def describe(index):
        if index >= 4:
            raise DataError("stop")
        return source.describe(index)

    with pytest.raises(DataError, match="stop"):
        record_writer.convert(dataclasses.replace(source, describe=describe), out, OPTIONS)
    assert len(list(out.glob(".parts/*.json"))) == 2


def edit_row(folder: Path, table: str, change) -> None:
    path = folder / "v1.0-mini" / f"{table}.json"
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))


def focal(folder: Path) -> None:
    """The first camera's focal length, by a hundredth of a pixel."""

    def change(rows):
        row = next(r for r in rows if r["camera_intrinsic"])
        row["camera_intrinsic"][0][0] += 0.01

    edit_row(folder, "calibrated_sensor", change)


def extrinsic(folder: Path) -> None:
    edit_row(folder, "calibrated_sensor", lambda rows: rows[1]["translation"].__setitem__(0, 9.0))


def pose(folder: Path) -> None:
    edit_row(folder, "ego_pose", lambda rows: rows[0]["translation"].__setitem__(1, 0.5))


def stamp(folder: Path) -> None:
    edit_row(folder, "sample_data", lambda rows: rows[0].update(timestamp=rows[0]["timestamp"] + 1))


def cloud(folder: Path) -> None:
    path = min((folder / "samples" / "LIDAR_TOP").iterdir())
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("change", [focal, extrinsic, pose, stamp, cloud])
def test_changed_sources_are_never_mixed_in(root, copy, tmp_path, change):
    """Two shards from the old data, then something changes: refused when resumed, and refused when finished."""
    half, whole = tmp_path / "half", tmp_path / "whole"
    convert_two_shards(copy, half)
    record_writer.convert(open_source(copy), whole, OPTIONS)
    change(copy)
    with pytest.raises(DataError, match=r"half: holds an unfinished conversion, .* changed since .*00000-of-00009"):
        record_writer.convert(open_source(copy), half, OPTIONS)
    with pytest.raises(DataError, match=r"whole: holds a finished conversion .*changed since"):
        record_writer.convert(open_source(copy), whole, OPTIONS)
    record_writer.convert(open_source(root), half, OPTIONS)  # from the old data, which lies elsewhere: goes on
    assert load_manifest(half).fingerprint == load_manifest(whole).fingerprint
    record_writer.convert(open_source(copy), tmp_path / "new", OPTIONS)
    assert load_manifest(tmp_path / "new").fingerprint != load_manifest(half).fingerprint


def test_a_moved_dataset_is_the_same_dataset(copy, tmp_path, capsys):
    made = record_writer.convert(open_source(copy), tmp_path / "r", OPTIONS)
    copy.rename(tmp_path / "elsewhere")
    assert record_writer.convert(open_source(tmp_path / "elsewhere"), tmp_path / "r", OPTIONS) == made
    assert "already converted" in capsys.readouterr().out


def test_skipped_samples_count_when_repaired(copy, tmp_path, capsys):
    image = min((copy / "samples" / "CAM_FRONT").iterdir())
    data = image.read_bytes()
    image.unlink()
    record_writer.convert(open_source(copy), tmp_path / "r", OPTIONS, on_error="skip")
    record_writer.convert(open_source(copy), tmp_path / "r", OPTIONS, on_error="skip")
    assert "already converted, 17 samples, 1 skipped" in capsys.readouterr().out
    image.write_bytes(data)
    with pytest.raises(DataError, match="changed since"):
        record_writer.convert(open_source(copy), tmp_path / "r", OPTIONS, on_error="skip")


def test_strays_of_an_earlier_plan_are_deleted(root, tmp_path):
    out = tmp_path / "r"
    out.mkdir()
    for name in ("fsmde_rig-mini_train.tfrecord-00000-of-00002", "fsmde_rig-val.tfrecord-00000-of-00001"):
        (out / name).write_bytes(b"old")
        (out / f"{name}.index").write_bytes(b"old")
    (out / "notes.txt").write_text("mine")
    record_writer.convert(open_source(root), out, OPTIONS)
    verify.verify_folder(out)
    assert len(list(out.glob("*.tfrecord-*"))) == 2 * 9 and (out / "notes.txt").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_ends_like_ctrl_c(root, tmp_path, workers):
    """Status 130, a sentence, no half-written file and no worker left; the same command goes on."""
    out, script = tmp_path / "r", tmp_path / "slow.py"
    script.write_text(rendered.SLOW_CONVERTER)
    argv = ["--dataroot", str(root), "--image_size", "32x64", "--workers", str(workers), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, str(script), *argv],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    limit = time.monotonic() + 60
    while not list(out.glob(".parts/*.json")) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.001)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted; the same command goes on" in error and "Traceback" not in error
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < limit:
        time.sleep(0.05)
    assert time.monotonic() < limit
    assert not (out / "manifest.json").exists()
    assert record_writer.convert(open_source(root), out, OPTIONS).num_samples == FRAMES
    verify.verify_folder(out)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_dataset(root, tmp_path):
    """Peak memory of parent and workers: five times as many samples may not take 30 MB more."""
    peaks = benchmark.measure_memory(open_source(root), tmp_path, (200, 1000))
    for name in ("parent", "worker"):
        few, many = (peaks[f"{name} at most, {n} samples, MB"] for n in (200, 1000))
        assert few > 30 and many - few < 30, peaks


def test_an_unreadable_part_file_is_refused(root, tmp_path):
    convert_two_shards(root, tmp_path / "r")
    part = min((tmp_path / "r" / ".parts").iterdir())
    part.write_text("[1]")
    with pytest.raises(DataError, match="unfinished conversion of other"):
        record_writer.convert(open_source(root), tmp_path / "r", OPTIONS)
