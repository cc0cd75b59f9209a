"""Experiments: what is run, skipped, resumed and refused; tuning; the command line; one whole experiment."""

import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import base
from fsmde_jax.errors import ConfigError, DataError, TrainingError
from fsmde_jax.experiment import __main__ as experiment
from fsmde_jax.experiment import inputs as experiment_inputs
from fsmde_jax.experiment import parallel
from fsmde_jax.experiment import plan as experiment_plan
from fsmde_jax.experiment import runs as experiment_runs
from fsmde_jax.experiment.plan import TEST, Run
from fsmde_jax.experiment.suite import RigSetup, Row, Split, Sweep, load_suite
from tests import made_up_runs, rooms
from tests.made_up_runs import DATA, Jobs
from tests.sample_factory import write_folder


@pytest.fixture
def jobs(monkeypatch):
    made = Jobs()
    monkeypatch.setattr(experiment_runs, "train", made.train)
    monkeypatch.setattr(experiment_runs, "evaluate_run", made.evaluate_run)
    monkeypatch.setattr(experiment_runs, "release", lambda: None)
    return made


def _supervised(suite=None, count=2, phase=TEST):
    suite = suite or made_up_runs.suite()
    return [Run(suite, "ring", "supervised", seed, phase) for seed in range(count)]


def test_runs_are_done_once_and_leave_a_result(jobs, tmp_path, capsys):
    results = experiment.run_all(_supervised(), tmp_path, DATA)
    assert jobs.calls == [
        (what, f"supervised/seed{seed}") for seed in (0, 1) for what in ("train", "evaluate", "evaluate")
    ]
    folder = tmp_path / "small/ring/supervised/seed1"
    saved = json.loads((folder / "result.json").read_text())
    assert saved == json.loads(json.dumps(results[1]))
    assert saved["titles"] == {"lidar": "records/test, lidar", "dense": "records/test, dense"}
    assert (saved["seed"], saved["data"], saved["commit"], saved["commit_of_evaluation"][0]) == (1, DATA, "1" * 40, "2")
    assert saved["metrics"]["dense"]["metric/abs_rel"] == 0.2 and saved["teacher"] is None
    assert saved["training"]["from_step"] == 0 and saved["config"]["train"]["steps"] == 2
    assert "training output" in (folder / "log.txt").read_text()
    assert not (folder / "checkpoints").exists() and (folder / "best").exists()
    out = capsys.readouterr().out
    assert "training output" not in out and "[1/2] ring supervised seed 0: metric/abs_rel lidar 0.2000" in out
    assert re.search(r"\d+ s, 0:00:0\d left", out)
    jobs.calls.clear()
    assert experiment.run_all(_supervised(count=3), tmp_path, DATA)[:2] == [json.loads(json.dumps(r)) for r in results]
    assert {where for _, where in jobs.calls} == {"supervised/seed2"}
    assert "3 runs, 2 of them done before" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["train", "evaluate"])
def test_a_killed_run_goes_on(jobs, tmp_path, where):
    jobs.stop_at[where] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        experiment.run_all(_supervised(count=1), tmp_path, DATA)
    assert not list(tmp_path.rglob("result.json"))
    jobs.calls.clear()
    (result,) = experiment.run_all(_supervised(count=1), tmp_path, DATA)
    assert [what for what, _ in jobs.calls] == ["train"] * (where == "train") + ["evaluate", "evaluate"]
    assert result["training"]["from_step"] == (1 if where == "train" else 0)  # the fake left a checkpoint of step 1


@pytest.mark.parametrize("keep", ["none", "best", "all"])
def test_a_deleted_result_is_made_again_from_what_was_kept(jobs, tmp_path, keep):
    runs = _supervised(made_up_runs.suite(keep=keep), 1)
    (first,) = experiment.run_all(runs, tmp_path, DATA)
    folder = tmp_path / runs[0].folder
    assert [(folder / name / "1").is_dir() for name in ("checkpoints", "best")] == [keep == "all", keep != "none"]
    (folder / "result.json").unlink()
    jobs.calls.clear()
    (again,) = experiment.run_all(runs, tmp_path, DATA)
    assert [what for what, _ in jobs.calls] == ["train"] * (keep == "none") + ["evaluate", "evaluate"]
    assert again["metrics"] == first["metrics"] and again["training"]["from_step"] == 0


