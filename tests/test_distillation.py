"""Training with a teacher: every term and variant in the compiled step, what is trained beside it, refusals."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from fsmde_jax import build, build_teacher, checkpoint, compatible, sharding, teacher_cache, teacher_signal
from fsmde_jax.data import pipeline
from fsmde_jax.data.records import open_records
from fsmde_jax.distillation import needs
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.evaluate import evaluate_run
from fsmde_jax.loop import Loop
from fsmde_jax.losses import baselines, distill, relational, teacher_bins
from fsmde_jax.losses.total import DistillWeights
from fsmde_jax.models.projector import PROJECTOR_SCOPE
from fsmde_jax.models.student import normalise_images
from fsmde_jax.models.teacher_head import TEACHER_BINS_SCOPE
from fsmde_jax.state import init_state, make_train_step
from fsmde_jax.train import train
from tests import rooms
from tests.sample_factory import write_folder
from tests.toy_encoder import toy_encoder
from tests.toy_teacher import ToyTeacher

SIZE = (32, 64)
TOY = ToyTeacher()
ALL = {"distill.w_ckd": 1.0, "distill.w_vr": 0.1}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    samples = [rooms.make(seed, cameras=3, native_size=(48, 96)) for seed in range(3)]
    return write_folder(tmp_path_factory.mktemp("records") / "rooms", samples)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """A teacher called "toy" and an encoder that compile at once; the rest of the student is the real one."""
    opened = build_teacher.open_teacher
    monkeypatch.setattr(build_teacher, "open_teacher", lambda name: TOY if name == "toy" else opened(name))
    with toy_encoder():
        yield


def make_config(records, **changes):
    c = base.get_config()
    c.data.train_records = c.data.eval_records = str(records)
    c.data.image_size, c.data.batch_size = SIZE, 1
    c.model.decoder_channels, c.model.num_bins, c.model.focal_range = (4, 4, 8, 8, 8), 8, (100.0, 900.0)
    c.teacher.weights, c.teacher.longer_side, c.teacher.dtype = "toy", 56, "float32"
    c.distill.tokens = (2, 4)
    c.distill.bins = "soft_assign"  # tests of another kind name it
    c.optim.lr, c.train.steps, c.train.log_every, c.train.checkpoint_every = 1e-3, 2, 1, 1
    c.train.eval_every = c.train.picture_every = c.eval.num_pictures = 0
    c.update_from_flattened_dict(changes)
    return c


@functools.cache
def _variables(model):
    return init_state(model, optax.sgd(1.0), 0, 3, SIZE, sharding.make_mesh())


def fresh_state(model, optimizer):
    """The same first parameters for every job of one model (compiled once), in buffers that a step may take over."""
    state = jax.tree.map(jnp.copy, _variables(model))
    return dataclasses.replace(state, opt_state=optimizer.init(state.params))


@functools.cache
def supervised(records):
    """Terms and gradients without a teacher."""
    return Job(make_config(records)).value_and_grad()


class Job:
    """The parts of one training job, to look at one by one."""

    def __init__(self, config):
        build.check(config)
        opened = open_records(config.data.train_records)
        self.distilled = build_teacher.distilled(config, opened)
        self.model = build.build_model(config)
        self.loss = build.loss_fn(config, self.distilled)
        stream = pipeline.train_dataset(
            opened, image_size=tuple(config.data.image_size), batch_size=config.data.batch_size, seed=0,
            augment=build.augment_options(config),
            clean_images=self.distilled is not None and self.distilled.cache is None,
            teacher_cache=self.distilled.cache if self.distilled else None, num_threads=0,
        )  # fmt: skip
        self.batch = {name: value for name, value in next(iter(stream)).items() if name != "record_index"}
        self.optimizer = optax.sgd(1.0)
        self.state = fresh_state(self.model, self.optimizer)
        if self.distilled:
            outputs = {"features": jax.ShapeDtypeStruct((1, 3, 4, 8, 8), jnp.float32)}
            params = {**self.state.params, **self.distilled.loss.companions(jax.random.key(1), outputs)}
            self.state = dataclasses.replace(self.state, params=params, opt_state=self.optimizer.init(params))
        self.frozen = self.distilled.frozen if self.distilled else None

    def step(self):
        return make_train_step(self.model, self.optimizer, self.loss)

    def value_and_grad(self, batch=None):
        """(terms, gradient of the trained parameters, gradient of the teacher's) on the batch."""
        batch = batch or self.batch

        def compute(params, frozen):
            variables = {"params": params, "batch_stats": self.state.batch_stats}
            outputs = self.model.apply(
                variables, normalise_images(batch["images"]), batch["intrinsics"], batch["cam_to_ego"],
                view_mask=batch["view_mask"], train=False,
            )  # fmt: skip
            return self.loss(outputs, batch, params, frozen)

        run = jax.jit(jax.value_and_grad(compute, argnums=(0, 1), has_aux=True))
        (_, terms), (own, teachers) = run(self.state.params, self.frozen)
        return terms, own, teachers


def norms(tree):
    return {key: float(optax.tree.norm(value)) for key, value in tree.items()}


def test_the_loss_is_the_weighted_sum_of_its_terms_and_the_teacher_stays_frozen(records):
    weights = {"distill.w_ckd": 0.7, "distill.w_prob": 0.3, "distill.w_cross": 2.0, "distill.w_vr": 0.2,
               "distill.baseline": "fitnets", "distill.w_baseline": 0.05}  # fmt: skip
    job = Job(make_config(records, **weights))
    terms, own, teachers = job.value_and_grad()
    t = {key: float(value) for key, value in terms.items()}
    expected = t["silog"] + 0.1 * t["chamfer"] + 0.7 * (0.3 * t["ckd_prob"] + 2.0 * t["ckd_cross"])
    expected += 0.2 * t["vrkd"] + 0.05 * t["fitnets"]
    assert t["loss"] == pytest.approx(expected, rel=1e-5)
    assert min(t[key] for key in ("ckd_prob", "ckd_cross", "vrkd", "fitnets")) > 1e-6
    assert all(value == 0 for value in norms(teachers).values())
    assert all(value > 0 for value in norms(own).values()) and PROJECTOR_SCOPE in own


FAST = ("fitnets", "response")  # one with a projector, one without; every loss has tests of its own


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in sorted(baselines.BASELINES)]
)
def test_every_baseline_teaches_the_student(records, name):
    job = Job(make_config(records, **{"distill.baseline": name, "distill.w_baseline": 100.0}))
    terms, own, _ = job.value_and_grad()
    plain, alone, _ = supervised(records)
    assert float(terms[name]) > 0 and float(terms["silog"]) == pytest.approx(float(plain["silog"]), rel=1e-5)
    change = jax.tree.map(lambda a, b: a - b, own["backbone"], alone["backbone"])
    assert float(optax.tree.norm(change)) > 1e-6
    assert (PROJECTOR_SCOPE in own) == baselines.BASELINES[name].projector


