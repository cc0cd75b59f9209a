"""A student as one file: what is written is what was trained; to start from, to evaluate, to teach another student."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fsmde_jax import build, build_teacher, convert, students, teacher_cache, teacher_signal
from fsmde_jax.checkpoint import read_parameters
from fsmde_jax.data.records import open_records
from fsmde_jax.data.teacher_maps import open_cache
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.evaluate import evaluate_run
from fsmde_jax.losses import teacher_bins
from fsmde_jax.models.student import normalise_images
from fsmde_jax.teacher import open_teacher, weight_hash
from fsmde_jax.train import train
from tests import rooms
from tests.sample_factory import write_folder
from tests.test_distillation import SIZE, make_config
from tests.toy_encoder import toy_encoder


@pytest.fixture(scope="module", autouse=True)
def quick():
    with toy_encoder():
        yield


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    samples = [rooms.make(seed, cameras=3, native_size=(48, 96)) for seed in range(3)]
    return write_folder(tmp_path_factory.mktemp("records") / "rooms", samples)


@pytest.fixture(scope="module")
def run(records, tmp_path_factory):
    """A run of two steps whose first evaluation was its best."""
    workdir = tmp_path_factory.mktemp("runs") / "mine"
    train(make_config(records, **{"teacher.weights": "", "train.eval_every": 1}), workdir)
    evaluate_run(make_config(records, **{"teacher.weights": ""}), workdir)
    return workdir


@pytest.fixture(scope="module")
def file(run):
    path = run.parent / "mine.safetensors"
    convert.main(["--weights", str(run), "--out", str(path)])
    return path


def test_file_holds_the_best_checkpoint_bit_for_bit_and_its_card_says_how_it_came(run, file):
    expected, _, step = read_parameters(run, "best")
    tree, meta, said = students.read_student(file)
    jax.tree.map(np.testing.assert_array_equal, tree, expected)
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    assert meta["step"] == step and meta["source"] == "mine" and f"step {step} of mine" in said
    assert meta["identity"] == json.loads((run / "best" / str(step) / "meta" / "metadata").read_text())["identity"]
    (evaluation,) = meta["evaluations"]
    assert evaluation["samples"] == 3 and 0 < evaluation["metric"]["abs_rel"] < 10
    of_run = students.read_student(run)
    jax.tree.map(np.testing.assert_array_equal, of_run[0], expected)
    assert "best checkpoint" in of_run[2]


def test_half_keeps_vectors_and_statistics(run, tmp_path):
    students.write_student(run, tmp_path / "half.safetensors", half=True)
    expected, tree = read_parameters(run, "best")[0], students.read_student(tmp_path / "half.safetensors")[0]
    stored = safetensors.numpy.load_file(tmp_path / "half.safetensors")
    assert {leaf.dtype for leaf in stored.values()} == {np.dtype("float16"), np.dtype("float32")}

    def same(found, wanted):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted.astype(np.float16) if wanted.ndim > 1 else wanted)

    jax.tree.map(same, tree, expected)


def test_evaluation_of_a_file_is_that_of_its_run(records, run, file, tmp_path, capsys):
    config = make_config(records, **{"teacher.weights": ""})
    from_run, from_file = evaluate_run(config, run), evaluate_run(config, tmp_path, str(file))
    assert from_run.flat() == from_file.flat()
    assert list((tmp_path / "evaluation").glob("*.json"))


def test_training_starts_from_a_file(records, file, tmp_path, capsys):
    unchanged = {"teacher.weights": "", "train.steps": 1, "optim.lr": 0.0}
    train(make_config(records, **unchanged), tmp_path / "tuned", init_from=str(file))
    assert "starting from" in capsys.readouterr().out
    tuned, wanted = read_parameters(tmp_path / "tuned", "latest")[0], students.read_student(file)[0]
    jax.tree.map(np.testing.assert_array_equal, tuned["params"], wanted["params"])


def test_a_student_teaches_what_it_predicts(records, run, file):
    """Relative inverse depth of single images: the inverse of its own depth up to one factor per camera's focal."""
    teacher = open_teacher(str(file))
    assert teacher.card.student and teacher.card.longer_side == SIZE[1]
    assert weight_hash(teacher) == weight_hash(open_teacher(str(run)))  # whichever way the same student is named
    opened, config = open_records(records), make_config(records, **{"teacher.weights": ""})
    batch = next(iter(teacher_cache.eval_batches(opened, SIZE, 1)))[0]
    images = normalise_images(batch["images"])
    run_teacher = jax.jit(teacher_signal.run_teacher, static_argnums=0, static_argnames="size")
    maps = run_teacher(teacher.module(), teacher.params, images, size=SIZE)
    in_turn = run_teacher(teacher.module(in_turn=True), teacher.params, images, size=SIZE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), maps, in_turn)
    apply = jax.jit(partial(build.build_model(config).apply, train=False))
    outputs = apply(students.read_student(file)[0], images, batch["intrinsics"], batch["cam_to_ego"])
    product = np.asarray(maps.rel_inv_depth * outputs["pred_depth"])
    np.testing.assert_allclose(product, np.broadcast_to(product[..., :1, :1], product.shape), rtol=1e-4)
    np.testing.assert_allclose(maps.tokens, outputs["features"], rtol=1e-4, atol=1e-5)
    assert teacher.module().sizes.embed_dim == maps.tokens.shape[-1] == 8


