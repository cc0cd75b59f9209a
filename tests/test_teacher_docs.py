"""The commands of docs/teacher.md, as a user would copy them: render, convert, train, export, measure, adapt."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import random_teacher

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/teacher.md").read_text(encoding="utf-8")
TINY = [
    "--config.data.image_size=(28,56)", "--config.teacher.longer_side=56", "--config.train.steps=2",
    "--config.train.log_every=1", "--config.train.picture_every=0", "--config.eval.num_pictures=1",
    "--config.data.batch_size=1", "--config.data.num_threads=1",
]  # fmt: skip
STUDENT = [
    *TINY, "--config.data.image_size=(32,64)", "--config.teacher.longer_side=64",
    "--config.distill.tokens=(2,4)",
    "--config.data.train_records=records/teacher_world_train", "--config.data.eval_records=records/teacher_world_val",
]  # fmt: skip


def commands():
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)


def test_what_they_name_is_there():
    modules = [words[2] for words in commands()]
    assert len(modules) >= 8 and {"data_prep.world", "fsmde_jax.teacher_cache"} <= set(modules)
    for module in modules:
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", TEXT):
        assert (ROOT / "docs" / target).exists(), target


@pytest.mark.slow
def test_the_commands_run(tmp_path):
    for name in ("benchmarks", "configs", "data_prep", "fsmde_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    teacher = tmp_path / "teachers" / "small"
    teacher.parent.mkdir()
    random_teacher.write_pth(teacher.with_suffix(".pth"), random_teacher.params())
    first = ["-m", "fsmde_jax.convert", "--weights", str(teacher.with_suffix(".pth")), "--out", str(teacher)]
    subprocess.run([sys.executable, *first], cwd=tmp_path, check=True, capture_output=True)
    swap = {"records/nuscenes_train": "records/teacher_world_train", "352x640": "32x64", "98x168": "28x56"}
    swap |= {"records/mine_train": "records/teacher_world_train", "records/mine_val": "records/teacher_world_val"}
    waiting = []
    for words in commands():
        for old, new in swap.items():
            words = [word.replace(old, new) for word in words]
        if words[2] == "data_prep.world":
            words += ["--scenes", "2", "--val_scenes", "1", "--workers", "1"]
        if words[2] == "fsmde_jax.main":
            words += STUDENT if "configs/world.py" in words else TINY
        words += ["--longer_side", "56"] if words[2] == "fsmde_jax.teacher_cache" else []
        if "--records" in words or STUDENT[-1] in words:  # some stand before the records are made
            waiting.append(words)
        else:
            run(words, tmp_path)
    for words in waiting:
        run(words, tmp_path)
    assert (tmp_path / "teachers/mine.safetensors").stat().st_size < 13e6
    assert (tmp_path / "caches/small/teacher_cache.json").is_file()
    assert list((tmp_path / "runs/teacher_mine/evaluation").glob("*_affine_dense.md"))


def run(words, place):
    done = subprocess.run([sys.executable, *words[1:]], cwd=place, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