def test_a_run_whose_best_checkpoint_is_of_a_deleted_training_starts_from_nothing(jobs, tmp_path, monkeypatch):
    """`eval.checkpoint` = latest, but only the best was kept: the new training must not find the old one's best."""
    runs = _supervised(made_up_runs.suite(overrides={**made_up_runs.SETTINGS, "eval.checkpoint": "latest"}), 1)
    experiment.run_all(runs, tmp_path, DATA)
    folder = tmp_path / runs[0].folder
    (folder / "result.json").unlink()
    seen = []

    def train(config, workdir):
        seen.append((workdir / "best").exists())
        jobs.train(config, workdir)

    monkeypatch.setattr(experiment_runs, "train", train)
    experiment.run_all(runs, tmp_path, DATA)
    assert seen == [False] and (folder / "result.json").is_file()


def test_an_error_of_a_run_names_its_folder_and_log(jobs, tmp_path):
    jobs.stop_at["train"] = TrainingError("step 3: the loss is not finite")
    with pytest.raises(TrainingError, match=r"not finite[\s\S]*supervised/seed0; its output is in log.txt"):
        experiment.run_all(_supervised(), tmp_path, DATA)


def test_an_error_in_a_process_is_the_commands(tmp_path):
    """Their records are not there."""
    with pytest.raises(DataError, match=r"records/train[\s\S]*seed\d; its output is in log\.txt"):
        experiment.run_all(_supervised(), tmp_path, DATA, jobs=2)


def test_an_error_in_a_process_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "_timed", made_up_runs.first_fails)
    started = time.monotonic()
    with pytest.raises(DataError, match="the first"):
        experiment.run_all(_supervised(count=3), tmp_path, DATA, jobs=2)
    _wait(lambda: not multiprocessing.active_children(), 10)  # the executor's thread may be about to reap the last one
    assert time.monotonic() - started < 300


def test_processes_end_with_a_killed_command(tmp_path):
    """Its own clean-up does not run then."""
    script = (
        "from pathlib import Path\nfrom fsmde_jax.experiment import parallel\nfrom tests import made_up_runs\n"
        "from tests.test_experiment import _supervised\n"
        "if __name__ == '__main__':\n    parallel._timed = made_up_runs.sleeps\n"
        f"    list(parallel.execute_all(_supervised(), Path({str(tmp_path)!r}), {{}}, 2))\n"
    )
    path = tmp_path / "command.py"
    path.write_text(script)
    root = str(Path(__file__).resolve().parents[1])
    command = subprocess.Popen([sys.executable, str(path)], env={**os.environ, "PYTHONPATH": root})
    _wait(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    command.kill()
    command.wait()
    numbers = [int(path.stem) for path in tmp_path.glob("*.pid")]
    _wait(lambda: not any(Path(f"/proc/{number}").exists() for number in numbers))


def _wait(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_every_job_has_cores():
    assert [parallel.cores_of(i, 2, [0, 3, 4, 7, 8]) for i in (0, 1)] == [[0, 4, 8], [3, 7]]
    assert [parallel.cores_of(i, 3, [0, 1]) for i in range(3)] == [[0, 1]] * 3


def test_a_killed_process_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "_timed", made_up_runs.killed)
    with pytest.raises(TrainingError, match=r"a process of --jobs was killed[\s\S]*fewer --jobs"):
        experiment.run_all(_supervised(), tmp_path, DATA, jobs=2)


def test_a_finished_or_begun_run_of_another_config_is_refused(jobs, tmp_path):
    experiment.run_all(_supervised(count=1), tmp_path, DATA)
    other = made_up_runs.suite(overrides={**made_up_runs.SETTINGS, "train.steps": 4, "model.num_bins": 16})
    jobs.calls.clear()
    message = r"model\.num_bins: 8 there, 16 now\n  train\.steps: 2 there, 4 now"
    with pytest.raises(ConfigError, match=message):
        experiment.run_all(_supervised(other), tmp_path, DATA)
    folder = tmp_path / "small/ring/supervised/seed0"
    (folder / "result.json").unlink()  # begun, not finished
    with pytest.raises(ConfigError, match=message):
        experiment.run_all(_supervised(other), tmp_path, DATA)
    with pytest.raises(ConfigError, match="other val records"):
        experiment.run_all(_supervised(), tmp_path, {**DATA, "val": "d"})
    assert not jobs.calls


def test_a_key_that_came_later_is_a_difference_where_it_is_not_what_base_says(jobs, tmp_path):
    suite = made_up_runs.suite(overrides={k: v for k, v in made_up_runs.SETTINGS.items() if k != "model.focal_range"})
    own = Run(suite, "ring", "supervised", 0, TEST).config().model.focal_range  # the rig's, configs/nuscenes.py
    assert own != base.get_config().model.focal_range
    experiment.run_all(_supervised(suite, 1), tmp_path, DATA)
    path = tmp_path / "small/ring/supervised/seed0/result.json"
    content = json.loads(path.read_text())
    del content["config"]["eval"]["flip_tta"]
    path.write_text(json.dumps(content))
    experiment.run_all(_supervised(suite, 1), tmp_path, DATA)
    del content["config"]["model"]["focal_range"]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"model\.focal_range: unknown there, \(310"):
        experiment.run_all(_supervised(suite, 1), tmp_path, DATA)


