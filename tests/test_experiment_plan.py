"""Suites and what is planned of them: folders, configs, refusals."""

import json
import re
import shlex

import pytest

from configs import base
from data_prep.world import __main__ as world
from fsmde_jax.errors import ConfigError
from fsmde_jax.experiment import plan as experiment_plan
from fsmde_jax.experiment.plan import TEST, Run, changed, label_of, planned_tests, planned_tuning
from fsmde_jax.experiment.suite import Row, load_suite, swept
from fsmde_jax.names import check_name, flatten, nearest
from tests import made_up_runs

FREE = {"supervised": {}, "ckd": {}}


def test_the_ablation_suite_says_what_it_should():
    suite = load_suite("ablation")
    assert set(suite.rigs) == {"nuscenes", "ddad"}
    others = {"response", "fitnets", "at", "sp", "rkd", "cwd", "dist", "cirkd"}
    affine = {"bins_kd_affine", "ckd_affine", "ckd_vrkd_affine"}
    core = {"supervised", "bins_kd", "ckd", "vrkd", "ckd_vrkd"} | affine
    (bound,) = [name for name, row in suite.rows.items() if row.bound]
    assert set(suite.rows) == core | others | {bound}
    assert {name: row.seeds for name, row in suite.rows.items()} == {n: 5 if n in core else 3 for n in suite.rows}
    config = {name: Run(suite, "nuscenes", name, 0, TEST).config() for name in suite.rows}
    assert (config["bins_kd"].distill.w_ckd, config["bins_kd"].distill.w_cross) == (1.0, 0.0)
    plain = config["supervised"]
    assert not (plain.teacher.weights or plain.distill.w_ckd or plain.distill.w_vr or plain.distill.baseline)
    assert config["ckd_vrkd"].distill.w_ckd and config["ckd_vrkd"].distill.w_vr and config["vrkd"].distill.w_ckd == 0
    assert all(config[name].teacher.weights == "lite0" for name in (core | others) - {"supervised"})
    assert {config[name].distill.baseline for name in others} == others
    ours = {key for name in core | others for key in suite.rows[name].overrides}
    assert all(key.startswith(("teacher.", "distill.")) for key in ours)  # rows differ in nothing else
    assert all(key.startswith("data.") for key in suite.rows[bound].overrides) and config[bound].data.dense_depth
    assert {name for name, c in config.items() if c.distill.shift == "unknown"} == affine
    assert {name for name, c in config.items() if c.distill.bins != "aligned"} == {"supervised", bound}
    features = {"vrkd", "ckd_vrkd", "ckd_vrkd_affine", "fitnets", "at", "sp", "rkd", "cwd", "cirkd"}
    assert {name for name, c in config.items() if not c.teacher.cache} == features
    assert all(c.data.labelled_samples == 20 * (name != bound) for name, c in config.items())
    for name, rig in suite.rigs.items():
        weights, cache = rig.inputs
        assert weights.records == plain.train.encoder_weights and cache.records == f"caches/ablation_{name}_lite0"
        assert cache.commands[:-1] == rig.train.commands
        seeds = [set(re.findall(r"--seed (\d+)", " ".join(s.commands))) for s in (rig.train, rig.val, rig.test)]
        assert seeds[0] == seeds[1] and not seeds[0] & seeds[2]
        assert len({rig.train.records, rig.val.records, rig.test.records}) == 3


def test_every_key_of_the_ablation_suite_is_declared():
    suite = load_suite("ablation")
    declared = flatten(base.get_config().to_dict())
    parts = [suite.overrides, *(rig.overrides for rig in suite.rigs.values())]
    parts += [row.overrides for row in suite.rows.values()]
    parts += [c for name in suite.rows for c in suite.candidates_of(name)]
    parts += [overrides for sweep in suite.sweeps.values() for overrides in sweep.values.values()]
    assert not {key for part in parts for key in part} - set(declared)
    for name, sweep in suite.sweeps.items():
        for row in sweep.rows:
            same = [experiment_plan.is_base(suite, "ddad", row, overrides) for overrides in sweep.values.values()]
            assert sum(same) == 1, (name, row)  # one value of every sweep is the row itself


def test_longer_trainings_of_the_ablation_suite_are_a_sweep_with_equally_many_evaluations():
    suite = load_suite("ablation")
    sweep = suite.sweeps["steps"]
    assert list(sweep.values) == ["600", "1200", "2400"] and sweep.rows == ("supervised", "ckd", "ckd_vrkd")
    free = {row: {} for row in sweep.rows}
    runs = planned_tests(suite, "nuscenes", sweep.rows, free, seeds=[0], sweeps=["steps"])
    trains = {run.group: run.config().train for run in runs}
    assert {g: (t.steps, t.eval_every) for g, t in trains.items() if g.startswith("ckd_vrkd")} == {
        "ckd_vrkd-steps=600": (600, 120), "ckd_vrkd": (1200, 240), "ckd_vrkd-steps=2400": (2400, 480)
    }  # fmt: skip
    assert len(runs) == 9  # 1200 steps are the rows' own runs
    assert all(train.steps % train.eval_every == 0 for train in trains.values())


def test_the_worlds_of_the_ablation_suite_can_be_rendered():
    for name, rig in load_suite("ablation").rigs.items():
        looks = []
        for split in (rig.train, rig.val, rig.test):
            render, convert = (shlex.split(command) for command in split.commands)
            assert render[:3] == ["python", "-m", "data_prep.world"] and convert[2] == f"data_prep.{name}"
            args = world.parser().parse_args(render[3:])
            looks.append(world.look_of(args))
            assert looks[-1].size == tuple(rig.overrides["data.image_size"]) and looks[-1].rig == name
            assert convert[convert.index("--out") + 1] == split.records
            assert any(word.startswith(args.out) for word in convert)
        assert looks[0] == looks[1] and looks[0].seed != looks[2].seed