@pytest.mark.parametrize(
    "changes",
    [
        {"distill.relation": "gram", "distill.center": "none"},
        {"distill.relation": "bins"},
        {
            "distill.intra": True,
            "distill.center": "view",
            "distill.tap": 1,
            "distill.bins": "aligned",
            "model.bins": "linear",
        },
    ],
)
def test_variants_of_relations_have_gradients(records, changes):
    terms, own, _ = Job(make_config(records, **{"distill.w_vr": 1.0}, **changes)).value_and_grad()
    change = jax.tree.map(lambda a, b: a - b, own["decoder"], supervised(records)[1]["decoder"])
    assert float(terms["vrkd"]) > 1e-6 and float(optax.tree.norm(change)) > 1e-6


@pytest.mark.slow
def test_the_tap_chooses_the_tokens(records):
    values = [
        float(Job(make_config(records, **{"distill.w_vr": 1.0, "distill.tap": tap})).value_and_grad()[0]["vrkd"])
        for tap in (1, 3)
    ]
    assert values[0] != pytest.approx(values[1], rel=1e-3)


@pytest.mark.slow
def test_bins_from_a_trained_head(records):
    job = Job(make_config(records, **{"distill.bins": "learned", **ALL}))
    terms, own, teachers = job.value_and_grad()
    assert norms(own)[TEACHER_BINS_SCOPE] > 0 and all(value == 0 for value in norms(teachers).values())
    parts = float(terms["silog"] + 0.1 * terms["chamfer"] + terms["ckd"] + 0.1 * terms["vrkd"])
    assert float(terms["loss"]) > parts + 0.9 * float(terms["teacher_silog"])
    # without labels only the teacher's terms are left
    unlabelled = {**job.batch, "depth": np.zeros_like(job.batch["depth"])}
    terms, own, _ = job.value_and_grad(unlabelled)
    assert norms(own)[TEACHER_BINS_SCOPE] == 0 and norms(own)["decoder"] > 0
    assert float(terms["silog"]) == float(terms["ckd_cross"]) == 0 < float(terms["ckd_prob"])