def test_a_result_from_other_records_or_another_teacher_or_damaged_is_refused(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_runs, "_hash_of", lambda weights: "e" * 64)
    runs = [Run(made_up_runs.suite(), "ring", "ckd", 0, TEST)]
    (result,) = experiment.run_all(runs, tmp_path, DATA)
    assert result["teacher"] == {"weights": "tiny", "sha256": "e" * 64}
    with pytest.raises(ConfigError, match="other test records"):
        experiment.run_all(runs, tmp_path, {**DATA, "test": "d" * 64})
    monkeypatch.setattr(experiment_runs, "_hash_of", lambda weights: "f" * 64)
    with pytest.raises(ConfigError, match="another teacher"):
        experiment.run_all(runs, tmp_path, DATA)
    (tmp_path / runs[0].folder / "result.json").write_text("{")
    with pytest.raises(DataError, match=r"result\.json: damaged"):
        experiment.run_all(runs, tmp_path, DATA)


def test_the_shipped_teacher_is_named_by_its_hash():
    config = Run(made_up_runs.suite(), "ring", "ckd", 0, TEST).config()
    assert re.fullmatch("[0-9a-f]{64}", experiment_runs._teacher(config)["sha256"])


def test_tuning_chooses_by_val_and_the_test_phase_uses_it(jobs, tmp_path, capsys):
    suite = made_up_runs.suite()
    jobs.value = lambda config: {1e-3: 0.3, 3e-3: 0.25}[config.optim.lr]
    with pytest.raises(ConfigError, match=r"nothing is tuned yet[\s\S]*--phase tune --root \S+ --rows supervised"):
        experiment_runs.read_tuned(tmp_path, suite, "ring", ["supervised"], DATA)
    val = {role: DATA[role] for role in ("train", "val")}  # tuning never opens the test records
    experiment.tune(suite, "ring", ["supervised"], tmp_path, val)
    tuned = json.loads((tmp_path / "small/ring/tuned.json").read_text())
    row = tuned["rows"]["supervised"]
    assert row["chosen"] == {"optim.lr": 3e-3} and row["commits"] == ["1" * 40]
    assert "the best of supervised is at the end of the candidates" in capsys.readouterr().out
    assert [(c["overrides"], c["mean"]) for c in row["candidates"]] == [
        ({"optim.lr": 1e-3}, 0.3),
        ({"optim.lr": 3e-3}, 0.25),
    ]
    assert not list(tmp_path.rglob("best")) and len(list(tmp_path.rglob("result.json"))) == 2
    assert {what for what, _ in jobs.calls} == {"train", "evaluate"} and len(jobs.calls) == 4  # lidar only
    assert experiment_runs.read_tuned(tmp_path, suite, "ring", ["supervised"], DATA) == {
        "supervised": {"optim.lr": 3e-3}
    }
    with pytest.raises(ConfigError, match=r"ckd: not tuned yet[\s\S]*--rows ckd"):
        experiment_runs.read_tuned(tmp_path, suite, "ring", ["supervised", "ckd"], DATA)
    untuned = made_up_runs.suite(rows={**suite.rows, "ckd": Row({}, tuned=False)})
    assert experiment_runs.read_tuned(tmp_path, untuned, "ring", ["ckd"], DATA) == {"ckd": {}}


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        ({"candidates": ({"optim.lr": 1e-3}, {"optim.lr": 5e-3})}, {}, "the candidates"),
        ({"overrides": {**made_up_runs.SETTINGS, "train.steps": 4}}, {}, r"train\.steps: 2 there, 4 now"),
        ({}, {"val": "d"}, "val records"),
        ({"tuning_seeds": (100, 101)}, {}, r"tuning_seeds: \[100\] there, \[100, 101\] now[\s\S]*--rows supervised"),
        ({"metric": "metric/rmse"}, {}, r"tuned\.json[\s\S]*metric: metric/abs_rel there, metric/rmse now"),
    ],
)
def test_tuning_of_something_else_is_refused(jobs, tmp_path, changes, data, message):
    experiment.tune(made_up_runs.suite(), "ring", ["supervised"], tmp_path, DATA)
    with pytest.raises(ConfigError, match=message):
        experiment_runs.read_tuned(tmp_path, made_up_runs.suite(**changes), "ring", ["supervised"], {**DATA, **data})


