"""What ends a run before its last step, and that nothing is lost by it: toy runs, told to stop at chosen moments."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from fsmde_jax import eval_options, evaluate, history, loop, preemption, run_lock
from fsmde_jax.checkpoint import read_parameters
from fsmde_jax.errors import ConfigError, DataError, TrainingError
from fsmde_jax.preemption import Stopped, StopSignal
from fsmde_jax.train import train
from fsmde_jax.writer import Writer
from tests.sample_factory import make_rig, write_folder
from tests.test_train import final_parameters, losses, make_config, told_at
from tests.toy_encoder import toy_encoder

ROOT = Path(__file__).resolve().parent.parent
EVAL = "eval/metric/abs_rel"


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    samples = [make_rig(seed, cameras=3, native_size=(48, 80)).sample for seed in range(6)]
    return write_folder(tmp_path_factory.mktemp("records") / "train", samples)


@pytest.fixture(autouse=True, scope="module")
def toys():
    with toy_encoder():
        yield


class Killed(BaseException):
    """Stands for SIGKILL: no code of ours looks at it."""


def killed_at(patch, step):
    """The process is gone at `step`, once its line is in the log."""
    real = loop.Loop._log

    def log(self, now, *rest):
        real(self, now, *rest)
        if now == step:
            raise Killed

    patch.setattr(loop.Loop, "_log", log)


def evaluations(patch, values):
    """What evaluations find, by step, instead of evaluating; the list of steps at which they were made."""
    made = []

    class Found:
        def __init__(self, step):
            self.value = values[step]

        def flat(self):
            return {"metric/abs_rel": self.value, "metric/rmse": 1.0}

    def evaluate(step, records, options, *, stop):
        made.append(step)
        return Found(step)

    patch.setattr(loop.Loop, "_predict_with", lambda self, state: int(state.step))
    patch.setattr(loop.evaluate, "evaluate", evaluate)
    return made


def failing_writes(patch, steps):
    """Writing the checkpoint of these steps fails in the background, each once."""
    left, real = list(steps), ocp.JsonCheckpointHandler._save_fn

    async def save(self, x, directory):
        step = x.get("test_step")
        if step in left:
            left.remove(step)
            raise OSError(28, "No space left on device")
        await real(self, x, directory)

    patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", save)
    kept = loop.Loop._save

    def note(self, state, iterator):
        self.meta["test_step"] = int(state.step)
        kept(self, state, iterator)

    patch.setattr(loop.Loop, "_save", note)


def steps_of(workdir, name="checkpoints"):
    return sorted(int(path.name) for path in (workdir / name).iterdir() if path.name.isdigit())


def same(workdir, whole):
    """Losses, evaluations and parameters, bit for bit."""
    for key in ("train/loss", EVAL):
        assert losses(workdir, key) == losses(whole, key)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len((whole / "metrics.jsonl").read_text().splitlines())
    for which in ("latest", "best"):
        found, wanted = read_parameters(workdir, which), read_parameters(whole, which)
        jax.tree.map(np.testing.assert_array_equal, found[0], wanted[0])
        assert found[2] == wanted[2]


@pytest.fixture(scope="module")
def whole_run(records, toys, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    train(make_config(records, **{"train.eval_every": 4}), workdir)
    return workdir


@pytest.mark.parametrize(
    ("step", "every"), [(4, 2), *(pytest.param(step, 100, marks=pytest.mark.slow) for step in (4, 8))]
)
def test_a_signal_ends_an_evaluation_between_batches(records, whole_run, tmp_path, monkeypatch, step, every):
    """A checkpoint that is due is written before it, one that is not after it; the evaluation is made up."""
    workdir, seen = tmp_path / "run", []
    config = make_config(records, **{"train.eval_every": 4, "train.checkpoint_every": every})
    real = loop.Loop._predict_with

    def predict_with(self, state):
        predict = real(self, state)

        def told(batch):
            if int(state.step) == step:
                seen.append(self.checkpoints.tried)
                if len(seen) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
            return predict(batch)

        return told

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_predict_with", predict_with)
        with pytest.raises(Stopped, match=f"stopped by signal 15 after step {step}; its checkpoint is written") as told:
            train(config, workdir)
    assert told.value.status == 143
    assert seen == [step if every == 2 or step == 8 else -1] * 2  # of six rigs
    assert steps_of(workdir)[-1] == step and step not in losses(workdir, EVAL)
    train(config, workdir)
    same(workdir, whole_run)


def test_a_finished_run_is_not_evaluated_again_unless_it_ended_before_its_evaluation(records, tmp_path, monkeypatch):
    """The last step's checkpoint is written before the evaluation, so it cannot say that it was made."""
    workdir, config = tmp_path / "run", make_config(records, **{"train.eval_every": 3, "train.steps": 4})
    made = evaluations(monkeypatch, {3: 0.5, 4: 0.25})
    train(config, workdir)
    train(config, workdir)
    assert made == [3, 4]
    log = workdir / "metrics.jsonl"
    lines, values = log.read_text().splitlines(), losses(workdir, EVAL)
    assert values == {3: 0.5, 4: 0.25} and "eval/" in lines[-1]
    log.write_text("\n".join([*lines[:-1], lines[-1][:20]]))  # killed while that line was written
    train(config, workdir)
    assert made == [3, 4, 4] and losses(workdir, EVAL) == values
    assert log.read_text().splitlines() == lines and read_parameters(workdir, "best")[2] == 4
    train(config, workdir)
    assert made == [3, 4, 4]


