"""The rig and the commands of docs/custom_rig.md, as a new user would copy them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep import rig_yaml
from data_prep.world import drive, rigs
from fsmde_jax import geometry

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/custom_rig.md").read_text(encoding="utf-8")


@pytest.fixture
def rig_file(tmp_path):
    path = tmp_path / "van.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", TEXT, re.S).group(1), encoding="utf-8")
    return path


def test_the_example_is_a_ring_of_four_that_sees_its_own_body(rig_file):
    rig = rigs.scaled(rigs.read_rig(rig_file), size=(60, 96))
    assert list(rig.cameras) == ["front", "left", "back", "right"]
    poses = np.stack([camera.cam_to_ego for camera in rig.cameras.values()])
    intrinsics = np.stack([camera.intrinsics for camera in rig.cameras.values()])
    adjacent = np.asarray(geometry.adjacency(poses, intrinsics, np.full(4, 96)))
    np.testing.assert_array_equal(adjacent.sum(1), 2)
    np.testing.assert_allclose(intrinsics[:, 0, 0], 48 / np.tan(np.deg2rad(50)), rtol=1e-6)
    np.testing.assert_allclose(np.rad2deg(geometry.optical_yaw(poses)) % 360, [0, 90, 180, 270], atol=1e-6)
    hidden = {name: 1 - mask.mean() for name, mask in drive.body_masks(rig).items()}
    assert 0.01 < hidden["front"] < 0.4, "the bonnet"
    assert hidden["left"] == hidden["back"] == hidden["right"] == 0
    assert rig_yaml.read_rig(rig_file).cameras["front"].native_size == (600, 960)  # data_prep.folder takes it, too


@pytest.mark.slow
def test_the_commands_run(rig_file):
    place = rig_file.parent
    for name in ("configs", "data_prep", "fsmde_jax"):
        (place / name).symlink_to(ROOT / name)
    block = re.search(r"```bash\n(.*?)```", TEXT, re.S).group(1)
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line)[1:]
        if words[1] == "data_prep.world":
            words += ["--scenes", "1", "--val_scenes", "1", "--frames", "1"]
        if words[1] == "fsmde_jax.main":
            words += ["--config.train.steps=2", "--config.data.batch_size=1", "--config.train.log_every=1"]
        done = subprocess.run([sys.executable, *words], cwd=place, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (place / "van.png").stat().st_size > 10_000
    assert (place / "runs/van/evaluation/world_val_surround.md").is_file()