def test_rows_that_another_metric_or_other_seeds_chose_do_not_stay_in_tuned_json(jobs, tmp_path):
    experiment.tune(made_up_runs.suite(), "ring", ["supervised"], tmp_path, DATA)
    other = made_up_runs.suite(rows={"supervised": Row({}), "plain": Row({})}, sweeps={}, metric="metric/rmse")
    experiment.tune(other, "ring", ["plain"], tmp_path, DATA)
    with pytest.raises(ConfigError, match="supervised: not tuned yet"):
        experiment_runs.read_tuned(tmp_path, other, "ring", ["supervised", "plain"], DATA)
    jobs.calls.clear()
    experiment.tune(other, "ring", ["supervised"], tmp_path, DATA)
    assert not jobs.calls  # chosen again from the runs that are there
    assert set(experiment_runs.read_tuned(tmp_path, other, "ring", ["supervised", "plain"], DATA)) == set(other.rows)


SUITE_FILE = """
import dataclasses
from fsmde_jax.experiment.suite import swept
from tests import made_up_runs

def get_suite():
    suite = made_up_runs.suite({place!r})
    rows = {{name: dataclasses.replace(row, seeds=1) for name, row in suite.rows.items()}}
    sweeps = {{"bins": swept("model.num_bins", (4, 8), ("supervised",), seeds=1)}}
    return dataclasses.replace(suite, rows=rows, sweeps=sweeps, candidates=suite.candidates[:1])
"""


@pytest.fixture(scope="module")
def room_records(tmp_path_factory):
    place = tmp_path_factory.mktemp("records")
    for start, role in enumerate(("train", "val", "test")):
        samples = [rooms.make(4 * start + k, cameras=3, native_size=(48, 80)) for k in range(4)]
        names = {"scenes": [f"{role}-{k}" for k in range(4)]}
        samples = [dataclasses.replace(s, scene=n) for s, n in zip(samples, names["scenes"], strict=True)]
        write_folder(place / role, samples, **names)
    return place


@pytest.fixture(scope="module")
def suite_file(room_records):
    path = room_records / "tiny_suite.py"
    path.write_text(SUITE_FILE.format(place=str(room_records)))
    return str(path)


def _main(*words):
    experiment.main([str(word) for word in words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "ablatoin"], "no file ablatoin.py; there are ablation"),
        (["--suite", "ablation"], "name a rig with --rig; ablation has nuscenes, ddad"),
        (["--suite", "ablation", "--rig", "kitti"], "--rig: unknown name 'kitti'. There are: nuscenes, ddad"),
        (["--suite", "ablation", "--rig", "ddad", "--rows", "ckt"], "did you mean 'ckd'?"),
        (["--suite", "ablation", "--rig", "ddad", "--sweeps", "bin"], "did you mean 'bins'?"),
        (["--suite", "ablation", "--rig", "ddad", "--phase", "tune", "--seeds", "1"], "not for --phase tune"),
        (["--suite", "ablation", "--rig", "ddad", "--seeds", "100"], "a test takes other seeds"),
        (["--suite", "ablation", "--report", "x", "--rows", "ckd"], "--suite, --rig and --root only"),
        (["--suite", "ablation", "--rig", "ddad", "--prepare", "--dry_run"], "only makes records"),
        (["--suite", "ablation", "--rig", "ddad", "--prepare", "--jobs", "2"], "only makes records"),
        (["--suite", "ablation", "--report", "x", "--jobs", "2"], "--suite, --rig and --root only"),
        (["--suite", "ablation", "--rig", "ddad", "--jobs", "0"], "--jobs 0: expected at least 1"),
    ],
)
def test_mistakes_on_the_command_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        _main(*words, "--root", "runs")
    assert error.value.code == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_missing_records_name_their_commands_and_prepare_runs_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suite.py").write_text(SUITE_FILE.format(place="records"))
    with pytest.raises(SystemExit):
        _main("--suite", "suite.py", "--rig", "ring")
    assert "python -m data_prep.world --out records\n  python -m make train" in capsys.readouterr().err
    ran = []

    class Done:
        returncode = 0

    monkeypatch.setattr(experiment_inputs.subprocess, "run", lambda words, check: ran.append(words[1:]) or Done)
    _main("--suite", "suite.py", "--rig", "ring", "--prepare", "--phase", "tune")
    assert ran == [["-m", "data_prep.world", "--out", "records"], *(["-m", "make", role] for role in ("train", "val"))]
    ran.clear()
    _main("--suite", "suite.py", "--rig", "ring", "--prepare")
    assert ran == [["-m", "data_prep.world", "--out", "records"], *(["-m", "make", role] for role in DATA)]
    ran.clear()
    for role in DATA:
        (tmp_path / "records" / role).mkdir(parents=True)
        (tmp_path / "records" / role / "manifest.json").touch()
    experiment_inputs.prepare(_taught_suite(), "ring", "test")
    assert ran == [["-m", "fsmde_jax.teacher_cache", "--out", "caches/tiny"]]  # after the records, which are there
    assert "other inputs: caches/tiny" in capsys.readouterr().out
    Done.returncode = 3
    with pytest.raises(DataError, match="ended with status 3"):
        experiment_inputs.prepare(_taught_suite(), "ring", "test")
    (tmp_path / "caches/tiny").mkdir(parents=True)
    (tmp_path / "caches/tiny/teacher_cache.json").touch()
    experiment_inputs.prepare(_taught_suite(), "ring", "test")