def test_a_weight_of_zero_leaves_the_term_out_of_the_program(records, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a term of weight 0 was traced")

    def flops(**changes):
        job = Job(make_config(records, **changes))
        return job.step().lower(job.state, job.batch, 1e-3, job.frozen).compile().cost_analysis()["flops"]

    with monkeypatch.context() as patch:
        patch.setattr(relational, "relation_loss", refuse)
        patch.setattr(distill, "crossing_loss", refuse)
        prob = flops(**{"distill.w_ckd": 1.0, "distill.w_cross": 0.0})
        patch.setattr(distill, "probability_loss", refuse)
        none = flops(**{"distill.w_ckd": 0.0, "distill.w_vr": 0.0})
        job = Job(make_config(records, **{"distill.w_ckd": 1.0, "distill.w_prob": 0.0, "distill.w_cross": 0.0}))
        assert job.distilled is None  # nothing to teach: no teacher is opened
    assert none < prob < flops(**ALL)


def test_the_teacher_is_an_argument_of_the_step_and_not_baked_into_it(records):
    job = Job(make_config(records, **ALL, **{"teacher.weights": "tiny"}))
    text = job.step().lower(job.state, job.batch, 1e-3, job.frozen).as_text()
    assert len(text) < 3_000_000  # its 6.3 million parameters would be 50 MB of text


@pytest.mark.parametrize("bins", [pytest.param("soft_assign", marks=pytest.mark.slow), "aligned"])
def test_permuting_cameras_with_their_calibration_changes_nothing(records, bins):
    job = Job(make_config(records, **ALL, **{"distill.bins": bins}))
    order = np.array([2, 0, 1])
    permuted = {name: value[:, order] for name, value in job.batch.items()}
    before, after = job.value_and_grad()[0], job.value_and_grad(permuted)[0]
    for name in before:
        assert float(after[name]) == pytest.approx(float(before[name]), rel=2e-4), name


@pytest.mark.parametrize("bins", [pytest.param("soft_assign", marks=pytest.mark.slow), "aligned"])
def test_views_dropped_or_masked_altogether_give_finite_gradients(records, bins):
    job = Job(make_config(records, **ALL, **{"distill.baseline": "dist", "distill.bins": bins}))
    hidden = np.zeros_like(job.batch["ego_mask"])
    cases = [{"view_mask": np.array([[True, False, False]])}, {"ego_mask": hidden},
             {"view_mask": np.zeros((1, 3), bool)}, {"depth": np.zeros_like(job.batch["depth"])}]  # fmt: skip
    for case in cases:
        terms, own, _ = job.value_and_grad({**job.batch, **case})
        assert all(np.isfinite(float(value)) for value in terms.values())
        assert np.isfinite(list(norms(own).values())).all()
        if "depth" not in case and not case.get("view_mask", np.ones(1)).any():
            assert float(terms["loss"]) == 0
    assert float(job.value_and_grad({**job.batch, **cases[0]})[0]["vrkd"]) == 0  # no pair is left


def test_the_step_learns_the_teachers_bins(records):
    job = Job(make_config(records, **{"distill.w_ckd": 1.0, "distill.w_cross": 0.0}))
    job.optimizer = optax.adam(1e-2)
    state = fresh_state(job.model, job.optimizer)
    step, values = job.step(), []
    for _ in range(60):
        state, metrics = step(state, job.batch, 1.0, job.frozen)
        values.append(float(metrics["ckd_prob"]))
    assert values[-1] < 0.6 * values[0]
    programs = step._cache_size()
    step(state, job.batch, 0.5, job.frozen)
    assert step._cache_size() == programs  # another rate is the same one


@pytest.mark.parametrize("bins", [pytest.param("soft_assign", marks=pytest.mark.slow), "aligned"])
def test_a_cache_gives_the_same_loss_as_the_teacher_in_the_step(records, tmp_path, bins):
    plain = {"augment.scale": (1.0, 1.0), "augment.jitter_probability": 0.0, "augment.flip": 0.0, **ALL,
             "distill.bins": bins}  # fmt: skip
    on_the_fly = Job(make_config(records, **plain, **{"distill.tokens": (2, 4)}))
    opened = open_records(str(records))
    plan = teacher_cache.plan(TOY, opened, image_size=SIZE, longer_side=56, tokens=True, dtype="float32")
    teacher_cache.write_cache(TOY, opened, tmp_path / "cache", plan, batch_size=1)
    with pytest.raises(ConfigError, match=r"holds tokens of \(6, 10\), but distill.tokens = \(2, 4\)"):
        Job(make_config(records, **plain, **{"teacher.cache": str(tmp_path / "cache")}))
    cirkd = {**plain, "distill.w_ckd": 0.0, "distill.w_vr": 0.0, "distill.baseline": "cirkd"}
    with pytest.raises(ConfigError, match=r"holds tokens of \(6, 10\), but distill.tokens = \(2, 4\)"):
        Job(make_config(records, **cirkd, **{"teacher.cache": str(tmp_path / "cache")}))
    with pytest.raises(ConfigError, match=r"distill.tokens = \(6, 10\): finer than what is compared"):
        Job(make_config(records, **cirkd, **{"distill.tokens": (6, 10)}))
    without_tokens = {**plain, "distill.w_vr": 0.0}
    cached = Job(make_config(records, **without_tokens, **{"teacher.cache": str(tmp_path / "cache")}))
    assert cached.frozen is None and "clean_images" not in cached.batch
    a, b = on_the_fly.value_and_grad()[0], cached.value_and_grad()[0]
    for name in ("ckd_prob", "ckd_cross", "silog"):
        assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3, abs=1e-4), name
    learned = {**without_tokens, "teacher.cache": str(tmp_path / "cache"), "distill.bins": "learned"}
    with pytest.raises(ConfigError, match=r"teacher.cache: distill.bins = 'learned'"):
        Job(make_config(records, **learned))


