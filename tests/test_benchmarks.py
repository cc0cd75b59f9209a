"""The benchmark scripts run, both ways that a user may start them, and never hang on a worker that dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import rendered

ROOT = Path(__file__).resolve().parents[1]


def start(command, folder, real_data=""):
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"FSMDE_REAL_DATA": str(real_data)}
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rendered boxes in the place of the real keyframe."""
    folder = tmp_path_factory.mktemp("data")
    rendered.nuscenes(folder / "nuscenes_keyframe", (1, 0), (90, 160), beams=8, columns=90)
    return folder


@pytest.mark.parametrize("way", [pytest.param("file", marks=pytest.mark.slow), "module"])
def test_input_pipeline(data, tmp_path, way):
    script = ["-m", "benchmarks.input_pipeline"] if way == "module" else [str(ROOT / "benchmarks/input_pipeline.py")]
    out = tmp_path / "result.json"
    options = ["--real_data", str(data), "--threads", "2", "--batch_size", "1", "--seconds", "0.1", "--repeats", "1"]
    done = start([*script, *options, "--out", str(out)], ROOT if way == "module" else tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    loaders = json.loads(out.read_text())["loaders"]
    assert set(loaders) == {"records, 1 thread(s)", "records, 2 thread(s)", "raw frames + projection, 2 processes"}
    assert all(row["rigs_per_s"] > 0 for row in loaders.values())


def test_input_pipeline_stops_when_a_worker_dies(data, tmp_path):
    """There are no tables, so the workers cannot start."""
    kill = "import sys, benchmarks.input_pipeline as b; b.convert = lambda *a: None; b.open_records = lambda *a: None\n"
    kill += f"sys.argv[1:] = ['--real_data', {str(tmp_path)!r}]\nb.main()"
    (tmp_path / "nuscenes_keyframe").mkdir()
    done = start(["-c", kill], ROOT)
    assert done.returncode == 1 and "BrokenProcessPool" in done.stderr


@pytest.mark.parametrize("way", ["file", "module"])
def test_data_prep(data, tmp_path, way):
    script = ["-m", "benchmarks.data_prep"] if way == "module" else [str(ROOT / "benchmarks/data_prep.py")]
    samples = "20" if way == "file" else "0"  # the memory run starts workers
    out = tmp_path / "result.json"
    done = start([*script, "--repeats", "1", "--samples", samples, "--out", str(out)], ROOT, data)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rigs/s per core" in done.stdout and out.exists()
    assert (way == "file") == ("worker at most, 20 samples" in done.stdout)


SCRIPTS = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_what_it_measures(name):
    done = start(["-m", f"benchmarks.{name}", "--help"], ROOT)
    assert done.returncode == 0 and f"benchmarks.{name}" in done.stdout and "--" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
def test_world():
    done = start(["-m", "benchmarks.world", "--sizes", "32x64", "--scenes", "1", "--repeats", "1"], ROOT)
    assert done.returncode == 0 and "32x64" in done.stdout, done.stderr[-2000:]
