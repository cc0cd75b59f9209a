"""Whole runs with a real encoder (test_train.py has a toy): killed, of several devices, from pretrained parameters."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from fsmde_jax import checkpoint, weights
from fsmde_jax.evaluate import evaluate_run
from fsmde_jax.train import train
from tests.sample_factory import make_rig, write_folder
from tests.test_train import command_line, final_parameters, losses, make_config
from tests.test_weights import fake_tensors

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    samples = [make_rig(seed, cameras=3, native_size=(48, 80)).sample for seed in range(6)]
    return write_folder(tmp_path_factory.mktemp("records") / "train", samples)


@pytest.fixture(scope="module")
def whole_run(records, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    train(make_config(records, **{"train.eval_every": 4}), workdir)
    return workdir


def test_killed_run_resumes_bit_for_bit(records, whole_run, tmp_path):
    """SIGKILL in the middle, start again: the same losses and parameters as the run that nobody killed."""
    workdir = tmp_path / "run"
    command = command_line(make_config(records, **{"train.eval_every": 4}), tmp_path / "config.py", workdir)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (workdir / "checkpoints" / "3").is_dir():
            break
        time.sleep(0.01)
    assert process.poll() is None, process.stdout.read()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (workdir / "checkpoints" / "8").is_dir()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stdout
    assert losses(workdir) == losses(whole_run)
    jax.tree.map(np.testing.assert_array_equal, final_parameters(workdir)[0], final_parameters(whole_run)[0])


@pytest.mark.slow
def test_a_run_killed_again_and_again_is_the_run_that_nobody_killed(records, whole_run, tmp_path):
    """SIGKILL at random times, those of starting, compiling, evaluating and checkpointing among them."""
    workdir, rng, kills = tmp_path / "run", np.random.default_rng(0), 0
    config = make_config(records, **{"train.eval_every": 4, "train.checkpoint_every": 1})
    command = command_line(config, tmp_path / "config.py", workdir)
    started = time.monotonic()
    subprocess.run([*command[:-1], str(tmp_path / "timed")], cwd=ROOT, check=True, capture_output=True, timeout=240)
    usual = time.monotonic() - started
    for _ in range(60):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(0.3, 1.0) * usual)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0
        break
    assert kills >= 3 and process.returncode == 0
    assert losses(workdir) == losses(whole_run)
    jax.tree.map(np.testing.assert_array_equal, final_parameters(workdir)[0], final_parameters(whole_run)[0])


def test_pretrained_encoder_is_where_training_starts(records, tmp_path):
    """A torchvision-style file: after a step of rate 0 the encoder holds exactly its numbers."""
    from safetensors.numpy import save_file

    tensors = fake_tensors("resnet18", weights.torchvision_resnet_name)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, tmp_path / "resnet18.safetensors")
    config = make_config(
        records, **{"train.steps": 1, "optim.lr": 0.0, "train.encoder_weights": str(tmp_path / "resnet18.safetensors")}
    )
    train(config, tmp_path / "run")
    encoder = final_parameters(tmp_path / "run")[0]["params"]["backbone"]
    np.testing.assert_array_equal(encoder["conv1"]["kernel"], tensors["conv1.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(encoder["layer4_1"]["bn2"]["bias"], tensors["layer4.1.bn2.bias"])


@pytest.mark.slow  # test_sharding has its small instance: eight devices, and two that go on
def test_two_devices_give_the_same_run_and_one_device_can_go_on(records, whole_run, tmp_path):
    """Data parallel over 2 virtual devices, then evaluation, fine-tuning and resume on one."""
    workdir = tmp_path / "run"
    config = make_config(records, **{"train.eval_every": 4, "eval.batch_size": 2})
    command = command_line(config, tmp_path / "config.py", workdir)
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((workdir / "identity.json").read_text())["hardware"]["device_count"] == 2
    one, two = losses(whole_run), losses(workdir)
    np.testing.assert_allclose([two[s] for s in sorted(two)][:4], [one[s] for s in sorted(one)][:4], rtol=1e-3)
    evaluated = evaluate_run(make_config(records), workdir).flat()["metric/abs_rel"]
    assert evaluated == pytest.approx(checkpoint.read_parameters(workdir, "best")[1]["best"]["value"], rel=1e-4)
    train(make_config(records, **{"train.steps": 1}), tmp_path / "tuned", init_from=str(workdir))
    train(make_config(records, **{"train.steps": 9}), workdir)
    assert sorted(losses(workdir)) == list(range(1, 10))