def test_only_a_relative_teachers_map_has_a_shift_to_fit(records, file):
    """A map that is far from affine in the labels tells the two alignments apart, all the way through the loss."""
    relative = open_teacher("tiny")
    metric = dataclasses.replace(relative, card=dataclasses.replace(relative.card, max_depth=80.0))
    assert (relative.shift_known, metric.shift_known, open_teacher(str(file)).shift_known) == (False, True, True)
    opened = open_records(records)
    batch = next(iter(teacher_cache.eval_batches(opened, SIZE, 1)))[0]
    r = jnp.asarray(1 / np.where(batch["depth"] > 0, batch["depth"], 10.0) ** 2 + 0.01)[..., ::2, ::2]
    targets = []
    for weights, says, unknown in (
        ("tiny", "auto", True), (str(file), "auto", False), ("tiny", "known", False), (str(file), "unknown", True)
    ):  # fmt: skip
        changes = {"teacher.weights": weights, "distill.bins": "aligned", "distill.w_ckd": 1.0, "distill.shift": says}
        loss = build_teacher.distilled(make_config(records, **changes), opened).loss
        outputs = {"bin_logits": jnp.zeros((*r.shape, 8))}
        signal = loss._signal(outputs, batch, teacher_signal.TeacherMaps(r), None)
        labels = loss._labels(outputs, batch, 8)
        limits = {"min_depth": labels.min_depth, "max_depth": labels.max_depth}
        depth, _ = teacher_bins.align_to_labels(r, labels.depth, labels.mask, **limits, shift=unknown)
        expected = np.asarray(teacher_bins.assign_depth(depth, labels.anchors, tau_bin=1.0))
        mask = np.asarray(signal.mask)
        assert mask.any()
        np.testing.assert_allclose(np.asarray(signal.logits)[mask], expected[mask], rtol=1e-4, atol=1e-4)
        targets.append(np.asarray(depth))
    for two in (targets[:2], targets[2:]):
        assert np.abs(np.log(two[0] / two[1])).max() > 0.2


@pytest.mark.slow
def test_distillation_from_a_student_in_the_step_and_from_its_cache(records, file, tmp_path):
    taught = {"teacher.weights": str(file), "teacher.longer_side": 0, "distill.w_ckd": 1.0, "distill.w_vr": 0.1,
              "train.log_every": 1, "augment.scale": (1.0, 1.0), "distill.tokens": (2, 4),
              "distill.bins": "aligned"}  # fmt: skip
    train(make_config(records, **taught), tmp_path / "live")
    cache = tmp_path / "cache"
    teacher_cache.main(
        ["--teacher", str(file), "--records", str(records), "--image_size", "32x64", "--out", str(cache)]
    )
    opened = open_cache(
        str(cache), open_records(records), image_size=SIZE, sha256=weight_hash(open_teacher(str(file))),
        teacher_size=SIZE, tokens=False,
    )  # fmt: skip
    assert opened.manifest.teacher["variant"] == "resnet18"
    train(make_config(records, **{**taught, "teacher.cache": str(cache), "distill.w_vr": 0.0}), tmp_path / "cached")
    live, cached = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("live", "cached")
    )
    first = [next(line for line in lines if "train/ckd" in line) for lines in (live, cached)]
    assert first[0]["train/vrkd"] > 0
    assert first[1]["train/ckd"] == pytest.approx(first[0]["train/ckd"], rel=2e-3)


def test_what_cannot_be_used_says_so(records, run, file, tmp_path):
    with pytest.raises(ConfigError, match="exists already"):
        students.write_student(run, file)
    with pytest.raises(ConfigError, match=r"ends in .safetensors"):
        students.write_student(run, tmp_path / "x.npz")
    with pytest.raises(SystemExit):
        convert.main(["--weights", str(run), "--out", str(tmp_path / "folder")])
    with pytest.raises(DataError, match=r"x\.safetensors: not a student of this project"):
        students.read_student(tmp_path / "x.safetensors")
    damaged = tmp_path / "mine.safetensors"
    damaged.write_bytes(file.read_bytes()[:-8])
    damaged.with_suffix(".json").write_text(file.with_suffix(".json").read_text())
    with pytest.raises(DataError, match="SHA-256"):
        students.read_student(damaged)
    with pytest.raises(ConfigError, match="says version"):
        open_teacher(str(file), version=1)
