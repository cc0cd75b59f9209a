"""The distillation step of the paper's setting lowers for TPU, on one device and sharded over eight.

Lowered, not compiled and not run: nobody here has a TPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import rooms
from tests.sample_factory import write_folder

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    samples = [rooms.make(seed, cameras=6, native_size=(48, 96)) for seed in range(2)]
    return write_folder(tmp_path_factory.mktemp("records") / "rooms", samples)


@pytest.mark.parametrize(
    ("devices", "overrides"),
    [
        (1, ['distill.baseline="fitnets"']),
        (8, ["train.fsdp=4", "data.batch_size=16", "train.batch_parts=2", "optim.average_decay=0.999"]),
        pytest.param(*(8, ['model.encoder="resnet18"', "teacher.remat=false"]), marks=pytest.mark.slow),
    ],
)
def test_the_distillation_step_lowers_for_tpu(records, devices, overrides):
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.tpu_lowering", str(records), *overrides], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    facts = json.loads(result.stdout.splitlines()[-1])
    assert facts["platforms"] == ["tpu"] and facts["devices"] == devices
    assert facts["convolutions"] > 20 and facts["bfloat16"]
    # The program of a TPU, not of the machine that lowers it: depthwise convolutions are none of shifts, with a loop
    # over rows in their gradient, and a teacher sees all images at once. The one loop is a search in the Chamfer term.
    resnet = any("resnet" in override for override in overrides)
    assert (facts["depthwise"] > 0) != resnet
    assert (facts["loops"] > 1) == any("batch_parts" in override for override in overrides)
    # What is left to the compiler are shardings and plain operations, no kernels of another platform.
    known = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "LayoutConstraint"}
    assert set(facts["calls"]) <= known, facts["calls"]
    assert facts["bytes"] < 20e6  # no weights baked in