def _taught_suite(place="records"):
    """A rig that learns from a cache, and a sweep over teachers that nobody has made."""
    cache = Split("caches/tiny", ("python -m fsmde_jax.teacher_cache --out caches/tiny",))
    overrides = {"teacher.cache": "caches/tiny"}
    rig = RigSetup(config="nuscenes", **made_up_runs.splits(place), overrides=overrides, inputs=(cache,))
    weights = {"500": {"teacher.weights": "teachers/tiny_500.safetensors"}, "6000": {"teacher.weights": "tiny"}}
    return made_up_runs.suite(place, rigs={"ring": rig}, sweeps={"teacher": Sweep("steps", weights, ("ckd",), 1)})


def test_missing_teachers_and_caches_are_named_with_their_rows_and_what_makes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    suite, free = _taught_suite(), {"supervised": {}, "ckd": {}}
    runs = experiment_plan.planned_tests(suite, "ring", ["supervised", "ckd"], free, sweeps=["teacher"])

    def error_of(planned):
        with pytest.raises(DataError) as error:
            experiment_inputs.check_weights(planned)
        return str(error.value)

    make = "make it with --prepare, or:\n    python -m fsmde_jax.teacher_cache --out caches/tiny"
    text = error_of(runs)  # both at once; supervised needs neither
    assert f"caches/tiny (teacher.cache of ckd, ckd with teacher=500): {make}" in text
    assert "teachers/tiny_500.safetensors (teacher.weights of ckd with teacher=500): convert" in text
    assert "fsmde_jax.convert --weights <its workdir, or the file> --out teachers/tiny_500.safetensors" in text
    tuning = experiment_plan.planned_tuning(suite, "ring", ["ckd"])
    assert f"caches/tiny (teacher.cache of ckd): {make}" in error_of(tuning)
    unsaid = dataclasses.replace(suite.rigs["ring"], inputs=())
    undeclared = [Run(made_up_runs.suite(rigs={"ring": unsaid}), "ring", "ckd", 0, TEST)]
    text = error_of(undeclared)
    assert "no `inputs` of rig 'ring'" in text
    assert "--teacher tiny --records records/train --image_size 32x64 --out caches/tiny" in text
    for path in ("caches/tiny/teacher_cache.json", "teachers/tiny_500.safetensors"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    experiment_inputs.check_weights([*runs, *undeclared])


def test_the_command_stops_at_a_missing_teacher_before_any_run(room_records, jobs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "load_suite", lambda name: _taught_suite(str(room_records)))
    monkeypatch.chdir(tmp_path)
    words = ["--suite", "taught", "--rig", "ring", "--sweeps", "teacher"]
    _main(*words, "--dry_run")
    assert "missing: caches/tiny (teacher.cache of ckd" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        _main(*words)
    assert "tiny_500.safetensors (teacher.weights of ckd with teacher=500)" in capsys.readouterr().err
    assert not jobs.calls and not list(tmp_path.iterdir())


def test_records_to_measure_on_that_hold_scenes_of_the_train_records_are_refused(tmp_path, room_records):
    samples = [rooms.make(4 * 9 + k, cameras=3, native_size=(48, 80)) for k in range(2)]
    samples = [dataclasses.replace(s, scene=n) for s, n in zip(samples, ("other", "train-2"), strict=True)]
    write_folder(tmp_path / "test", samples, scenes=["other", "train-2"])
    splits = made_up_runs.splits(str(room_records))
    experiment_inputs.check_scenes(splits)
    message = r"test \(test\): 1 of its 2 scenes are in \S+train \(train\) too, e\.g\. 'train-2'"
    with pytest.raises(DataError, match=message):
        experiment_inputs.check_scenes({**splits, "test": Split(str(tmp_path / "test"), ())})
    with pytest.raises(DataError, match=r"test \(val\): 1 of its 2 scenes"):
        experiment_inputs.check_scenes({"train": splits["train"], "val": Split(str(tmp_path / "test"), ())})


def test_dry_run_lists_runs_and_computes_nothing(suite_file, jobs, tmp_path, capsys):
    made_up_runs.write(tmp_path, run := Run(load_suite(suite_file), "ring", "supervised", 0, TEST), {"seed": 0})
    _main("--suite", suite_file, "--rig", "ring", "--root", tmp_path, "--sweeps", "all", "--dry_run")
    out = capsys.readouterr().out
    assert f"done   {tmp_path / run.folder}" in out and f"to do  {tmp_path}/small/ring/supervised-bins=4/seed0" in out
    assert "3 runs: 1 done, 0 begun, 2 to do; 4 training steps at most" in out and not jobs.calls


@pytest.mark.parametrize("rig", ["nuscenes", "ddad"])
def test_every_config_of_the_ablation_suite_passes_the_jobs_checks(rig):
    suite = load_suite("ablation")
    free = {row: {} for row in suite.rows}
    runs = experiment_plan.planned_tests(suite, rig, list(suite.rows), free, sweeps=suite.sweeps)
    experiment.check([*experiment_plan.planned_tuning(suite, rig, suite.rows), *runs])
    wrong = dataclasses.replace(suite, rows={**suite.rows, "at": Row({"distill.baseline": "att"})})
    with pytest.raises(ConfigError, match=r"suite 'ablation', row 'at': distill\.baseline: unknown name 'att'"):
        experiment.check([Run(wrong, rig, "at", 0, TEST)])


def test_help_names_everything(capsys):
    with pytest.raises(SystemExit):
        _main("--help")
    out = capsys.readouterr().out
    for word in (
        "--suite",
        "--rig",
        "--root",
        "--rows",
        "--seeds",
        "--phase",
        "--sweeps",
        "--jobs",
        "--dry_run",
        "--report",
        "ablation",
    ):
        assert word in out


@pytest.mark.slow
def test_whole_experiment_on_real_jobs(suite_file, tmp_path, capsys):
    """Tune, test and report with the real jobs: two steps of supervised and distilled students."""
    root = tmp_path / "runs"
    words = ["--suite", suite_file, "--rig", "ring", "--root", root]
    with pytest.raises(SystemExit):
        _main(*words)
    assert "nothing is tuned yet" in capsys.readouterr().err
    _main(*words, "--phase", "tune", "--jobs", "2")
    assert multiprocessing.active_children() == []
    _main(*words, "--sweeps", "bins")
    _main(*words, "--sweeps", "bins")
    assert "3 runs, 3 of them done before" in capsys.readouterr().out
    result = json.loads((root / "small/ring/ckd/seed0/result.json").read_text())
    assert result["titles"]["dense"].startswith("test 1 train, DENSE ground truth")
    assert result["samples"] == {"lidar": 4, "dense": 4} and result["teacher"]["weights"] == "tiny"
    assert result["metrics"]["lidar"]["metric/abs_rel"] != result["metrics"]["dense"]["metric/abs_rel"]
    assert {"metric/a3", "median/abs_rel", "consistency/overall"} <= set(result["metrics"]["lidar"])
    assert result["training"]["seconds"] > 0 and result["hardware"]["platform"] == "cpu"
    _main("--suite", suite_file, "--root", root, "--report", tmp_path / "out")
    page = (tmp_path / "out/small.md").read_text()
    assert "| `ckd` | lr 0.001 | 1 |" in page and "### Tuning" in page
    assert (tmp_path / "out/small_ring_bins.png").is_file()