def test_the_best_checkpoint_is_not_lost_with_the_steps_after_the_last_checkpoint(records, tmp_path, monkeypatch):
    """Best at 2, better at 4, killed before a checkpoint of 4: the run that goes on from 3 has the best of 2."""
    workdir, config = tmp_path / "run", make_config(records, **{"train.eval_every": 2, "train.steps": 6})
    evaluations(monkeypatch, {2: 0.5, 4: 0.25, 6: 0.375})
    for step, wanted in ((5, [2, 4]), (4, [2])):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, step)
            train(config, workdir)
        assert steps_of(workdir) == [3] and steps_of(workdir, "best") == wanted
    assert read_parameters(workdir, "best")[1]["best"]["value"] == 0.5
    train(config, workdir)
    meta, step = read_parameters(workdir, "best")[1:]
    assert (step, meta["best"]["value"]) == (4, 0.25)
    assert steps_of(workdir) == [3, 6] and steps_of(workdir, "best") == [2, 4]  # what 3 would go on from, and 6


def test_a_best_checkpoint_of_a_run_that_begins_again_is_in_nobodys_way(records, tmp_path, monkeypatch):
    """Killed after the first evaluation and before the first checkpoint."""
    workdir, config = tmp_path / "run", make_config(records, **{"train.eval_every": 1, "train.steps": 3})
    evaluations(monkeypatch, {1: 0.5, 2: 0.25, 3: 0.375})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 2)
        train(config, workdir)
    assert steps_of(workdir) == [] and steps_of(workdir, "best") == [1]
    train(config, workdir)
    assert read_parameters(workdir, "best")[2] == 2