@pytest.mark.slow
def test_a_whole_run_on_cached_tokens_teaches_relations(records, tmp_path):
    """`teacher.cache` with tokens: CKD and VRKD without a teacher in the step, and without zoom."""
    opened, size = open_records(str(records)), (64, 96)
    plan = teacher_cache.plan(TOY, opened, image_size=size, longer_side=140, tokens=True, dtype="float32")
    teacher_cache.write_cache(TOY, opened, tmp_path / "cache", plan, batch_size=1)
    changes = {**ALL, "augment.scale": (1.0, 1.0), "teacher.cache": str(tmp_path / "cache"), "train.eval_every": 2,
               "augment.jitter_probability": 0.0, "augment.flip": 0.0, "data.image_size": size,
               "teacher.longer_side": 140, "distill.tokens": (6, 10)}  # fmt: skip
    cached, in_step = (Job(make_config(records, **{**changes, **more})) for more in ({}, {"teacher.cache": ""}))
    a, b = (float(job.value_and_grad()[0]["vrkd"]) for job in (cached, in_step))
    assert a == pytest.approx(b, rel=1e-3)
    train(make_config(records, **changes), tmp_path / "run")
    found = rows(tmp_path / "run")
    assert min(found[step][f"train/{name}"] for step in (1, 2) for name in ("vrkd", "ckd_prob", "ckd_cross")) > 0
    assert checkpoint.read_parameters(tmp_path / "run", "best")[2] == 2


@pytest.mark.slow
def test_cirkd_takes_its_grid_and_temperature_from_the_config(records):
    base_value = float(Job(make_config(records, **{"distill.baseline": "cirkd"})).value_and_grad()[0]["cirkd"])
    for change in ({"distill.tau_r": 1.0}, {"distill.tokens": (1, 2)}):
        value = float(Job(make_config(records, **{"distill.baseline": "cirkd"}, **change)).value_and_grad()[0]["cirkd"])
        assert abs(value - base_value) > 0.02 * base_value, change


