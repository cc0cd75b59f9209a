"""The command line as a user meets it: mistakes get one clear message, and --help answers at once."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments, cwd=ROOT):
    command = [sys.executable, "-m", "fsmde_jax.main", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)


def test_help_names_the_flags_and_shows_a_command():
    result = run("--help")
    for text in (
        "--config",
        "--mode",
        "--workdir",
        "--init_from",
        "python -m fsmde_jax.main --config configs/nuscenes.py",
    ):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", "configs/ddad.py", "--config.optim.lrr=1"], "key 'optim.lrr'; did you mean 'optim.lr'?"),
        (["--config", "configs/nuscene.py"], "configs/nuscene.py: no such config file; there are"),
        (["--config", "configs/nuscenes.py", "--config.optim.lr=fast"], "--config.optim.lr=fast"),
        ([], "name a config with --config; there are"),
        (["--config", "configs/nuscenes.py", "oops"], "unexpected argument 'oops'"),
        (
            ["--config", "configs/nuscenes.py", "--config.data.train_records=no/such/folder"],
            "python -m data_prep.nuscenes --dataroot <nuScenes folder> --version v1.0-trainval --split train --out",
        ),
        (["--config", "configs/nuscenes.py", "--config.data.batch_size=0"], "data.batch_size"),
        (["--config", "configs/ddad.py", "--config.data.image_size=(64,)"], "data.image_size = (64,): expected 2"),
        (
            ["--config", "configs/ddad.py", "--config.data.image_size=(64,)", "--config.data.image_size=(1,2,3)"],
            "data.image_size = (1, 2, 3)",
        ),
        (["--config", "configs/nuscenes.py", "--config.train.steps=0"], "train.steps = 0: expected at least 1"),
    ],
)  # fmt: skip
def test_mistakes_get_one_clear_message(arguments, expected):
    result = run(*arguments)
    assert result.returncode != 0
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_workdir_is_printed_and_defaults_to_the_config_name():
    result = run("--config", "configs/ddad.py", "--config.data.train_records=no/such/folder")
    assert "workdir: runs/ddad" in result.stdout