def test_a_missing_or_damaged_best_checkpoint_is_said(records, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    evaluations(monkeypatch, {2: 0.5, 3: 0.75, 4: 0.875})
    train(make_config(records, **{"train.eval_every": 2, "train.steps": 3}), workdir)
    text = (workdir / "best" / "2" / "meta" / "metadata").read_text()
    (workdir / "best" / "2" / "meta" / "metadata").write_text(text.replace("0.5,", "0.6,", 1))
    shutil.copytree(workdir, tmp_path / "other")
    train(make_config(records, **{"train.eval_every": 2, "train.steps": 4}), workdir)
    assert "best/2: damaged checkpoint (its meta is not what was written" in capsys.readouterr().err
    assert read_parameters(workdir, "best")[2] == 4
    shutil.rmtree(tmp_path / "other" / "best")
    train(make_config(records, **{"train.eval_every": 2, "train.steps": 4}), tmp_path / "other")
    assert "the best checkpoint, of step 2, is gone" in capsys.readouterr().out


@pytest.mark.parametrize("told", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_a_write_that_fails_in_the_background_costs_nothing_else(records, tmp_path, monkeypatch, capsys, told):
    """Of step 3, say: the next state is tried and waited for, also where a signal ends the run with it."""
    workdir, config = tmp_path / "run", make_config(records, **{"train.steps": 5})
    evaluations(monkeypatch, {5: 0.5})
    failing_writes(monkeypatch, [3])
    if told:
        told_at(monkeypatch, told)
        with pytest.raises(Stopped, match="after step 4; its checkpoint is written"):
            train(config, workdir)
    else:
        train(config, workdir)
    said = capsys.readouterr().err
    assert "warning: " in said and "cannot write a checkpoint (" in said and "No space left" in said
    assert steps_of(workdir)[-1] == (4 if told else 5)
    assert not list((workdir / "checkpoints").glob("3*"))  # nor the half that was written


def test_two_writes_that_fail_one_after_the_other_end_the_run(records, tmp_path, monkeypatch):
    workdir, config = tmp_path / "run", make_config(records, **{"train.steps": 8, "train.checkpoint_every": 2})
    evaluations(monkeypatch, {8: 0.5})
    with monkeypatch.context() as patch:
        failing_writes(patch, [4, 5, 6])
        with pytest.raises(TrainingError, match=r"run/checkpoints: cannot write a checkpoint \(.*No space left"):
            train(config, workdir)
    assert steps_of(workdir) == [2]
    train(config, workdir)
    assert steps_of(workdir) == [6, 8]


def test_a_best_checkpoint_that_cannot_be_written_ends_the_run_at_a_saved_step(records, tmp_path, monkeypatch, capsys):
    workdir, config = tmp_path / "run", make_config(records, **{"train.eval_every": 2, "train.steps": 4})
    made = evaluations(monkeypatch, {2: 0.5, 4: 0.25})
    with monkeypatch.context() as patch:

        async def fail(self, x, directory):
            if x.get("best"):
                raise OSError(28, "No space left on device")
            await real(self, x, directory)

        real = ocp.JsonCheckpointHandler._save_fn
        patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", fail)
        with pytest.raises(TrainingError, match=r"run/best: cannot write"):
            train(config, workdir)
    assert "step 2 is saved; the same command goes on from there" in capsys.readouterr().out
    assert steps_of(workdir) == [2] and not list((workdir / "best").glob("2*"))  # nor the half that was written
    train(config, workdir)
    assert made == [2, 2, 4] and losses(workdir, EVAL) == {2: 0.5, 4: 0.25}
    assert read_parameters(workdir, "best")[2] == 4


def test_a_damaged_record_is_met_again_at_once(records, tmp_path, monkeypatch, capsys):
    """The state before it is saved; where the record is whole again, the run is that of records never damaged."""
    workdir, copy = tmp_path / "run", tmp_path / "records"
    config = make_config(copy, **{"train.checkpoint_every": 100, "data.batch_size": 1})
    evaluations(monkeypatch, {8: 0.5})
    shutil.copytree(records, copy)
    train(config, tmp_path / "whole")
    shard = sorted(path for path in copy.iterdir() if ".tfrecord-" in path.name and path.suffix != ".index")[-1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-40] + bytes(40))
    with pytest.raises(DataError, match=shard.name):
        train(config, workdir)
    (step,) = steps_of(workdir)
    assert 1 <= step < 8 and sorted(losses(workdir)) == list(range(1, step + 1))
    assert f"step {step} is saved; the same command goes on from there" in capsys.readouterr().out
    with pytest.raises(DataError, match=shard.name):
        train(config, workdir)
    assert steps_of(workdir) == [step] and max(losses(workdir)) == step
    shard.write_bytes(whole)
    train(config, workdir)
    same(workdir, tmp_path / "whole")


@pytest.mark.parametrize("what", ["log", *(pytest.param(name, marks=pytest.mark.slow) for name in ("metric", "bug"))])
def test_an_error_between_steps_saves_the_state(records, tmp_path, monkeypatch, what):
    workdir, config = tmp_path / "run", make_config(records, **{"train.eval_every": 2, "train.checkpoint_every": 100})
    made = evaluations(monkeypatch, {2: 0.5, 4: 0.25, 6: 0.1, 8: 0.05})
    with monkeypatch.context() as patch:
        expected, step = TrainingError, 5
        if what == "log":
            real = Writer.scalars

            def scalars(self, step, values):
                if step == 5:
                    raise TrainingError("cannot write the log")
                real(self, step, values)

            patch.setattr(Writer, "scalars", scalars)
        elif what == "metric":
            patch.setattr(eval_options, "check_best", lambda config: None)
            config.eval.best_metric, expected, step = "range_50_80/abs_rel", ConfigError, 2
        else:
            patch.setattr(loop.Loop, "_picture", lambda self, state, step: 1 / 0)
            config.train.picture_every, expected = 5, ZeroDivisionError
        with pytest.raises(expected):
            train(config, workdir)
    assert steps_of(workdir) == [step]
    config.train.picture_every, config.eval.best_metric = 0, "metric/abs_rel"
    train(config, workdir)
    assert final_parameters(workdir)[2] == 8 and made.count(2) == (2 if what == "metric" else 1)


def test_a_state_that_a_step_has_taken_or_that_is_not_finite_is_not_saved(records, tmp_path, monkeypatch):
    evaluations(monkeypatch, {8: 0.5})
    for name in ("taken", "infinite"):
        real = loop.Loop._steps

        def steps(self, state, iterator, step_fn, *rest, name=name, real=real):
            def step(state, batch, number):
                if number == 3 and name == "taken":
                    jax.tree.map(lambda leaf: leaf.delete(), state)
                    raise ValueError("of the device")
                new, metrics = step_fn(state, batch, number)
                if number == 3:
                    new = new.replace(params=jax.tree.map(lambda leaf: leaf * np.inf, new.params))
                return new, metrics

            real(self, state, iterator, step, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(loop.Loop, "_steps", steps)
            patch.setattr(loop.Loop, "_log", lambda self, step, *rest: step == 3 and 1 / 0)
            with pytest.raises((ValueError, ZeroDivisionError)):
                train(make_config(records), tmp_path / name)
        assert steps_of(tmp_path / name) == []


def test_the_last_losses_are_in_the_checkpoint(records, tmp_path, monkeypatch):
    """So a run that goes on knows a spike at once, as it would have."""
    evaluations(monkeypatch, {3: 0.5, 4: 0.5})
    train(make_config(records, **{"train.steps": 3}), tmp_path / "run")
    meta, curve = final_parameters(tmp_path / "run")[1], losses(tmp_path / "run")
    assert meta["losses"]["labelled"] == pytest.approx([curve[step] for step in (1, 2, 3)], rel=1e-6)
    monkeypatch.setattr(history, "SPIKE", 0.01)
    monkeypatch.setattr(history, "_ENOUGH", 3)
    train(make_config(records, **{"train.steps": 4}), tmp_path / "run")
    assert list(losses(tmp_path / "run", "train/loss_spike")) == [4]


def test_one_training_at_a_time_in_a_folder(records, tmp_path):
    """A process that is killed gives the lock back; those of one distributed run take one lock together."""
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom fsmde_jax import run_lock\n"
        "with run_lock.held(Path(sys.argv[1])) as locked:\n    print(locked, flush=True)\n    time.sleep(100)\n"
    )
    workdir, environment = tmp_path / "run", {**os.environ, "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen([sys.executable, "-c", script, str(workdir)], env=environment, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"True\n"
    with pytest.raises(ConfigError, match=rf"run: process {other.pid} on .*, begun 20.* trains here; wait for it"):
        train(make_config(records), workdir)
    with run_lock.held(workdir, active=False) as locked:
        assert not locked
    other.kill()
    other.communicate()
    for name in ("checkpoints/3.orbax-checkpoint-tmp", "best/4.orbax-checkpoint-tmp-12"):  # of the one that was killed
        (workdir / name / "model").mkdir(parents=True)
    with run_lock.held(workdir) as locked:
        assert locked
    train(make_config(records, **{"train.steps": 1, "train.eval_samples": 1}), workdir)
    assert steps_of(workdir) == [1] and not list(workdir.rglob("*orbax-checkpoint-tmp*"))


def test_without_locks_a_run_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    with run_lock.held(tmp_path / "run") as locked:
        assert not locked
    assert "no locks on this file system (Function not implemented)" in capsys.readouterr().out


def test_several_processes_get_the_answer_to_the_question_before(monkeypatch):
    """One process that passes for two: a signal is answered one question later, or at once where that is asked for."""
    from fsmde_jax import sharding

    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    with StopSignal(sharding.make_mesh()) as stop:
        stop.listen()
        assert stop.reached() == stop.reached() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert [stop.reached(), stop.reached()] == [0, 15]
        stop = StopSignal(sharding.make_mesh())
        stop._got = 2
        assert stop.reached(now=True) == 2


def test_the_first_process_of_a_container_ends_by_a_signal():
    script = "import os, time\nos.getpid = lambda: 1\nfrom fsmde_jax import preemption\npreemption.end_at_once()\n"
    script += "print(flush=True)\ntime.sleep(100)\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143


def test_devices_and_processes_are_said_first_and_idle_devices_noted(records, tmp_path, monkeypatch, capsys):
    evaluations(monkeypatch, {1: 0.5})
    config = make_config(records, **{"train.steps": 1})
    train(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.startswith("1 device(s), cpu, of 1 process(es)\n") and "note: eval.batch_size" not in said
    monkeypatch.setattr(evaluate.jax, "local_device_count", lambda: 4)
    for batch_size, noted in ((1, True), (6, True), (8, False)):
        evaluate.note_idle_devices(batch_size)
        said = capsys.readouterr().out
        assert (
            f"note: eval.batch_size = {batch_size} cannot be divided over this process's 4 devices" in said
        ) == noted