def test_relations_within_a_view_are_no_gram_matrices(records):
    with pytest.raises(ConfigError, match=r"distill.intra = True: .*distill.relation = 'gram'"):
        Job(make_config(records, **{"distill.w_vr": 1.0, "distill.relation": "gram", "distill.intra": True}))


def rows(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "train/loss" in line}


def test_a_whole_run_resumes_evaluates_and_leaves_the_projector_behind(records, tmp_path, monkeypatch):
    changes = {**ALL, "distill.baseline": "cwd", "train.eval_every": 3, "train.steps": 3}
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(make_config(records, **changes), whole)
    assert {"train/ckd_prob", "train/ckd_cross", "train/vrkd", "train/cwd", "train/silog"} <= set(rows(whole)[1])
    log = Loop._log

    def stopped(self, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        log(self, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "_log", stopped)
        train(make_config(records, **changes), part)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"taught by another teacher"):
        patch.setattr(build_teacher, "open_teacher", lambda name: ToyTeacher(seed=5))
        train(make_config(records, **changes), part)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"(?s)other trained parameters.*projector"):
        patch.setattr(compatible, "check_config", lambda *_: None)
        train(make_config(records, **{**changes, "distill.baseline": ""}), part)
    train(make_config(records, **changes), part)
    assert list(rows(part)) == [1, 2, 3]
    for name in ("loss", "cwd", "vrkd", "ckd_prob", "param_norm"):
        assert rows(part)[3][f"train/{name}"] == rows(whole)[3][f"train/{name}"], name
    identity = json.loads((whole / "identity.json").read_text())
    assert identity["teacher"]["variant"] == "tiny" and re.fullmatch("[0-9a-f]{64}", identity["teacher"]["sha256"])
    for which in ("best", "latest"):
        tree, _, _ = checkpoint.read_parameters(whole, which)
        assert PROJECTOR_SCOPE not in tree["params"] and "depth_bins" in tree["params"]
    # evaluation and fine-tuning need no teacher
    nobody = make_config(records, **{**ALL, "teacher.weights": ""})
    assert np.isfinite(evaluate_run(nobody, whole).flat()["metric/abs_rel"])
    train(make_config(records, **{"distill.baseline": "fitnets"}), tmp_path / "tuned", init_from=str(whole))
    with pytest.raises(ConfigError, match=r"distill.baseline: checkpoint has 'cwd', config has ''"):
        train(make_config(records, **ALL), whole)


