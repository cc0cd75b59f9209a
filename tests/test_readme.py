"""Runs every command of the README, in its order, on tiny rendered data: a README that has rotted fails here."""

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from data_prep import ddad
from fsmde_jax import export
from tests import random_teacher, rendered

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = (120, 160)

# What stands for a user's data in the README, and what it is here.
SUBSTITUTES = {
    "/data/nuscenes": "nuscenes",
    "/data/ddad_train_val/ddad.json": "ddad/ddad.json",
    "/data/ddad_masks": "ddad/masks",
}
PREPARE = ["--image_size", "64x96", "--workers", "1"]
TINY = [
    "--config.data.image_size=(32,64)", "--config.data.batch_size=1", "--config.model.decoder_channels=(4,4,8,8,8)",
    "--config.model.num_bins=8", "--config.model.focal_range=(50.0,2000.0)", "--config.train.steps=2",
    "--config.train.log_every=1", "--config.train.eval_every=1", "--config.train.picture_every=2",
    "--config.eval.num_pictures=1", "--config.teacher.weights=tiny", "--config.teacher.dtype=float32",
    "--config.distill.tokens=(2,4)",
]  # fmt: skip


def commands():
    """Lines of the README's shell blocks, comments cut off, continued lines joined."""
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield ["python", *words[1:]] if words[0] == ".venv/bin/python" else words


def test_make_targets_and_files_exist():
    for words in commands():
        if words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif words[:2] == ["pip", "install"]:
            for flag, name in itertools.pairwise(words):
                assert flag != "-r" or (ROOT / name).is_file(), name
        elif words[0] == "export":
            assert "=" in words[1]
        else:
            assert words[:2] == ["python", "-m"], f"no test knows how to run: {shlex.join(words)}"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the project's top level linked in, and a user's data beside it."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "data_prep", "fsmde_jax"):
        (folder / name).symlink_to(ROOT / name)
    rendered.nuscenes(folder / "nuscenes", frames=(2, 2), size=SMALL, cameras=rendered.RIG_OF_3)
    source = rendered.dgp(folder / "ddad", size=SMALL)
    plans = [ddad.open_split(source, "train", sweeps=0).describe(i) for i in range(2)]
    paths = rendered.folder_of(plans, folder / "exported")
    for name in ("rig.yaml", "images", "lidar"):
        (folder / name).symlink_to(paths["rig_path"].parent / name)
    random_teacher.write_pth(folder / "depth_anything_v2_vits.pth", random_teacher.params())
    return folder


def adapted(words):
    is_official = "/data/nuscenes" in words and "--version" in words
    words = [SUBSTITUTES.get(word, word) for word in words[1:]]
    module = words[1]
    if is_official:
        words[words.index("--version") + 1] = "v1.0-mini"
        at = words.index("--split") + 1
        words[at] = f"mini_{words[at]}"
    if module == "data_prep.world":
        words += ["--scenes", "2", "--val_scenes", "1", "--frames", "1", "--image_size", "64x96", "--workers", "1"]
    if module in ("data_prep.nuscenes", "data_prep.ddad", "data_prep.folder"):
        words += PREPARE
    if module == "fsmde_jax.main":
        keep = "lite0" in words and "evaluate" not in words  # the shipped parameters fit their own network alone
        world = "configs/world.py" in words  # its teacher ships; the others' stands for weights that a user fetches
        left_out = [".model."] * keep + [".teacher.weights"] * world
        words += [flag for flag in TINY if not any(name in flag for name in left_out)]
    if module == "fsmde_jax.predict":
        words += ["--image_size", "32x64", "--limit", "1"] if "--checkpoint" in words else ["--size", "28"]
    return [sys.executable, *words]


def test_commands_run_as_written(place, monkeypatch):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("FSMDE_REAL_DATA", None)
    ran = []
    after_demo = "depth_first/"  # on what `make demo` leaves behind, which other commands make here
    for words in sorted(commands(), key=lambda words: after_demo in words):
        if words[0] != "python" or any("FSMDE_REAL_DATA" in word for word in words):
            continue  # the runs on real frames have tests and figures of their own
        command = adapted(words)
        result = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout}\n{result.stderr}"
        ran.append(words[2])
    converters = {"data_prep.nuscenes", "data_prep.ddad", "data_prep.folder", "data_prep.world"}
    assert {*converters, "data_prep.verify", "fsmde_jax.main"} <= set(ran)
    for name in ("depth", "depth_tiny"):
        assert len(list((place / name).rglob("*_depth.png"))) >= 6
    for name in ("depth_val", "depth_raw", "depth_rig", "depth_first"):
        assert len(list((place / name).rglob("cloud.ply"))) == 1
    assert (place / "lidar_over_images.png").stat().st_size > 10_000
    assert (place / "runs/nuscenes/evaluation/nuscenes_mini_val_surround.md").is_file()
    assert (place / "runs/my_rig/evaluation/folder_train_surround.md").is_file()
    assert "trivial" in (place / "runs/world/evaluation/world_val_surround.md").read_text()
    assert (place / "runs/world/evaluation/world_val_surround_dense.md").is_file()
    monkeypatch.chdir(place)
    given = arguments()
    exec(snippets()["onnxruntime"], given)
    assert given["depth"].shape == (2, 32, 64)


def snippets():
    """The README's Python, by the first module that each imports."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    return {re.match(r"import (\w+)\n", block)[1]: block for block in blocks}


def arguments():
    """Two views of 32x64 (`TINY`'s size) with intrinsics of a camera that every student here serves."""
    camera = np.array([[50, 0, 31.5], [0, 50, 15.5], [0, 0, 1]], np.float32)
    return {
        "images": np.zeros((2, 32, 64, 3), np.uint8),
        "intrinsics": np.tile(camera, (2, 1, 1)),
        "cam_to_ego": np.tile(np.eye(4, dtype=np.float32), (2, 1, 1)),
    }


@pytest.fixture
def quick():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_python_runs_as_written(tmp_path, monkeypatch, quick):
    """All but onnxruntime's, whose file `test_commands_run_as_written` makes."""
    assert sorted(snippets()) == ["fsmde_jax", "jax", "onnxruntime"]
    monkeypatch.chdir(tmp_path)
    views = arguments()
    exec(snippets()["fsmde_jax"], views)
    assert views["found"].depth.shape == views["found"].confidence.shape == (2, 32, 64)
    export.export_stablehlo("lite0", "lite0.stablehlo", "32x64")
    rigs = {name: value[None] for name, value in arguments().items()}
    exec(snippets()["jax"], rigs)
    assert rigs["found"]["depth"].shape == rigs["found"]["confidence"].shape == (1, 2, 32, 64)
