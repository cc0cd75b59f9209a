"""Training a teacher: the whole job on rooms with exact depth, resumed, evaluated, exported, opened again, adapted."""

import errno
import json
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import teacher_accuracy
from configs import base, teacher_world
from fsmde_jax import build, checkpoint, convert, evaluate
from fsmde_jax import train as job
from fsmde_jax.data import tfrecord
from fsmde_jax.data.records import open_records
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.loop import Loop
from fsmde_jax.losses import relative, total
from fsmde_jax.models.depth_anything import DepthAnything, Variant
from fsmde_jax.models.rig_teacher import RigTeacher
from fsmde_jax.models.student import normalise_images
from fsmde_jax.teacher import Card, Teacher, open_teacher, save_file, teacher_of_run
from fsmde_jax.train import train
from tests import random_teacher, rooms
from tests.random_network import random_variables
from tests.sample_factory import write_folder

SIZE = (28, 56)
SMALL = Variant(12, 4, 2, "mlp", (0, 1, 2, 3), (4, 6, 8, 8), 8, 0)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    samples = [rooms.make(seed, cameras=3, native_size=(56, 112), image_size=SIZE, sky_rows=3) for seed in range(4)]
    return write_folder(tmp_path_factory.mktemp("records") / "rooms", samples)


def make_config(records, **changes):
    c = teacher_world.get_config()
    c.data.train_records = c.data.eval_records = str(records)
    c.data.image_size, c.teacher.longer_side, c.data.batch_size = SIZE, 56, 1
    c.train.steps, c.train.log_every, c.train.eval_every, c.train.checkpoint_every = 3, 1, 2, 2
    c.train.picture_every, c.eval.num_pictures = 0, 1
    c.update_from_flattened_dict(changes)
    return c


def rows(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.fixture(scope="module")
def run(records, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "teacher"
    train(make_config(records), workdir)
    return workdir


def test_the_job_trains_evaluates_and_resumes(run, records, tmp_path, monkeypatch):
    whole = rows(run)
    assert list(whole) == [1, 2, 3] and np.isfinite(list(whole.values())).all()
    log = Loop._log

    def stopped(self, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        log(self, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "_log", stopped)
        train(make_config(records), tmp_path / "run")
    assert list(rows(tmp_path / "run")) == [1, 2]
    train(make_config(records), tmp_path / "run")
    assert rows(tmp_path / "run") == whole
    results = evaluate.evaluate_run(make_config(records), run)
    assert set(results.table) == {"affine"} and results.trivial
    text = next((run / "evaluation").glob("*_affine_dense.md")).read_text()
    assert "P0 `affine`" in text and "ground plane" in text
    with pytest.raises(ConfigError, match=r"eval.protocol = 'surround'.*affine"):
        evaluate.evaluate_run(make_config(records, **{"eval.protocol": "surround"}), run)
    other = base.get_config()  # another config takes the network from the run
    other.data.eval_records, other.data.image_size, other.eval.protocol = str(records), SIZE, "affine"
    other.eval.ground_truth, other.eval.num_pictures, other.teacher.dtype = "dense", 0, "float32"
    again = evaluate.evaluate_run(other, run)
    np.testing.assert_allclose(again.flat()["affine/abs_rel"], results.flat()["affine/abs_rel"], rtol=1e-5)


@pytest.mark.slow
def test_a_trained_teacher_is_exported_opened_and_adapted(run, records, tmp_path):
    made = teacher_of_run(run)
    assert made.card.variant == "tiny" and made.card.longer_side == 56 and made.card.training["step"] in (2, 3)
    for measured in made.card.training["evaluations"]:  # those that were made by now
        assert measured["affine"]["abs_rel"] > 0 and measured["title"]
    file = tmp_path / "mine.safetensors"
    convert.main(["--weights", str(run), "--out", str(file), "--half"])
    assert file.stat().st_size < 13e6
    opened = open_teacher(file)
    assert opened.card.training == made.card.training and opened.card.longer_side == 56
    close = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-3, atol=1e-6), opened.params, made.params)
    assert jax.tree.all(close)
    convert.main(["--weights", str(file), "--out", str(tmp_path / "folder")])
    again = open_teacher(tmp_path / "folder")
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, opened.params)) and again.card == opened.card
    start = make_config(records, **{"teacher.weights": str(file), "optim.lr": 1e-9, "train.steps": 1})
    train(start, tmp_path / "adapted")
    tree, _, _ = checkpoint.read_parameters(tmp_path / "adapted", "latest")
    close = jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-6), tree["params"], opened.params)
    assert jax.tree.all(close)