def test_wrong_keys_are_refused_before_any_work(records, capsys):
    cases = {
        r"distill.w_vr = -1.0: expected 0 or more": {"distill.w_vr": -1.0},
        r"distill.tau = 0.0: expected a temperature": {"distill.tau": 0.0},
        r"distill.bins: unknown name 'soft'.*soft_assign": {"distill.bins": "soft"},
        r"distill.shift: unknown name 'auot'; did you mean 'auto'": {"distill.shift": "auot"},
        r"distill.relation: unknown name 'token'": {"distill.relation": "token"},
        r"distill.baseline: unknown name 'fitnet'; did you mean 'fitnets'": {"distill.baseline": "fitnet"},
        r"distill.tap = 4": {"distill.tap": 4},
        r"distill.center = 'view': relation gram": {
            "distill.center": "view", "distill.relation": "gram", "distill.w_vr": 1.0},
        r"two_hot' serves the term of distill.w_prob alone, not distill.w_cross": {
            "distill.bins": "two_hot", "distill.w_ckd": 1.0},
        r"distill.w_cross = 1.0: teaches bin centers, but those of model.bins = 'sid' are fixed": {
            "distill.w_ckd": 1.0, "model.bins": "sid"},
        r"distill.bins = 'aligned' spaces its bins evenly in log-depth, but those of model.bins = 'linear'": {
            "distill.bins": "aligned", "distill.w_ckd": 1.0, "model.bins": "linear"},
        r"teacher.longer_side = 5: expected": {"teacher.longer_side": 5},
        r"distill.tokens = \(0, 4\)": {"distill.tokens": (0, 4)},
    }  # fmt: skip
    for message, changes in cases.items():
        with pytest.raises(ConfigError, match=message):
            build.check(make_config(records, **changes))
    no_bins = {"distill.bins": "aligned", "distill.w_vr": 1.0, "model.bins": "linear"}  # relations of tokens alone
    build.check(make_config(records, **no_bins))
    with pytest.raises(ConfigError, match=r"(?s)teacher.weights is empty.*tiny.*--config.distill.w_ckd=0"):
        Job(make_config(records, **ALL, **{"teacher.weights": ""}))
    for relation in ("tokens", "bins"):
        with pytest.raises(ConfigError, match=r"distill.tokens = \(20, 40\): finer than what is compared"):
            Job(make_config(records, **ALL, **{"distill.tokens": (20, 40), "distill.relation": relation}))
    # Bins are finer than features, also beside another method, unless that one compares tokens of features.
    opened, fine = open_records(str(records)), {"distill.tokens": (8, 16), "distill.relation": "bins"}
    build_teacher.distilled(make_config(records, **ALL, **fine, **{"distill.baseline": "response"}), opened)
    with pytest.raises(ConfigError, match=r"distill.tokens = \(8, 16\): finer than what is compared"):
        build_teacher.distilled(make_config(records, **ALL, **fine, **{"distill.baseline": "cirkd"}), opened)
    one = open_records(str(records), opened.cameras[:1])
    build_teacher.distilled(make_config(records, **ALL), one)
    assert "no two of the cameras" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"needs a metric teacher, and 'toy' is a relative one"):
        Job(make_config(records, **{"distill.bins": "two_hot", "distill.w_ckd": 1.0, "distill.w_cross": 0.0}))
    with pytest.raises(DataError, match=r"(?s)teachers/none.*README.*weights=tiny.*--config.distill.w_ckd=0"):
        Job(make_config(records, **ALL, **{"teacher.weights": "teachers/none"}))


def test_what_each_term_needs():
    assert needs(DistillWeights()) == needs(DistillWeights(baseline="response"))
    assert not needs(DistillWeights()).logits and not needs(DistillWeights()).tokens
    assert needs(DistillWeights(w_ckd=1)).logits and not needs(DistillWeights(w_ckd=1)).tokens
    assert needs(DistillWeights(w_vr=1)).tokens and not needs(DistillWeights(w_vr=1)).logits
    assert needs(DistillWeights(w_vr=1, relation="bins")).logits
    assert needs(DistillWeights(baseline="dist")).logits and needs(DistillWeights(baseline="sp")).tokens


@pytest.mark.slow
def test_two_hot_teaches_probabilities_on_the_students_own_centers(records, monkeypatch):
    metric = ToyTeacher(max_depth=40.0)
    monkeypatch.setattr(build_teacher, "open_teacher", lambda name: metric)
    job = Job(make_config(records, **{"distill.bins": "two_hot", "distill.w_ckd": 1.0, "distill.w_cross": 0.0}))
    terms, own, _ = job.value_and_grad()
    images = normalise_images(job.batch["images"])
    variables = {"params": job.state.params, "batch_stats": job.state.batch_stats}
    outputs = job.model.apply(variables, images, job.batch["intrinsics"], job.batch["cam_to_ego"], train=False)
    clean = normalise_images(job.batch["clean_images"])
    depth = teacher_signal.run_teacher(metric.module(), metric.params, clean, size=job.distilled.loss.size).depth
    d = np.asarray(teacher_bins.resize_rel_inv_depth(depth, 16, 32), np.float64)
    centers = np.broadcast_to(np.asarray(outputs["bin_centers"], np.float64), (1, 3, 16, 32, 8))
    above = np.clip((centers < d[..., None]).sum(-1), 1, 7)  # the two centers around every depth
    low, high = (np.take_along_axis(centers, (above - k)[..., None], -1)[..., 0] for k in (1, 0))
    share = np.clip((d - low) / (high - low), 0, 1)
    p = np.zeros(centers.shape)
    np.put_along_axis(p, (above - 1)[..., None], (1 - share)[..., None], -1)
    np.put_along_axis(p, above[..., None], share[..., None], -1)
    p = 0.99 * p + 0.01 / 8
    z = np.asarray(outputs["bin_logits"], np.float64)
    log_q = z - np.log(np.exp(z).sum(-1, keepdims=True))
    assert float(terms["ckd_prob"]) == pytest.approx(float((p * (np.log(p) - log_q)).sum(-1).mean()), rel=2e-3)
    assert norms(own)["decoder"] > 0


