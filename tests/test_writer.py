"""The log of a run: what is in its files, and a disk without space."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from fsmde_jax.errors import TrainingError
from fsmde_jax.writer import Writer


def events(workdir):
    """Of all event files: TFRecord frames (length, its CRC, data, its CRC)."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_scalars_pictures_and_text_are_on_disk_at_once(tmp_path):
    with Writer(tmp_path, 3) as writer:
        writer.text("config", "**bold**")
        writer.scalars(3, {"train/loss": np.float32(0.5), "lr": 2})
        writer.picture(4, "eval/panorama", np.full((4, 6, 3), 200, np.uint8))
        first, begun, text, loss, rate, picture = events(tmp_path)  # before it is closed: a kill loses nothing
    assert first.file_version == "brain.Event:2"
    assert begun.step == 3 and begun.session_log.status == 1  # START: TensorBoard hides what is older from here on
    assert text.summary.value[0].tensor.string_val[0] == b"**bold**"
    assert (loss.step, loss.summary.value[0].tag, loss.summary.value[0].simple_value) == (3, "train/loss", 0.5)
    assert rate.summary.value[0].simple_value == 2
    image = picture.summary.value[0].image
    assert (picture.step, image.height, image.width) == (4, 4, 6) and image.encoded_image_string[1:4] == b"PNG"
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "train/loss": 0.5, "lr": 2.0}


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path):
    with Writer(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.scalars(step, {"loss": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # a kill cut it
    with Writer(tmp_path, 3) as writer:
        writer.scalars(3, {"loss": 30})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 30)]


def test_only_one_of_several_processes_writes(tmp_path):
    with Writer(tmp_path / "run", active=False) as writer:
        writer.scalars(1, {"loss": 1})
        writer.picture(1, "x", np.zeros((2, 2, 3), np.uint8))
        writer.text("x", "y")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["scalars", "picture"])
def test_a_full_disk_is_a_clear_error_and_no_endless_wait(tmp_path, what):
    """RLIMIT_FSIZE makes the kernel refuse a large file as a full disk does; in a process of its own."""
    call = {
        "scalars": "writer.scalars(step, {f'train/{k}': step for k in range(20)})",
        "picture": "writer.picture(step, 'x', noise)",
    }[what]
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from fsmde_jax.errors import exit_with_message\n"
        "from fsmde_jax.writer import Writer\n"
        "noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "with exit_with_message(), Writer(Path(sys.argv[1])) as writer:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "    for step in range(1, 1000):\n"
        f"        {call}\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1, result.stderr[-2000:]
    assert "run: cannot write the log" in result.stderr and "it resumes" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="file/run: cannot write the log"):
        Writer(tmp_path / "file" / "run")