def test_the_accuracy_script_measures_what_the_job_measured(run, records, tmp_path, capsys):
    convert.main(["--weights", str(run), "--out", str(tmp_path / "t.safetensors")])
    job_found = evaluate.evaluate_run(make_config(records), run)
    flags = ["--teacher", str(tmp_path / "t.safetensors"), "--records", str(records), "--truth", "dense"]
    teacher_accuracy.main([*flags, "--out", str(tmp_path / "tables")])
    assert "P0 `affine`" in capsys.readouterr().out
    result = json.loads(next((tmp_path / "tables").glob("*.json")).read_text())
    found = result["table"]["affine"]["all"]
    for name, value in job_found.table["affine"]["all"].items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, err_msg=name)
    assert result["trivial"].keys() == job_found.trivial.keys()
    assert list((tmp_path / "tables").glob("*.png"))


def test_files_with_a_card_are_checked(tmp_path):
    teacher = Teacher(random_teacher.params(), Card("tiny", longer_side=56))
    file = tmp_path / "t.safetensors"
    save_file(teacher, file)
    opened = open_teacher(file)
    assert jax.tree.all(jax.tree.map(np.array_equal, opened.params, teacher.params))
    with pytest.raises(ConfigError, match="exists already"):
        save_file(teacher, file)
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        save_file(teacher, tmp_path / "t.npz")
    with pytest.raises(ConfigError, match="version"):
        open_teacher(file, version=1)
    card = file.with_suffix(".json")
    card.write_text(card.read_text().replace(opened.card.sha256, "0" * 64))
    with pytest.raises(DataError, match=r"SHA-256 000000"):
        open_teacher(file)
    card.write_text("{")
    with pytest.raises(DataError, match="not the card"):
        open_teacher(file)
    card.unlink()
    assert open_teacher(file).card.variant == "tiny"  # by its shapes, as any file
    huge = jax.tree.map(lambda leaf: leaf * 1e9, teacher.params)
    with pytest.raises(DataError, match="float16"):
        save_file(Teacher(huge, teacher.card), tmp_path / "huge.safetensors", half=True)


def test_a_full_disk_leaves_nothing_that_forbids_the_same_command(tmp_path, monkeypatch):
    """The card, which is written first, fits; the parameters do not."""

    def full(descriptor):
        if os.fstat(descriptor).st_size > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    teacher = Teacher(random_teacher.params(), Card("tiny"))
    with monkeypatch.context() as patch:
        patch.setattr(tfrecord.os, "fsync", full)
        with pytest.raises(DataError, match=r"t\.safetensors: cannot write \(No space left on device\)"):
            save_file(teacher, tmp_path / "t.safetensors")
    assert list(tmp_path.iterdir()) == []
    save_file(teacher, tmp_path / "t.safetensors")


def test_the_network_is_depth_anything_on_every_view():
    model = RigTeacher(SMALL, longer_side=56)
    images = np.random.default_rng(0).integers(0, 255, (2, 3, *SIZE, 3), np.uint8)
    batch = normalise_images(jnp.asarray(images))
    intrinsics = jnp.tile(jnp.eye(3), (2, 3, 1, 1))
    variables = random_variables(model, batch, intrinsics)
    run = jax.jit(partial(model.apply, train=False))
    found = run(variables, batch, intrinsics)["rel_inv_depth"]
    plain = jax.jit(DepthAnything(SMALL).apply)(variables, batch.reshape(6, *SIZE, 3))["rel_inv_depth"]
    np.testing.assert_allclose(found.reshape(6, *SIZE), plain, rtol=1e-5, atol=1e-6)  # its own size: nothing is resized
    other = jax.eval_shape(run, variables, batch[:, :, :20, :40], intrinsics)["rel_inv_depth"]
    assert other.shape == (2, 3, 20, 40)