def test_aligned_bins_are_those_that_the_students_head_starts_from(records):
    """On a student that was just made, the crossing of an aligned teacher is its depth in metres, up to the blur."""
    changes = {"distill.bins": "aligned", "distill.w_ckd": 1.0, "distill.tau_bin": 0.05, "model.num_bins": 64}
    job = Job(make_config(records, **changes))
    terms, own, _ = job.value_and_grad()
    assert float(terms["ckd_prob"]) > 0 and norms(own)["decoder"] > 0
    variables = {"params": job.state.params, "batch_stats": job.state.batch_stats}
    images = normalise_images(job.batch["images"])
    run = jax.jit(functools.partial(job.model.apply, train=False))
    outputs = run(variables, images, job.batch["intrinsics"], job.batch["cam_to_ego"])
    loss = job.distilled.loss
    labels = loss._labels(outputs, job.batch, 64)
    np.testing.assert_allclose(labels.anchors, outputs["view_bin_centers"], rtol=1e-4)
    clean = normalise_images(job.batch["clean_images"])
    teacher = job.distilled.teacher
    maps = teacher_signal.run_teacher(teacher.module(), teacher.params, clean, size=loss.size)
    head = outputs["bin_logits"].shape[2:4]
    logits, valid, mask = teacher_signal.teacher_distribution(
        maps, job.batch["ego_mask"], kind="aligned", head_size=head, num_bins=64, tau_bin=0.05, labels=labels,
        view_mask=job.batch["view_mask"],
    )  # fmt: skip
    r = teacher_bins.resize_rel_inv_depth(maps.rel_inv_depth, *head)
    depth, _ = teacher_bins.align_to_labels(r, labels.depth, labels.mask, min_depth=0.1, max_depth=80.0)
    assert np.asarray(mask).any() and np.asarray(mask)[~np.asarray(valid)].sum() == 0
    crossed = (np.asarray(jax.nn.softmax(logits, -1)) * np.asarray(outputs["bin_centers"])).sum(-1)
    np.testing.assert_allclose(crossed[mask], np.asarray(depth)[mask], rtol=0.06)  # half a bin's width


def test_aligned_bins_of_views_without_labels_keep_the_students_scale(records):
    """Where a view has too few labels and the teacher says what the student says, the target is what the student has,
    wherever the student's centers are: nothing moves the scale but labels."""
    job = Job(make_config(records, **{"distill.bins": "aligned", "distill.w_ckd": 1.0, "model.num_bins": 64}))
    depth = np.array(job.batch["depth"])
    depth[:, 1] = 0.0
    batch = {**job.batch, "depth": depth}
    rng = np.random.default_rng(0)
    labels_of = functools.partial(job.distilled.loss._labels, count=64)
    anchors = np.asarray(labels_of({"bin_logits": jnp.zeros((1, 3, 16, 32, 64))}, batch).anchors)
    # A student that is certain of a smooth depth on the anchors; its own centers are elsewhere and never looked at.
    slope = np.linspace(0, 1, 16)[:, None] + 0.3 * np.linspace(0, 1, 32)
    says = np.exp(np.log(40.0) - 2.0 * slope)
    logits = -np.abs(np.log(says)[..., None] - np.log(anchors)[:, :, None, None]) / 0.05
    outputs = {
        "bin_logits": jnp.asarray(logits, jnp.float32),
        "pred_depth": jnp.asarray(rng.uniform(1, 9, depth.shape)),
    }
    few, many = labels_of(outputs, batch), labels_of(outputs, job.batch)
    assert (np.asarray(many.mask).sum((2, 3)) >= teacher_bins.MIN_LABELS).all()
    np.testing.assert_array_equal(many.depth, job.batch["depth"])
    np.testing.assert_array_equal(few.mask[:, 1], np.asarray(batch["ego_mask"])[:, 1])
    for view in (0, 2):
        np.testing.assert_array_equal(few.depth[:, view], many.depth[:, view])
        np.testing.assert_array_equal(few.mask[:, view], many.mask[:, view])
    r = jnp.asarray(np.broadcast_to(0.37 / says - 5.0, (1, 3, 16, 32)), jnp.float32)
    found, valid = teacher_bins.align_to_labels(r, few.depth, few.mask, min_depth=0.1, max_depth=80.0)
    assert np.asarray(valid)[0, 1]
    np.testing.assert_allclose(np.asarray(found)[0, 1], says, rtol=0.05)


