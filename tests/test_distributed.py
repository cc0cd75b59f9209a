"""Two real processes of four devices each on this machine: one run, the same as that of one process."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from fsmde_jax import checkpoint, distributed
from tests import rooms
from tests.sample_factory import write_folder
from tests.test_train import CONFIG_FILE, command_line, final_parameters, losses, make_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    samples = [rooms.make(seed, cameras=3, native_size=(48, 80)) for seed in range(11)]
    return write_folder(tmp_path_factory.mktemp("records") / "train", samples)


def config_of(records, **changes):
    common = {"data.batch_size": 8, "train.eval_every": 2, "train.steps": 4, "train.checkpoint_every": 2,
              "eval.batch_size": 1, "optim.average_decay": 0.5}  # fmt: skip
    return make_config(records, **{**common, **changes})


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def environment(devices, **others):
    return {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", **others}


def start(config, folder, workdir, mode="train_and_evaluate", toy=False, **others):
    """Both processes of a run; `toy`: with an encoder that compiles at once; others: of their environment."""
    command = command_line(config, folder / "config.py", workdir)
    command[command.index("--mode") + 1] = mode
    if toy:
        command[command.index("fsmde_jax.main")] = "tests.toy_run"
    port = free_port()
    # The first process alone would find programs in a cache, and wait for the other's compiling no longer than 30 s.
    others = {"JAX_ENABLE_COMPILATION_CACHE": "0", **others}
    flags = ["--distributed", f"--coordinator=localhost:{port}", "--num_processes=2"]
    return [
        subprocess.Popen(
            [*command, *flags, f"--process_id={k}"], cwd=ROOT, env=environment(4, **others), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for k in (0, 1)
    ]  # fmt: skip


def ended(processes, timeout=600):
    said = [process.communicate(timeout=timeout)[0] for process in processes]
    return said, [process.returncode for process in processes]


@pytest.fixture(scope="module")
def alone(records, tmp_path_factory):
    """One process of eight devices, with FSDP and a toy encoder."""
    return run_alone(records, tmp_path_factory.mktemp("alone"), toy=True)


@pytest.fixture(scope="module")
def real_alone(records, tmp_path_factory):
    """The same with a ResNet."""
    return run_alone(records, tmp_path_factory.mktemp("alone"), toy=False)


def run_alone(records, folder, toy, **changes):
    folder.mkdir(exist_ok=True)
    command = command_line(config_of(records, **{"train.fsdp": 2, **changes}), folder / "config.py", folder / "run")
    command[command.index("--mode") + 1] = "train_and_evaluate"
    if toy:
        command[command.index("fsmde_jax.main")] = "tests.toy_run"
    result = subprocess.run(
        command, cwd=ROOT, env=environment(8), capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "run"


def check_same(workdir, alone):
    """Losses to 1e-3. Rounding may move a maximum to another pixel, so gradients jump a little, and Adam makes whole
    steps of small ones; tests/test_sharding.py has an encoder without such jumps and a tighter tolerance."""
    tolerances = {"train/loss": 1e-3, "train/grad_norm": 0.05, "eval/metric/abs_rel": 0.01, "eval/metric/rmse": 0.01}
    for name, tolerance in tolerances.items():
        one, two = losses(alone, name), losses(workdir, name)
        assert one and sorted(one) == sorted(two)
        np.testing.assert_allclose(
            [two[s] for s in sorted(two)], [one[s] for s in sorted(one)], rtol=tolerance, err_msg=name
        )
    one, two = (final_parameters(folder)[0]["params"] for folder in (alone, workdir))
    apart = [np.abs(a - b).ravel() for a, b in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True)]
    assert np.concatenate(apart).max() < 2.1e-3  # the sum of the learning rates
    assert np.concatenate(apart).mean() < 5e-5
    tables = [json.loads(next((folder / "evaluation").glob("*.json")).read_text()) for folder in (alone, workdir)]
    assert tables[0]["samples"] == tables[1]["samples"] == 11 and tables[0]["pixels"] == tables[1]["pixels"]
    for name, value in tables[0]["table"]["metric"]["all"].items():
        assert tables[1]["table"]["metric"]["all"][name] == pytest.approx(value, rel=1e-2), name


@pytest.mark.parametrize(("fsdp", "encoder"), [(2, "toy"), pytest.param(8, "resnet18", marks=pytest.mark.slow)])
def test_two_processes_are_the_run_of_one(records, tmp_path, request, fsdp, encoder):
    """Records dealt out, one set of files, evaluation merged; the losses of one process to 1e-3.

    Parameters are divided within each process, or, over eight devices, so that each process holds half of them. With
    the toy a best checkpoint is begun while one process has yet to end the write of the latest.
    """
    alone = request.getfixturevalue("alone" if encoder == "toy" else "real_alone")
    config = config_of(records, **{"train.fsdp": fsdp})
    said, codes = ended(start(config, tmp_path, tmp_path / "run", toy=encoder == "toy", TOY_LATE="1"))
    assert codes == [0, 0], "\n".join(said)
    check_same(tmp_path / "run", alone)
    for text in ("step 4/4", "| metric |", "workdir: ", "device(s)"):
        assert text in said[0] and text not in said[1]  # only one of them prints and writes
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([step for step in lines if step == 1]) == 1
    assert json.loads((tmp_path / "run" / "identity.json").read_text())["hardware"]["device_count"] == 8


@pytest.mark.slow
def test_two_processes_are_taught_as_one_is(records, alone, tmp_path):
    """Both losses of distillation in the step; the teacher is the toy that `alone` trained."""
    taught = {"teacher.weights": str(alone), "teacher.dtype": "float32", "teacher.longer_side": 64, "train.fsdp": 2,
              "distill.w_ckd": 1.0, "distill.w_vr": 1.0, "distill.tokens": (2, 4)}  # fmt: skip
    one = run_alone(records, tmp_path / "one", True, **taught)
    said, codes = ended(start(config_of(records, **taught), tmp_path, tmp_path / "run", toy=True))
    assert codes == [0, 0], "\n".join(said)
    check_same(tmp_path / "run", one)
    for term in ("ckd_prob", "ckd_cross", "vrkd"):
        ours, theirs = (losses(folder, f"train/{term}") for folder in (tmp_path / "run", one))
        assert sorted(ours) == [1, 2, 3, 4] and min(ours.values()) > 0, term
        np.testing.assert_allclose([ours[s] for s in sorted(ours)], [theirs[s] for s in sorted(theirs)], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 0])
def test_one_process_killed_ends_the_other_and_a_restart_goes_on(killed, records, alone, tmp_path):
    workdir = tmp_path / "run"
    config = config_of(records, **{"train.fsdp": 2})
    processes = start(config, tmp_path, workdir, toy=True, TOY_EVALUATION="3")
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if (workdir / "checkpoints" / "2").is_dir():
            break
        time.sleep(0.01)
    gone, other = processes[killed], processes[1 - killed]
    assert gone.poll() is None, ended(processes)
    gone.send_signal(signal.SIGKILL)
    at = time.monotonic()
    said, _ = other.communicate(timeout=distributed.PEER_TIMEOUT + 60)
    assert other.returncode != 0
    assert time.monotonic() - at < distributed.PEER_TIMEOUT + 30
    assert re.search(r"lost the others|distributed service detected fatal errors", said), said
    gone.communicate()
    said, codes = ended(start(config, tmp_path, workdir, toy=True))
    assert codes == [0, 0], "\n".join(said)
    assert "at step 2" in said[0]
    check_same(workdir, alone)


@pytest.mark.slow
def test_an_error_of_one_process_ends_both(records, tmp_path):
    """A record that only process 1 reads is damaged."""
    broken = tmp_path / "records"
    shutil.copytree(records, broken)
    shard = next(p for p in sorted(broken.iterdir()) if p.name.endswith("00001-of-00002"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    shard.write_bytes(content)
    started = time.monotonic()
    said, codes = ended(start(config_of(broken, **{"train.fsdp": 2}), tmp_path, tmp_path / "run"), 400)
    assert all(code != 0 for code in codes), said
    assert any("error: process" in text and shard.name in text for text in said), said
    assert time.monotonic() - started < 300


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_one_step(records, tmp_path):
    workdir = tmp_path / "run"
    config = config_of(records, **{"train.steps": 2000, "train.checkpoint_every": 5000, "train.eval_every": 0})
    processes = start(config, tmp_path, workdir, "train", toy=True)
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if (workdir / "metrics.jsonl").is_file() and losses(workdir):
            break
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    said, codes = ended(processes, 120)
    assert codes == [143, 143], "\n".join(said)
    steps = [int(re.search(r"stopped by signal 15 after step (\d+)", text).group(1)) for text in said]
    assert steps[0] == steps[1] == checkpoint.read_parameters(workdir, "latest")[2]


def wait_for(condition, processes):
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(ended(processes, 10))


@pytest.mark.slow
def test_a_signal_to_one_process_ends_an_evaluation_in_both(records, tmp_path):
    """Between batches, with the step's checkpoint; shares of eight and three rigs are asked for equally often."""
    workdir = tmp_path / "run"
    config = config_of(records, **{"train.eval_every": 3, "train.checkpoint_every": 3})
    processes = start(config, tmp_path, workdir, "train", toy=True, TOY_EVALUATION="3")
    wait_for((workdir / "checkpoints" / "3").is_dir, processes)
    processes[1].send_signal(signal.SIGTERM)
    told = time.monotonic()
    said, codes = ended(processes, 120)
    assert codes == [143, 143], "\n".join(said)
    assert time.monotonic() - told < 20  # of 24 s and more
    assert all("stopped by signal 15 after step 3; its checkpoint is written" in text for text in said)
    assert not losses(workdir, "eval/metric/abs_rel")
    said, codes = ended(start(config, tmp_path, workdir, "train", toy=True))
    assert codes == [0, 0], "\n".join(said)
    assert sorted(losses(workdir, "eval/metric/abs_rel")) == [3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_a_signal_outside_of_the_loop_ends_a_process_at_once(records, tmp_path, mode):
    """While a run that goes on starts, and in an evaluation of its own: there is nothing to lose."""
    workdir = tmp_path / "run"
    config = config_of(records, **{"train.steps": 2})
    said, codes = ended(start(config, tmp_path, workdir, "train", toy=True))
    assert codes == [0, 0], "\n".join(said)
    config.train.steps = 2000
    (workdir / "config.json").unlink()
    processes = start(config, tmp_path, workdir, mode, toy=True, TOY_EVALUATION="30")
    if mode == "train":  # all but the evaluation of step 2 that the higher number of steps makes due
        wait_for((workdir / "config.json").is_file, processes)
    else:
        time.sleep(25)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    said, codes = ended(processes, 100)
    assert time.monotonic() - told < 30
    assert -signal.SIGTERM in codes, "\n".join(said)  # a shell's 143; one that sees the other go first may end by that
    assert max(losses(workdir)) == 2


@pytest.mark.slow
def test_of_steps_that_are_not_finite_each_process_names_its_records(records, tmp_path):
    wild = {"optim.lr": 1e30, "optim.clip_norm": 0.0, "optim.warmup_steps": 0, "train.max_skipped_steps": 0}
    processes = start(config_of(records, **wild), tmp_path, tmp_path / "run", "train", toy=True)
    said, codes = ended(processes, 200)
    assert codes == [1, 1], "\n".join(said)
    for k, text in enumerate(said):
        assert f"error: process {k}: step 1: the loss or its gradient is not finite" in text
        assert text.split("error: ")[1].count(": sample ") == 4  # of eight rigs
    assert checkpoint.read_parameters(tmp_path / "run", "latest")[2] == 2


def test_processes_that_do_not_find_each_other_say_what_to_give(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG_FILE.format(overrides=make_config("nowhere").to_json()))
    command = command_line(make_config("nowhere"), tmp_path / "config.py", tmp_path / "run")
    result = subprocess.run(
        [*command, "--distributed"], cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "do not find each other" in result.stderr and "--coordinator=<host of process 0>" in result.stderr
    wrong = subprocess.run([*command, "--process_id=0"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 1 and "belong to --distributed" in wrong.stderr


def test_sums_of_nested_numbers():
    a = {"x": 1, "m": {"k": [1.0, 2.0]}, "only": {"a": 5}}
    b = {"x": 2, "m": {"k": [10.0, 20.0], "l": 3}}
    assert distributed.added(a, b) == {"x": 3, "m": {"k": [11.0, 22.0], "l": 3}, "only": {"a": 5}}
    assert distributed.total(a) is a  # of one process