def test_results_from_before_the_choice_of_an_expectation_are_those_of_the_mean_of_depth():
    now = flatten(base.get_config().to_dict())
    before = {key: value for key, value in now.items() if key != "model.expectation"}
    assert changed(before, now, now) == ["model.expectation: 'depth' there, 'log' now"]
    assert changed(before, {**now, "model.expectation": "depth"}, now) == []


def test_runs_have_their_own_folders_and_a_sweep_takes_the_rows_own_runs():
    suite = made_up_runs.suite()
    runs = planned_tests(
        suite, "ring", ["supervised", "ckd"], {"supervised": {"optim.lr": 3e-3}, "ckd": {}}, sweeps=["bins"]
    )
    folders = [run.folder.as_posix() for run in runs]
    rows = [
        f"small/ring/{row}/seed{seed}" for seed in range(5) for row in ("supervised", "ckd") if row != "ckd" or seed < 3
    ]
    sweep = [f"small/ring/{row}-bins=4/seed{seed}" for seed in range(2) for row in ("supervised", "ckd")]
    assert folders == rows + sweep  # the value 8 is the rows' own
    config = runs[-2].config()
    assert (config.model.num_bins, config.seed, config.optim.lr, config.train.steps) == (4, 1, 3e-3, 2)
    assert config.data.eval_records == "records/val"
    assert runs[0].evaluation_config("dense").data.eval_records == "records/test"
    assert runs[0].evaluation_config("dense").eval.ground_truth == "dense"
    tuning = planned_tuning(suite, "ring", ["ckd"])
    assert [run.folder.as_posix() for run in tuning] == [
        "small/ring/ckd-tune_lr=0.001/seed100", "small/ring/ckd-tune_lr=0.003/seed100"
    ]  # fmt: skip
    both = planned_tuning(suite, "ring", ["supervised", "ckd"])
    assert [(run.row, run.overrides["optim.lr"]) for run in both] == [
        ("supervised", 1e-3), ("ckd", 1e-3), ("supervised", 3e-3), ("ckd", 3e-3)
    ]  # fmt: skip
    assert planned_tuning(suite, "ring", []) == []
    assert tuning[0].evaluation_config("lidar").data.eval_records == "records/val"
    assert [run.seed for run in planned_tests(suite, "ring", ["ckd"], FREE, seeds=[7, 9])] == [7, 9]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Big-Suite"}, "small letters"),
        ({"reference": "superwised"}, "did you mean 'supervised'"),
        ({"keep": "some"}, "all, best, none"),
        ({"truths": ("radar",)}, "lidar, dense"),
        ({"tuning_seeds": (4,)}, "5 and above"),
        (
            {"rows": {"supervised": Row({}), "ckd": Row({}, candidates=({"optim.lr": 1.0},))}, "sweeps": {}},
            "equally many",
        ),
        ({"sweeps": {"bins": swept("model.num_bins", (4,), ("vrkd",))}}, "unknown name 'vrkd'"),
        ({"sweeps": {"lr": swept("optim.lr", (4.0,), ("ckd",))}}, "tuned and swept"),
        ({"sweeps": {"size": swept("data.image_size", ((32, 64),), ("ckd",))}}, "label"),
    ],
)
def test_a_suite_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        made_up_runs.suite(**changes)


def test_overrides_that_fit_no_key_are_refused():
    suite = made_up_runs.suite(overrides={"optim.learning_rate": 1.0})
    with pytest.raises(ConfigError, match=r"suite 'small', ring, ckd: config key: unknown name 'optim.learning_rate'"):
        Run(suite, "ring", "ckd", 0, TEST).config()
    with pytest.raises(ConfigError, match="steps"):
        Run(made_up_runs.suite(overrides={"train.steps": "many"}), "ring", "ckd", 0, TEST).config()


def test_what_changed_between_two_configs():
    old, new = {"a.x": 1, "a.y": (1, 2), "gone": 3}, {"a.x": 2, "a.y": (1, 2), "late": 0, "set": 5}
    lines = changed(old, new, {"late": 0, "set": 0})
    assert lines == ["a.x: 1 there, 2 now", "gone: 3 there, no such key now", "set: unknown there, 5 now"]
    assert flatten(json.loads(json.dumps({"a": {"y": (1, 2)}}))) == {"a.y": (1, 2)}
    assert label_of({"optim.lr": 3e-4, "distill.w_vr": 0.1}) == "w_vr=0.1,lr=0.0003"


def test_unknown_names_suggest_the_nearest_and_list_a_few():
    check_name("--row", "ckd", ("ckd", "vrkd"))
    with pytest.raises(ConfigError, match=r"^--row: unknown name 'cdk'; did you mean 'ckd'\? There are: ckd, rkd$"):
        check_name("--row", "cdk", ("ckd", "rkd"))
    with pytest.raises(ConfigError, match=r"^x: unknown name 'zzz'\. There are: ckd$"):
        check_name("x", "zzz", iter(["ckd"]))
    with pytest.raises(ConfigError, match=r"^x: unknown name 'k7'; did you mean 'k\d+'\?$"):  # too many to list
        check_name("x", "k7", [f"k{number}" for number in range(10, 60)])
    assert (nearest("zzz", ["ckd"]), nearest("zzz", ["ckd"], cutoff=0.0), nearest("x", [])) == ("", "ckd", "")