def says(monkeypatch, job, change):
    """Terms of a job whose teacher's map is changed."""
    maps = type(job.distilled.loss)._maps

    def changed(self, *rest):
        found = maps(self, *rest)
        return found._replace(rel_inv_depth=change(found.rel_inv_depth))

    with monkeypatch.context() as patch:
        patch.setattr(type(job.distilled.loss), "_maps", changed)
        return job.value_and_grad()[0]


@pytest.mark.parametrize(
    "bins",
    [
        "aligned",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("soft_assign", "aligned without shift", "learned", "two_hot")
        ),
    ],
)
def test_a_teacher_that_says_the_same_of_every_pixel_leaves_all_terms(records, monkeypatch, bins):
    kind, metric = bins.split()[0], bins in ("two_hot", "aligned without shift")
    monkeypatch.setattr(build_teacher, "open_teacher", lambda name: ToyTeacher(max_depth=40.0 if metric else None))
    job = Job(make_config(records, **ALL, **{"distill.bins": kind, "distill.w_cross": float(kind != "two_hot")}))
    terms = says(monkeypatch, job, lambda r: 0.0 * r + 0.1)
    found = [float(terms[name]) for name in ("ckd_prob", "ckd_cross", "vrkd") if name in terms]
    assert found == [0.0] * len(found) and len(found) >= 2


@pytest.mark.slow
def test_relations_do_not_ask_whether_depth_could_be_aligned(records, monkeypatch):
    """Labels that are all the same leave open how deep a map is; the tokens beside it are as good as ever."""
    found = []
    for w_ckd in (0.0, 1.0):
        job = Job(make_config(records, **{"distill.bins": "aligned", "distill.w_ckd": w_ckd, "distill.w_vr": 1.0}))
        job.batch["depth"] = jnp.where(job.batch["depth"] > 0, 7.0, 0.0)
        found.append(says(monkeypatch, job, lambda r: r))
    assert float(found[1]["ckd_prob"]) == 0 and float(found[0]["vrkd"]) > 0
    assert float(found[1]["vrkd"]) == pytest.approx(float(found[0]["vrkd"]), rel=1e-5)


def test_the_crossing_leaves_out_views_whose_teacher_was_fitted_to_the_student(records, monkeypatch):
    """Three labels in a view are too few to fit to: whatever they say, L_cross stays, while L_sup follows them."""
    job = Job(make_config(records, **{"distill.bins": "aligned", "distill.w_ckd": 1.0}))
    known = np.asarray(job.batch["depth"])  # a teacher that agrees with the labels, so that it is fitted to them
    r = jnp.asarray(1 / np.where(known > 0, known, known[known > 0].mean()))
    monkeypatch.setattr(type(job.distilled.loss), "_maps", lambda *_: teacher_signal.TeacherMaps(r))
    batches = []
    for factor in (1.0, 3.0):
        depth = np.array(job.batch["depth"])
        few = np.argwhere((depth[0, 1] > 0) & np.asarray(job.batch["ego_mask"])[0, 1])[:3]
        kept = depth[0, 1, few[:, 0], few[:, 1]]
        depth[0, 1] = 0.0
        depth[0, 1, few[:, 0], few[:, 1]] = np.clip(factor * kept, 0.2, 79.0)
        batches.append({**job.batch, "depth": depth})
    (one, _, _), (other, _, _) = (job.value_and_grad(batch) for batch in batches)
    assert float(one["silog"]) != float(other["silog"])
    assert float(one["ckd_cross"]) == float(other["ckd_cross"]) > 0