def test_the_loss_takes_dense_depth_where_there_is_some_and_knows_the_sky():
    rng = np.random.default_rng(2)
    dense = rng.uniform(2, 40, (1, 2, 12, 16)).astype(np.float32)
    dense[:, :, :4] = 0  # sky
    sparse = np.where(rng.random(dense.shape) < 0.3, rng.uniform(2, 40, dense.shape), 0).astype(np.float32)
    ego = np.ones(dense.shape, bool)
    ego[0, 0, -2:] = False
    batch = {"depth": sparse, "dense_depth": dense, "ego_mask": ego, "view_mask": np.array([[True, False]])}
    pred = {"rel_inv_depth": jnp.asarray(rng.uniform(0, 1, dense.shape), jnp.float32)}
    loss, terms = total.relative_depth_loss(pred, batch, gradient_weight=2.0)
    inverse = np.where(dense > 0, 1 / np.maximum(dense, 1e-6), 0)
    expected, _ = relative.relative_loss(pred["rel_inv_depth"][:, :1], inverse[:, :1], ego[:, :1], gradient_weight=2.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert terms["valid_images"] == 1  # the dropped view says nothing
    del batch["dense_depth"]
    loss, _ = total.relative_depth_loss(pred, batch, gradient_weight=0.0)
    expected, _ = relative.relative_loss(
        pred["rel_inv_depth"][:, :1], np.where(sparse > 0, 1 / np.maximum(sparse, 1e-6), 0)[:, :1],
        (ego & (sparse > 0))[:, :1], gradient_weight=0.0,
    )  # fmt: skip
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_mistakes_are_named(records, run, tmp_path):
    with pytest.raises(ConfigError, match=r"task: unknown name 'tutor'"):
        build.check(make_config(records, task="tutor"))
    with pytest.raises(ConfigError, match=r"teacher.variant: unknown name 'tinny'"):
        build.build_model(make_config(records, **{"teacher.variant": "tinny"}))
    with pytest.raises(ConfigError, match=r"teacher.longer_side = 7"):
        build.build_model(make_config(records, **{"teacher.longer_side": 7}))
    with pytest.raises(ConfigError, match=r"teacher.longer_side: checkpoint has 56, config has 42"):
        train(make_config(records, **{"teacher.longer_side": 42}), run)
    with pytest.raises(ConfigError, match=r"a relative tiny of version 2, but a relative small.*teacher.variant"):
        save_file(Teacher(random_teacher.params(), Card("tiny")), tmp_path / "t.safetensors")
        changes = {"teacher.variant": "small", "teacher.weights": str(tmp_path / "t.safetensors")}
        job._start(make_config(records, **changes), None, "")
    with pytest.raises(ConfigError, match=r"a relative tiny of version 1"):
        save_file(Teacher(random_teacher.params(), Card("tiny", version=1)), tmp_path / "v1.safetensors")
        job._start(make_config(records, **{"teacher.weights": str(tmp_path / "v1.safetensors")}), None, "")
    with pytest.raises(ConfigError, match=r"train.encoder_weights"):
        build.check(make_config(records, **{"train.encoder_weights": "resnet18.safetensors"}))
    with pytest.raises(ConfigError, match=r"loss.gradient_weight = -1"):
        build.check(make_config(records, **{"loss.gradient_weight": -1.0}))
    with pytest.raises(ConfigError, match=r"--half"):
        convert_quietly(["--weights", "x", "--out", str(tmp_path / "y"), "--half"])
    with pytest.raises(ConfigError, match=r"neither a file nor a teacher's run"):
        convert_quietly(["--weights", str(tmp_path), "--out", str(tmp_path / "y")])


def convert_quietly(argv):
    """`convert.main` with its errors as exceptions."""
    try:
        convert.main(argv)
    except SystemExit as error:
        assert isinstance(error.__context__, ConfigError)
        raise error.__context__ from None


def test_a_metric_student_can_be_measured_as_a_relative_one():
    c = base.get_config()
    outputs = {"pred_depth": jnp.array([2.0, 4.0])}
    np.testing.assert_allclose(build.read_fn(c)(outputs), [2.0, 4.0])
    c.eval.protocol = "affine"
    np.testing.assert_allclose(build.read_fn(c)(outputs), [0.5, 0.25])


def test_records_of_many_rigs_are_opened_without_notes_on_focal_lengths(records, capsys):
    c = make_config(records, **{"model.focal_range": (10.0, 11.0)})
    opened = build.open_split(c, "train")
    assert isinstance(opened, type(open_records(str(records)))) and "fx" not in capsys.readouterr().err
