"""Conversion by Apache Beam's DirectRunner: the same bytes as without Beam, resumable, with clear errors."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import rendered

with_beam = pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason='pip install -e ".[beam]"')
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nuscenes")
    return rendered.nuscenes(folder, (18, 0), cameras=rendered.RIG_OF_3, beams=4, columns=60)


def convert(root, out, *flags):
    command = [sys.executable, "-m", "data_prep.nuscenes", "--dataroot", str(root), "--version", "v1.0-mini", "--split",
               "mini_train", "--image_size", "32x64", "--out", str(out), *flags]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def digests(out):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()
    }


@with_beam
@pytest.mark.parametrize(
    "options",
    ["", pytest.param("--direct_running_mode=multi_processing --direct_num_workers=2", marks=pytest.mark.slow)],
)
def test_records_are_the_same_bytes_as_without_beam(root, tmp_path, options):
    flags = ["--samples", "::2"]
    made = convert(root, tmp_path / "beam", *flags, "--runner", "DirectRunner", "--beam_options", options)
    assert made.returncode == 0, made.stderr[-3000:]
    assert convert(root, tmp_path / "plain", *flags, "--workers", "1").returncode == 0
    assert digests(tmp_path / "beam") == digests(tmp_path / "plain") and len(digests(tmp_path / "beam")) > 9


@with_beam
def test_a_damaged_sample_is_named_and_finished_shards_are_kept(root, tmp_path):
    copy = tmp_path / "d"
    subprocess.run(["cp", "-r", str(root), str(copy)], check=True)
    table = json.loads((copy / "v1.0-mini" / "sample_data.json").read_text())
    last = max((row for row in table if row["filename"].endswith(".jpg")), key=lambda row: row["timestamp"])
    image = copy / last["filename"]
    whole = image.read_bytes()
    image.write_bytes(whole[:50] + bytes(len(whole) - 50))
    flags = ["--runner", "DirectRunner"]
    failed = convert(copy, tmp_path / "out", *flags)
    assert failed.returncode == 1
    assert image.name in failed.stderr and "Shards that are done are kept" in failed.stderr, failed.stderr[-3000:]
    assert not (tmp_path / "out" / "manifest.json").exists()
    image.write_bytes(whole)
    again = convert(copy, tmp_path / "out", *flags)
    assert again.returncode == 0, again.stderr[-2000:]
    assert convert(copy, tmp_path / "plain", "--workers", "1").returncode == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")


def test_wrong_flags(root, tmp_path):
    wrong = convert(root, tmp_path / "out", "--beam_options=--a=b")
    assert wrong.returncode == 1 and "--beam_options belong to --runner" in wrong.stderr
    wrong = convert(root, tmp_path / "out", "--runner", "DirectRunner", "--beam_options=--a='b")
    assert wrong.returncode == 1 and "No closing quotation" in wrong.stderr and "Traceback" not in wrong.stderr


@with_beam
def test_an_unknown_runner_is_named(root, tmp_path):
    wrong = convert(root, tmp_path / "out", "--runner", "NoSuchRunner")
    assert wrong.returncode == 1 and "NoSuchRunner" in wrong.stderr and "Traceback" not in wrong.stderr


def test_without_beam_the_flag_says_what_to_install(root, tmp_path):
    script = (
        "import sys; sys.modules['apache_beam'] = None\n"
        "from data_prep import nuscenes\n"
        f"nuscenes.main(['--dataroot', {str(root)!r}, '--out', {str(tmp_path / 'out')!r}, '--runner', 'DirectRunner'])"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and 'pip install -e ".[beam]"' in result.stderr
