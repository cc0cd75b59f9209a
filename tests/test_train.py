"""Whole runs: train, be killed, resume bit for bit, evaluate, fine-tune; and the ways in which a run must stop."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from configs import base
from fsmde_jax import checkpoint, history, loop, optim, trivial
from fsmde_jax.data.records import open_records
from fsmde_jax.errors import ConfigError, DataError, TrainingError
from fsmde_jax.evaluate import EvalOptions, evaluate, evaluate_run
from fsmde_jax.preemption import Stopped
from fsmde_jax.train import train
from tests import rooms
from tests.sample_factory import make_rig, write_folder
from tests.toy_encoder import toy_encoder

ROOT = Path(__file__).resolve().parent.parent


CONFIG_FILE = """
import json, ml_collections
def get_config():
    return ml_collections.ConfigDict(json.loads({overrides!r}))
"""


@pytest.fixture(autouse=True, scope="module")
def toys():
    """An encoder that compiles at once, once for all runs."""
    with toy_encoder():
        yield


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    samples = [make_rig(seed, cameras=3, native_size=(48, 80)).sample for seed in range(6)]
    return write_folder(tmp_path_factory.mktemp("records") / "train", samples)


def make_config(records, **changes):
    c = base.get_config()
    c.name = "test"
    c.data.train_records = c.data.eval_records = str(records)
    c.data.image_size = (32, 64)
    c.data.batch_size = 2
    c.model.decoder_channels = (4, 4, 8, 8, 8)
    c.model.num_bins = 8
    c.model.focal_range = (100.0, 900.0)
    c.optim.lr = 1e-3
    c.train.steps = 8
    c.train.log_every = 1
    c.train.checkpoint_every = 3
    c.train.eval_every = 0
    c.train.picture_every = 0
    c.eval.num_pictures = 0
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(scope="module")
def room_records(tmp_path_factory):
    samples = [rooms.make(seed, cameras=3, native_size=(48, 80)) for seed in range(4)]
    return write_folder(tmp_path_factory.mktemp("records") / "room", samples)


def command_line(config, path, workdir):
    """The command that trains `config` in a process of its own; the config is written to `path`."""
    path.write_text(CONFIG_FILE.format(overrides=config.to_json()))
    flags = ["--config", str(path), "--mode", "train", "--workdir", str(workdir)]
    return [sys.executable, "-m", "fsmde_jax.main", *flags]


def losses(workdir, key="train/loss"):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def final_parameters(workdir):
    return checkpoint.read_parameters(workdir, "latest")


@pytest.fixture(scope="module")
def whole_run(records, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    train(make_config(records, **{"train.eval_every": 4}), workdir)
    return workdir


def test_a_run_learns_and_leaves_everything_behind(whole_run):
    curve = losses(whole_run)
    assert sorted(curve) == list(range(1, 9))
    assert np.mean([curve[7], curve[8]]) < np.mean([curve[1], curve[2]])
    c = base.get_config().optim
    schedule = optim.learning_rate_schedule(
        lr=1e-3, warmup_steps=c.warmup_steps, steps=8, final_lr_scale=c.final_lr_scale
    )
    rates = losses(whole_run, "train/lr")
    np.testing.assert_allclose([rates[step] for step in range(1, 9)], [schedule(done) for done in range(8)], rtol=1e-6)
    identity = json.loads((whole_run / "identity.json").read_text())
    assert identity["versions"]["jax"] == jax.__version__
    assert identity["config"]["train"]["steps"] == 8
    assert len(identity["data"]["train"]) > 20
    assert json.loads((whole_run / "config.json").read_text())["model"]["num_bins"] == 8
    assert list((whole_run / "tensorboard").glob("events*"))
    _, meta, step = final_parameters(whole_run)
    assert step == 8
    assert meta["identity"]["data"] == identity["data"]


def test_a_student_can_be_trained_on_every_pixel_of_rendered_records(room_records, records, tmp_path):
    short = {"train.steps": 2, "train.checkpoint_every": 2, "train.eval_samples": 1, "train.log_every": 1}
    labels = {}
    for dense in (False, True):
        train(make_config(room_records, **short, **{"data.dense_depth": dense}), tmp_path / str(dense))
        lines = [json.loads(line) for line in (tmp_path / str(dense) / "metrics.jsonl").read_text().splitlines()]
        labels[dense] = [line["train/valid_pixels"] for line in lines if "train/valid_pixels" in line]
        assert all(np.isfinite(line["train/loss"]) for line in lines if "train/loss" in line)
    assert min(labels[True]) > 5 * max(labels[False])
    with pytest.raises(ConfigError, match=r"data.dense_depth = True: every pixel of every sample is a label"):
        train(make_config(room_records, **{"data.dense_depth": True, "data.label_fraction": 0.5}), tmp_path / "x")
    with pytest.raises(ConfigError, match=r"data\.dense_depth = True needs dense depth"):
        train(make_config(records, **{"data.dense_depth": True}), tmp_path / "without")


def test_evaluation_beside_trivial_predictors_and_on_dense_truth(whole_run, room_records, records, capsys):
    """`eval.trivial` fits on the training records; the files of the two ground truths never overwrite each other."""
    changes = {"data.eval_records": str(room_records), "eval.trivial": True}
    lidar = evaluate_run(make_config(records, **changes), whole_run)
    fitted = trivial.fit(open_records(records), (32, 64), min_depth=0.1, max_depth=80.0)
    own = evaluate(fitted["row median"], open_records(room_records), EvalOptions((32, 64)))
    assert lidar.trivial["row median"] == own.table["metric"]
    assert "trivial: ground plane, capped" in capsys.readouterr().out
    dense = {**changes, "data.train_records": str(room_records), "eval.ground_truth": "dense"}
    exact = evaluate_run(make_config(records, **dense), whole_run)
    assert exact.pixels["FRONT"] == 4 * 48 * 80 > lidar.pixels["FRONT"]
    names = {path.name for path in (whole_run / "evaluation").iterdir()}
    assert {"test_train_surround.md", "test_train_surround_dense.md"} <= names
    with pytest.raises(ConfigError, match=r"eval\.trivial with eval\.ground_truth = 'dense'.*none in"):
        evaluate_run(make_config(records, **{**dense, "data.train_records": str(records)}), whole_run)


def test_the_best_evaluation_is_kept_and_evaluate_restores_it(records, whole_run, capsys):
    _, meta, step = checkpoint.read_parameters(whole_run, "best")
    assert meta["best"]["step"] == step
    results = evaluate_run(make_config(records, **{"model.num_bins": 16, "model.bins": "linear"}), whole_run)
    assert "model.num_bins: checkpoint has 8, config has 16" in capsys.readouterr().out  # the checkpoint's own network
    assert results.flat()["metric/abs_rel"] == pytest.approx(meta["best"]["value"], rel=1e-5)
    tables = [json.loads(p.read_text()) for p in (whole_run / "evaluation").rglob("*.json")]
    assert any(t.get("identity", {}).get("data") for t in tables)
    assert [row for p in (whole_run / "evaluation").rglob("*.csv") for row in csv.reader(p.open())]


def test_finished_run_is_not_trained_again(records, whole_run):
    before = losses(whole_run)
    train(make_config(records), whole_run)
    assert losses(whole_run) == before


def test_resume_under_another_model_is_refused(records, whole_run):
    with pytest.raises(ConfigError, match=r"model.num_bins: checkpoint has 8, config has 16"):
        train(make_config(records, **{"model.num_bins": 16}), whole_run)


def test_resume_on_other_records_is_refused(whole_run, tmp_path):
    other = write_folder(
        tmp_path / "other", [make_rig(9, cameras=3, native_size=(48, 80)).sample] * 2, fingerprint="f" * 64
    )
    with pytest.raises(TrainingError, match="another layout"):
        train(make_config(other, **{"train.steps": 12}), whole_run)


def test_fine_tuning_starts_from_the_other_run(records, whole_run, tmp_path, capsys):
    config = make_config(records, **{"train.steps": 1, "optim.lr": 0.0})
    train(config, tmp_path / "tuned", init_from=str(whole_run))
    assert "best checkpoint" in capsys.readouterr().out
    old, _, _ = checkpoint.read_parameters(whole_run, "best")
    new, _, _ = final_parameters(tmp_path / "tuned")
    jax.tree.map(np.testing.assert_array_equal, new["params"], old["params"])  # rate 0: nothing moved


@pytest.mark.slow
def test_fine_tuning_from_a_run_that_was_never_evaluated_takes_its_latest(records, whole_run, tmp_path, capsys):
    """Such a run, killed early, has an empty best/."""
    source = tmp_path / "killed"
    shutil.copytree(whole_run, source)
    shutil.rmtree(source / "best")
    (source / "best").mkdir()
    train(make_config(records, **{"train.steps": 1, "optim.lr": 0.0}), tmp_path / "tuned", init_from=str(source))
    assert "latest checkpoint, step 8" in capsys.readouterr().out
    old, new = final_parameters(source)[0], final_parameters(tmp_path / "tuned")[0]
    jax.tree.map(np.testing.assert_array_equal, new["params"], old["params"])


def test_fine_tuning_from_another_model_is_refused(records, whole_run, tmp_path):
    with pytest.raises(TrainingError, match=r"does not fit[\s\S]*depth_bins"):
        train(make_config(records, **{"model.num_bins": 16}), tmp_path / "x", init_from=str(whole_run))


def test_loss_that_is_not_finite_stops_with_step_terms_and_records(records, tmp_path):
    wild = {"optim.lr": 1e30, "optim.clip_norm": 0.0, "optim.warmup_steps": 0}
    config = make_config(records, **wild, **{"train.max_skipped_steps": 0})
    with pytest.raises(TrainingError) as error:
        train(config, tmp_path / "run")
    message = str(error.value)
    assert "not finite" in message and "param_norm = inf" in message and "silog = " in message
    assert message.startswith("step 1: ")
    assert message.count(".tfrecord-0000") == 2 and message.count("sample sample-") == 2
    tree, meta, step = final_parameters(tmp_path / "run")  # what was good stays, at the step that had begun meanwhile
    assert step == meta["skipped"] == 2 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
    again = r"2 steps of this run were not finite[\s\S]*to go on from step 2, raise it"
    with pytest.raises(TrainingError, match=again):  # a scheduler's next try ends at once
        train(config, tmp_path / "run")
    train(make_config(records, **{"train.max_skipped_steps": 2, "train.steps": 3, "optim.lr": 1e-4}), tmp_path / "run")
    assert final_parameters(tmp_path / "run")[2] == 3


def test_steps_that_are_not_finite_are_left_out_and_counted_up_to_a_limit(records, tmp_path, capsys):
    wild = {"optim.lr": 1e30, "optim.clip_norm": 0.0, "optim.warmup_steps": 0}
    config = make_config(records, **wild, **{"train.max_skipped_steps": 5, "train.steps": 5})
    train(config, tmp_path / "run")
    said = capsys.readouterr().out
    for count in range(1, 6):
        assert re.search(rf"warning: step {count}: the loss or its gradient is not finite[\s\S]*sample sample-", said)
        assert f"({count} of at most 5)" in said
    assert losses(tmp_path / "run", "train/skipped_steps")[5] >= 4
    tree, meta, step = final_parameters(tmp_path / "run")
    assert meta["skipped"] == 5 and step == 5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
    with pytest.raises(TrainingError, match=r"step 6: [\s\S]*6 such steps in this run, train.max_skipped_steps = 5"):
        train(make_config(records, **wild, **{"train.max_skipped_steps": 5, "train.steps": 6}), tmp_path / "run")


def test_spikes_of_the_loss_are_logged_with_their_records(records, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(history, "SPIKE", 0.5)
    monkeypatch.setattr(history, "_ENOUGH", 3)
    train(make_config(records, **{"train.steps": 5}), tmp_path / "run")
    spikes = losses(tmp_path / "run", "train/loss_spike")
    assert set(spikes) <= {4, 5} and 4 in spikes
    curve = losses(tmp_path / "run")
    assert spikes[4] == pytest.approx(curve[4] / np.median([curve[k] for k in (1, 2, 3)]), rel=1e-5)
    assert re.search(r"warning: step 4: loss .* times the median of the last ones; its rigs:\n.*sample-",
                     capsys.readouterr().out)  # fmt: skip


def test_the_log_has_means_and_what_needs_labels_only_of_steps_that_have_some():
    """`data.labelled_samples` alternates steps with and without labels, so a line of the last step alone would lie."""
    steps = [
        {"loss": 2.0, "silog": 0.5, "ckd": 1.5, "valid_pixels": 100.0, "lr": 0.1, "skipped": 0.0},
        {"loss": 1.0, "silog": 0.0, "ckd": 1.0, "valid_pixels": 0.0, "lr": 0.2, "skipped": 0.0},
        {"loss": np.nan, "silog": np.nan, "ckd": 9.0, "valid_pixels": 50.0, "lr": 0.3, "skipped": 1.0},
        {"loss": 3.0, "silog": 0.7, "ckd": 0.5, "valid_pixels": 50.0, "lr": 0.4, "skipped": 0.0},
    ]
    whole, parts = history.Means(), history.Means()
    for number, values in enumerate(steps, 1):
        whole.add(number, values)
        whole.add(number, values)  # looked at twice, counted once
        parts = history.Means(json.loads(json.dumps(parts.kept)))  # killed and resumed after every step
        parts.add(number, values)
    found = whole.take(steps[-1])
    assert found == {"loss": 2.0, "silog": 0.6, "ckd": 1.0, "valid_pixels": 50.0, "lr": 0.4, "skipped": 0.0}
    assert parts.take(steps[-1]) == found
    whole.add(5, {**steps[1], "lr": 0.5})
    assert "silog" not in (unlabelled := whole.take(steps[1])) and unlabelled["loss"] == 1.0
    whole.add(6, steps[2])
    assert whole.take(steps[2])["skipped"] == 1.0 and np.isnan(whole.take(steps[2])["loss"])


def test_a_line_of_the_log_is_of_all_steps_since_the_one_before(records, whole_run, tmp_path):
    """Also of those before a checkpoint that the run goes on from."""
    config = make_config(records, **{"train.log_every": 4, "train.checkpoint_every": 3, "train.keep_checkpoints": 3})
    every = losses(whole_run, "train/silog")
    expected = pytest.approx({last: np.mean([every[last - k] for k in range(4)]) for last in (4, 8)}, rel=1e-6)
    train(config, tmp_path / "run")
    assert losses(tmp_path / "run", "train/silog") == expected
    shutil.rmtree(tmp_path / "run/checkpoints/8")
    train(config, tmp_path / "run")
    assert losses(tmp_path / "run", "train/silog") == expected


def test_a_spike_is_five_times_the_median():
    watch = history.Losses()
    assert [watch.spike(1.0) for _ in range(30)] == [0.0] * 30
    assert watch.spike(4.9) == 0 and watch.spike(5.1) == pytest.approx(5.1)
    assert watch.spike(100.0, labelled=False) == 0  # the first of its kind
    again = history.Losses(json.loads(json.dumps(watch.kept)))
    assert again.spike(6.0) == pytest.approx(6.0) and again.spike(600.0, labelled=False) == 0
    early = history.Losses()
    assert [early.spike(value) for value in (1.0, 100.0)] == [0.0, 0.0]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_run_told_to_stop_writes_a_checkpoint_and_goes_on_bit_for_bit(records, whole_run, tmp_path, number):
    """Its only checkpoint is that of the signal; status 143 or 130, as schedulers expect."""
    workdir = tmp_path / "run"
    config = make_config(records, **{"train.checkpoint_every": 100, "train.eval_every": 4})
    command = command_line(config, tmp_path / "config.py", workdir)
    command[command.index("fsmde_jax.main")] = "tests.toy_run"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (workdir / "metrics.jsonl").is_file() and losses(workdir):
            break
        time.sleep(0.005)
    process.send_signal(number)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 128 + number, said
    stopped = re.search(rf"stopped by signal {int(number)} after step (\d+); its checkpoint is written", said)
    assert stopped and [p.name for p in (workdir / "checkpoints").iterdir()] == [stopped.group(1)]
    assert int(stopped.group(1)) < 8
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 0 and f"at step {stopped.group(1)}" in again.stdout, again.stderr
    assert losses(workdir) == losses(whole_run)
    jax.tree.map(np.testing.assert_array_equal, final_parameters(workdir)[0], final_parameters(whole_run)[0])


def told_at(patch, step):
    """This process gets SIGTERM while a run is at `step`, once its line is in the log."""
    real = loop.Loop._log

    def log(self, now, *rest):
        real(self, now, *rest)
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(loop.Loop, "_log", log)


@pytest.mark.parametrize("step", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_an_evaluation_that_a_signal_forestalled_is_made_up_for(records, whole_run, tmp_path, monkeypatch, step):
    """At a step with an evaluation, and at the last one; twice, as if killed before another checkpoint was written."""
    workdir, config = tmp_path / "run", make_config(records, **{"train.eval_every": 4, "train.checkpoint_every": 100})
    with monkeypatch.context() as patch:
        told_at(patch, step)
        with pytest.raises(Stopped, match=f"after step {step}"):
            train(config, workdir)
    assert step not in losses(workdir, "eval/metric/abs_rel")
    shutil.copytree(workdir / "checkpoints", tmp_path / "kept")
    train(config, workdir)
    shutil.rmtree(workdir / "checkpoints")
    shutil.copytree(tmp_path / "kept", workdir / "checkpoints")
    train(config, workdir)
    for key in ("train/loss", "eval/metric/abs_rel"):
        assert losses(workdir, key) == losses(whole_run, key)
    best, wanted = (checkpoint.read_parameters(run, "best") for run in (workdir, whole_run))
    jax.tree.map(np.testing.assert_array_equal, best[0], wanted[0])
    assert best[2] == wanted[2]


@pytest.mark.slow
def test_the_optimiser_may_change_on_resume_and_another_state_is_no_damage(records, whole_run, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(whole_run, workdir)
    train(make_config(records, **{"train.steps": 9, "optim.clip_norm": 0.0, "optim.encoder_lr_scale": 0.1}), workdir)
    assert not (workdir / "damaged").exists() and 9 in losses(workdir)
    monkeypatch.setattr(optim, "make_optimizer", lambda **_: optax.sgd(1.0))
    with pytest.raises(ConfigError, match=r"checkpoints/9 holds the state of another optimiser"):
        train(make_config(records, **{"train.steps": 10}), workdir)
    assert not (workdir / "damaged").exists()


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(records, whole_run, tmp_path, capsys):
    workdir = tmp_path / "run"
    train(make_config(records, **{"train.eval_every": 4}), workdir)
    for path in (workdir / "checkpoints" / "8").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    train(make_config(records, **{"train.eval_every": 4}), workdir)
    said = capsys.readouterr()
    assert "checkpoints/8: damaged checkpoint" in said.err and "going on from step 6 instead of 8" in said.err
    assert "resuming" in said.out and "at step 6" in said.out
    assert [p.name for p in (workdir / "damaged").iterdir()] == ["8"]
    assert losses(workdir) == losses(whole_run)
    jax.tree.map(np.testing.assert_array_equal, final_parameters(workdir)[0], final_parameters(whole_run)[0])


def test_moving_averages_are_what_is_evaluated_and_exported(records, tmp_path):
    """Against NumPy on the checkpoints of every step; the raw parameters go on as without."""
    config = make_config(records, **{"optim.average_decay": 0.5, "train.checkpoint_every": 1, "train.steps": 4,
                                     "train.keep_checkpoints": 9})  # fmt: skip
    train(config, tmp_path / "run")
    plain = make_config(records, **{"train.checkpoint_every": 1, "train.steps": 4, "train.keep_checkpoints": 9})
    train(plain, tmp_path / "plain")
    raw = {}
    for step in (1, 2, 3, 4):
        raw[step] = checkpoint._arrays((tmp_path / "run" / "checkpoints" / str(step) / "model").resolve())
        alone = checkpoint._arrays((tmp_path / "plain" / "checkpoints" / str(step) / "model").resolve())
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), raw[step], alone)
    average = checkpoint._arrays((tmp_path / "run" / "checkpoints" / "1" / "average").resolve())
    for step in (2, 3, 4):
        decay = min(0.5, step / (9 + step))
        average = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, average, raw[step])
    for which in ("latest", "best"):
        tree, _, _ = checkpoint.read_parameters(tmp_path / "run", which)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), tree, average)
    # Started from another run, the average starts there, too.
    config = make_config(records, **{"optim.average_decay": 0.99, "train.steps": 1, "optim.lr": 0.0})
    train(config, tmp_path / "tuned", init_from=str(tmp_path / "run"))
    begun, _, _ = checkpoint.read_parameters(tmp_path / "run", "best")
    now, _, _ = checkpoint.read_parameters(tmp_path / "tuned", "latest")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), now["params"], begun["params"])
    with pytest.raises(ConfigError, match=r"optim.average_decay: checkpoint has 0.5, config has 0.0"):
        train(make_config(records, **{"train.steps": 5}), tmp_path / "run")


def test_a_batch_in_parts_trains_and_one_that_does_not_divide_is_refused(records, tmp_path):
    train(make_config(records, **{"train.batch_parts": 2, "train.steps": 2}), tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 2
    with pytest.raises(ConfigError, match=r"train.batch_parts = 2: data.batch_size = 3 cannot be divided"):
        train(make_config(records, **{"train.batch_parts": 2, "data.batch_size": 3}), tmp_path / "x")
    with pytest.raises(ConfigError, match=r"train.fsdp = 2: the 1 devices"):
        train(make_config(records, **{"train.fsdp": 2}), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_missing_records_name_the_command(tmp_path):
    config = make_config(tmp_path / "nowhere", **{"data.prepare_train": "python -m data_prep.nuscenes --split train"})
    with pytest.raises(
        DataError, match=r"nowhere[\s\S]*data.train_records[\s\S]*python -m data_prep.nuscenes --split train"
    ):
        train(config, tmp_path / "run")


def test_camera_outside_the_focal_range_and_shared_scenes_are_named(records, tmp_path, capsys):
    config = make_config(records, **{"model.focal_range": (500.0, 900.0), "train.steps": 1})
    train(config, tmp_path / "run")
    message = capsys.readouterr().err
    assert "warning" in message and "BACK_LEFT: focal length" in message and "(zoom 1.15)" in message
    assert "3 of 3 scenes of data.eval_records are in data.train_records too, e.g. 'scene-0'" in message


def test_batch_that_does_not_divide_is_refused_before_any_work(records, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(ConfigError, match=r"data.batch_size = 2 .*4 devices"):
        train(make_config(records), tmp_path / "run")


def test_without_evaluations_in_between_there_is_one_at_the_end(records, whole_run, tmp_path):
    """eval_every = 0 in the default mode: train, then evaluate the best checkpoint, which is the last one."""
    config = make_config(records, **{"train.steps": 2})
    train(config, tmp_path / "run")
    assert checkpoint.read_parameters(tmp_path / "run", "best")[2] == 2
    assert evaluate_run(config, tmp_path / "run").samples == 6


@pytest.mark.slow
def test_another_best_metric_starts_the_search_anew(records, whole_run, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(whole_run, workdir)
    train(make_config(records, **{"train.steps": 9, "eval.best_metric": "metric/rmse"}), workdir)
    assert "chosen anew" in capsys.readouterr().out
    _, meta, step = checkpoint.read_parameters(workdir, "best")
    assert step == 9 and meta["best"]["measured"]["metric"] == "metric/rmse"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval.protocol": "p1"}, "eval.protocol = 'p1': expected one of surround, vfdepth"),
        ({"eval.best_metric": "metric/absrel"}, "use e.g. 'metric/abs_rel'"),
        ({"eval.best_metric": "metric/a1"}, "cannot be minimised"),
        ({"eval.protocol": "vfdepth", "eval.best_metric": "shared_median/rmse"}, "under vfdepth"),
    ],
)
def test_evaluation_keys_are_checked_before_any_work(records, tmp_path, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(make_config(records, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()
