"""How well a bin distribution knows its error: closed forms, plain NumPy versions, and a whole evaluation."""

import dataclasses
import itertools
import json

import cv2
import jax
import numpy as np
import pytest
import torch

from configs import base
from fsmde_jax import build, checkpoint, confidence, eval_data, eval_options
from fsmde_jax.data import pipeline
from fsmde_jax.data.records import open_records
from fsmde_jax.errors import ConfigError
from fsmde_jax.evaluate import EvalOptions, evaluate, evaluate_run
from fsmde_jax.state import make_predict
from fsmde_jax.train import train
from fsmde_jax.viz.confidence_plot import confidence_plot
from tests import rooms
from tests.sample_factory import write_folder
from tests.toy_encoder import toy_encoder

SIZE = (32, 64)


def edges_of(centers):
    """Outer and inner edges [K + 1] of centers [K], in log depth."""
    c = np.log(np.asarray(centers, np.float64))
    inner = (c[1:] + c[:-1]) / 2
    return np.array([c[0] - (inner[0] - c[0]), *inner, c[-1] + (c[-1] - inner[-1])])


def cdf_of(depth, p, centers):
    """The piecewise linear CDF, in log depth."""
    return np.interp(np.log(depth), edges_of(centers), [0.0, *np.cumsum(p, dtype=np.float64)])


def softmax(z):
    e = np.exp(np.asarray(z, np.float64) - np.max(z, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def resized(plane, size):
    tensor = torch.from_numpy(np.asarray(plane, np.float64))[None, None]
    return torch.nn.functional.interpolate(tensor, tuple(size), mode="bilinear", align_corners=False)[0, 0].numpy()


def resize_weights(old, new):
    """[new, old]: what torch's bilinear resize of one axis multiplies by."""
    return np.stack([resized(np.eye(old)[i : i + 1], (1, new))[0] for i in range(old)], 1)


def reference_maps(logits, centers, label):
    """(uncertainty, PIT) [H, W] of one view, float64: CDFs at the label of the head pixels that torch would mix."""
    p = softmax(logits)
    c = np.broadcast_to(np.asarray(centers, np.float64), p.shape)
    mean = (p * np.log(c)).sum(-1)
    spread = np.sqrt((p * np.log(c) ** 2).sum(-1) - mean**2)
    rows, cols = (resize_weights(old, new) for old, new in zip(p.shape[:2], label.shape, strict=True))
    values = np.full(label.shape, np.nan)
    for y, x in zip(*np.nonzero(label), strict=True):
        cells = [(i, j) for i in np.flatnonzero(rows[y]) for j in np.flatnonzero(cols[x])]
        values[y, x] = sum(rows[y, i] * cols[x, j] * cdf_of(label[y, x], p[i, j], c[i, j]) for i, j in cells)
    return resized(spread, label.shape), values


def reference_curve(error, order):
    """Mean error of what remains of P pixels when floor(r P / 100) of the largest `order` are gone."""
    error = np.array([error[order == value].mean() for value in order])  # equal ones stand for each other
    ranked = error[np.argsort(-order)]
    return np.array([ranked[len(error) * r // 100 :].mean() for r in range(0, 100, 5)])


# --- the distribution, on the device --------------------------------------------------------------------------------


def test_cdf_of_one_bin_is_a_ramp_in_log_depth():
    centers = np.array([1.0, 4.0, 16.0], np.float32)
    certain = np.array([0.0, 1.0, 0.0], np.float32)
    depth = np.array([0.5, 2.0, 2.0 * 2**0.5, 4.0, 8.0, 50.0, 0.0], np.float32)
    found = confidence.cdf(depth, certain[None], centers[None])
    np.testing.assert_allclose(found, [0, 0, 0.25, 0.5, 1, 1, 0], atol=1e-6)
    outer = confidence.cdf(np.float32([0.5, 1.0, 32.0]), np.float32([[1, 0, 0], [1, 0, 0], [0, 0, 1]]), centers[None])
    np.testing.assert_allclose(outer, [0, 0.5, 1], atol=1e-6)  # the outer edges mirror: 0.5 and 32 m
    same = confidence.cdf(np.float32([4.9, 5.1]), np.float32([[0.3, 0.5, 0.2]]), np.full((1, 3), 5.0, np.float32))
    np.testing.assert_allclose(same, [0, 1], atol=1e-6)


def test_spread_of_two_bins():
    p, centers = np.float32([[0.25, 0.75, 0], [0, 1, 0]]), np.float32([[1.0, np.e, 50.0]])
    np.testing.assert_allclose(confidence.log_spread(p, centers), [np.sqrt(0.25 * 0.75), 0], atol=1e-6)


@pytest.mark.parametrize("per_pixel", [False, True])
def test_maps_against_numpy(per_pixel):
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (1, 2, 3, 4, 7)).astype(np.float32)
    shape = (1, 2, 3, 4, 7) if per_pixel else (1, 2, 1, 1, 7)
    centers = np.sort(np.exp(rng.uniform(-1, 4, shape)), -1).astype(np.float32)
    label = np.exp(rng.uniform(-1.5, 4.5, (1, 2, 6, 8))).astype(np.float32) * (rng.random((1, 2, 6, 8)) < 0.7)
    depth = rng.random((1, 2, 6, 8), np.float32)
    found = confidence.measure({"pred_depth": depth, "bin_logits": logits, "bin_centers": centers}, label)
    np.testing.assert_array_equal(found["pred_depth"], depth)
    for i in range(2):
        spread, values = reference_maps(logits[0, i], centers[0, i], label[0, i])
        np.testing.assert_allclose(found["uncertainty"][0, i], spread, atol=2e-5)
        known = label[0, i] > 0
        np.testing.assert_allclose(np.asarray(found["pit"][0, i])[known], values[known], atol=2e-5)
    assert np.isfinite(found["pit"]).all()


def test_a_calibrated_distribution_covers_what_it_says():
    """Labels drawn from the very mixture that a pixel's depth is the mean of."""
    rng = np.random.default_rng(2)
    h, w, k = 40, 60, 16
    middle = np.linspace(4, 12, h)[:, None] + np.linspace(-1, 1, w)
    logits = -0.5 * ((np.arange(k) - middle[..., None]) / 1.5) ** 2
    centers = np.exp(np.sort(rng.uniform(0, 4, k)))
    p, edges = softmax(logits), edges_of(centers)
    y, x = np.mgrid[: 2 * h, : 2 * w]

    def corner(at, count):  # half-pixel bilinear: own cell .75, the nearer neighbour .25
        own, other = at // 2, at // 2 + np.where(at % 2, 1, -1)
        return np.where(rng.random(at.shape) < 0.75, own, np.clip(other, 0, count - 1))

    rows, cols = corner(y, h), corner(x, w)
    chosen = (np.cumsum(p[rows, cols], -1) < rng.random((2 * h, 2 * w, 1))).sum(-1).clip(0, k - 1)
    label = np.exp(edges[chosen] + rng.random(chosen.shape) * np.diff(edges)[chosen]).astype(np.float32)
    for sharpness, low, high in ((1.0, -0.02, 0.02), (4.0, -0.5, -0.02), (0.3, 0.02, 0.5)):
        outputs = {"pred_depth": label, "bin_logits": sharpness * logits, "bin_centers": centers[None, None]}
        outputs = {name: np.float32(array)[None, None] for name, array in outputs.items()}
        values = np.asarray(confidence.measure(outputs, label[None, None])["pit"])
        gap = confidence.coverage(values.ravel().astype(np.float64)) - np.arange(0.1, 0.95, 0.1)
        assert np.all((gap > low) & (gap < high)), (sharpness, gap)


# --- sparsification -------------------------------------------------------------------------------------------------


def test_curves_against_a_plain_version():
    rng = np.random.default_rng(3)
    for count in (1, 7, 20, 333):
        pred, gt, uncertainty = (np.exp(rng.uniform(0, 4, count)) for _ in range(3))
        found = confidence.curves(pred, gt, uncertainty)
        relative, square = np.abs(pred - gt) / gt, (pred - gt) ** 2
        np.testing.assert_allclose(found["abs_rel"]["uncertainty"], reference_curve(relative, uncertainty))
        np.testing.assert_allclose(found["abs_rel"]["oracle"], reference_curve(relative, relative))
        np.testing.assert_allclose(found["rmse"]["uncertainty"], np.sqrt(reference_curve(square, uncertainty)))
        np.testing.assert_allclose(found["rmse"]["oracle"], np.sqrt(reference_curve(square, square)))
        np.testing.assert_allclose(found["rmse"]["random"], np.full(20, np.sqrt(square.mean())))
        np.testing.assert_allclose(found["abs_rel"]["random"], np.full(20, relative.mean()))


def test_an_uncertainty_that_is_the_error_has_no_area_and_a_constant_one_is_random():
    rng = np.random.default_rng(4)
    pred, gt = np.exp(rng.uniform(0, 4, (2, 500)))
    for metric, error in (("abs_rel", np.abs(pred - gt) / gt), ("rmse", np.abs(pred - gt))):
        own = confidence.curves(pred, gt, error)[metric]
        assert confidence.ause(own["uncertainty"], own["oracle"]) == 0
        constant = confidence.curves(pred, gt, np.full(500, 3.0))[metric]
        np.testing.assert_allclose(constant["uncertainty"], constant["random"])
        assert np.all(np.diff(own["oracle"]) <= 0)
        wrong = confidence.curves(pred, gt, -error)[metric]
        areas = [confidence.ause(each["uncertainty"], own["oracle"]) for each in (own, constant, wrong)]
        assert areas[0] < areas[1] < areas[2]
    perfect = confidence.curves(gt, gt, error)["rmse"]
    assert confidence.ause(perfect["uncertainty"], perfect["oracle"]) == 0


def test_area_in_closed_form():
    """Errors 1 ... 100: with r removed, the oracle leaves mean (101 - r) / 2 and the reverse order (101 + r) / 2."""
    error = np.arange(1.0, 101.0)
    oracle, reverse = confidence.sparsification(error, error), confidence.sparsification(error, -error)
    r = np.arange(0, 100, 5)
    np.testing.assert_allclose(oracle, (101 - r) / 2)
    np.testing.assert_allclose(reverse, (101 + r) / 2)
    assert confidence.ause(reverse, oracle) == pytest.approx(100 * 0.95**2 / 2 / 50.5)


def test_equal_uncertainties_go_in_every_order_alike():
    error, order = np.array([5.0, 1.0, 4.0, 2.0, 8.0, 3.0]), np.array([1.0, 1.0, 2.0, 2.0, 2.0, 0.0])
    expected = []
    for permutation in itertools.permutations(range(6)):
        tie = np.array(permutation)
        expected.append(reference_curve(error, order + 1e-6 * tie))
    np.testing.assert_allclose(confidence.sparsification(error, order), np.mean(expected, 0))


def test_coverage_counts_central_intervals():
    values = np.array([0.5, 0.44, 0.2, 0.99, 0.01])
    np.testing.assert_allclose(confidence.coverage(values), np.array([1, 2, 2, 2, 2, 3, 3, 3, 3]) / 5)


# --- averaging ------------------------------------------------------------------------------------------------------


def reference_result(samples, maps, labels, truth, low, high):
    """{camera: mean over images of (curves, AUSE, coverage)} as docs/protocol.md words it."""
    rows = {}
    for sample, own, label in zip(samples, maps, labels, strict=True):
        for i, camera in enumerate(sample.camera_names):
            if not sample.images[i]:
                continue
            size = tuple((sample.image_size if truth == "dense" else sample.native_size)[i])
            gt = np.zeros(size)
            if truth == "dense":
                gt = np.round(rooms.plane(sample, i) * 256) / 256
            else:
                for u, v, z in sample.points[i].astype(np.float64):
                    gt[int(np.floor(v + 0.5)), int(np.floor(u + 0.5))] = np.float32(z)
            valid = (gt > low) & (gt < high)
            d = np.clip(resized(own["pred_depth"][i], size), low, high)[valid]
            u, g = resized(own["uncertainty"][i], size)[valid], gt[valid]
            row = {}
            for metric, error in (("abs_rel", np.abs(d - g) / g), ("rmse", (d - g) ** 2)):
                curve, oracle = reference_curve(error, u), reference_curve(error, error)
                if metric == "rmse":
                    curve, oracle = np.sqrt(curve), np.sqrt(oracle)
                row[f"ause_{metric}"] = np.trapezoid(curve - oracle, np.arange(20) / 20) / curve[0]
                row[f"random_ause_{metric}"] = np.trapezoid(curve[0] - oracle, np.arange(20) / 20) / curve[0]
                row[f"{metric} uncertainty"], row[f"{metric} oracle"] = curve, oracle
            inside = own["pit"][i][(label[i] > low) & (label[i] < high)]
            row["coverage"] = np.array([np.mean(np.abs(inside - 0.5) <= n / 20) for n in range(1, 10)])
            rows.setdefault(camera, []).append(row)
    means = {camera: {name: np.mean([row[name] for row in of], 0) for name in of[0]} for camera, of in rows.items()}
    return means | {"all": {name: np.mean([of[name] for of in means.values()], 0) for name in row}}


def assert_same_result(found, expected, rtol=1e-6, atol=1e-9):
    assert set(found["cameras"]) == set(expected)
    for camera, of in expected.items():
        entry = found["cameras"][camera]
        for name, value in of.items():
            metric, _, part = name.partition(" ")
            got = entry["curves"][metric][part] if part else entry[name]
            np.testing.assert_allclose(got, value, rtol=rtol, atol=atol, err_msg=f"{camera} {name}")
        error = np.mean(np.abs(of["coverage"] - np.arange(1, 10) / 10))
        np.testing.assert_allclose(entry["ece"], error, rtol=rtol, atol=atol)


@pytest.mark.parametrize("truth", ["lidar", "dense"])
def test_means_over_images_then_cameras(truth):
    rng = np.random.default_rng(5)
    samples = [rooms.make(seed, cameras=3, native_size=(45, 80), image_size=(30, 40)) for seed in range(3)]
    empty = np.zeros((0, 3), np.float32)
    lacking = dataclasses.replace(samples[1], images=[*samples[1].images[:2], b""])
    samples[1] = dataclasses.replace(lacking, points=[*lacking.points[:2], empty])
    known = confidence.Confidence(min_depth=1.0, max_depth=12.0, point_rule="round", truth=truth)
    maps, labels = [], []
    for sample in samples:
        names = ("pred_depth", "uncertainty", "pit")
        maps.append({name: rng.random((3, 12, 20)).astype(np.float32) * 10 ** (name == "pred_depth") for name in names})
        labels.append(np.where(rng.random((3, 12, 20)) < 0.5, rng.uniform(0.5, 15, (3, 12, 20)), 0))
        known.add(maps[-1], labels[-1], sample)
    result = known.result()
    assert_same_result(result, reference_result(samples, maps, labels, truth, 1.0, 12.0))
    assert json.loads(json.dumps(result)) == result
    np.testing.assert_allclose(result["removed"], np.arange(0, 1, 0.05))


def test_images_without_truth_or_labels_are_left_out():
    sample = rooms.make(0, cameras=3, native_size=(45, 80))
    maps = {name: np.ones((3, 12, 20), np.float32) for name in ("pred_depth", "uncertainty", "pit")}
    known = confidence.Confidence(min_depth=100.0, max_depth=200.0, point_rule="round")
    known.add(maps, np.ones((3, 12, 20)), sample)
    assert known.result() == {}
    known = confidence.Confidence(min_depth=0.1, max_depth=80.0, point_rule="round")
    known.add(maps, np.zeros((3, 12, 20)), sample)
    entry = known.result()["cameras"]["all"]
    assert "ece" not in entry and "ause_rmse" in entry
    with pytest.raises(ValueError, match="not finite"):
        known.add(maps | {"uncertainty": maps["pit"] * np.nan}, np.zeros((3, 12, 20)), sample)


# --- the evaluation job ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def toys():
    """An encoder that compiles at once."""
    with toy_encoder():
        yield


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    samples = [rooms.make(seed, cameras=3, native_size=(48, 80), masks=True) for seed in range(3)]
    return write_folder(tmp_path_factory.mktemp("records") / "room", samples)


def make_config(records, **changes):
    c = base.get_config()
    c.data.train_records = c.data.eval_records = str(records)
    c.data.image_size = SIZE
    c.data.batch_size = 1
    c.model.decoder_channels = (4, 4, 8, 8, 8)
    c.model.num_bins = 8
    c.model.focal_range = (100.0, 900.0)
    c.optim.warmup_steps = 1
    c.train.steps = 2
    c.train.log_every = 2
    c.train.eval_every = c.train.picture_every = c.eval.num_pictures = 0
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(scope="module")
def run(records, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    changes = {"eval.confidence": True, "train.picture_every": 2, "augment.camera_dropout": 0.5}
    train(make_config(records, **changes), workdir)
    return workdir


@pytest.mark.parametrize("truth", ["lidar", "dense"])
def test_whole_evaluation_against_numpy(records, run, truth):
    """The maps by NumPy from the network's own logits and centers, everything after them by the plain version."""
    changes = {"eval.ground_truth": truth, "eval.batch_size": 2}
    config = make_config(records, **changes, **{"eval.confidence": True, "eval.num_pictures": 1})
    results = evaluate_run(config, run)
    parameters, _, _ = checkpoint.read_parameters(run, "best")
    predict = make_predict(build.build_model(config), lambda outputs: outputs)
    opened = open_records(records)
    samples, maps, labels = [], [], []
    for batch, some, _ in pipeline.eval_batches(opened, SIZE, 1):
        inputs = {name: value for name, value in batch.items() if name != "record_index"}
        out = jax.device_get(predict(parameters["params"], parameters["batch_stats"], inputs))
        label = batch["depth"][0]
        if truth == "dense":
            pixels = [(2 * np.arange(n) + 1) * m // (2 * n) for n, m in zip(SIZE, (48, 80), strict=True)]
            planes = [np.round(rooms.plane(some[0], i) * 256) / 256 for i in range(3)]
            label = np.stack([plane[np.ix_(*pixels)] for plane in planes]) * batch["ego_mask"][0]
        pairs = [reference_maps(out["bin_logits"][0, i], out["bin_centers"][0, i], label[i]) for i in range(3)]
        own = {"uncertainty": np.stack([p[0] for p in pairs]), "pit": np.stack([p[1] for p in pairs])}
        maps.append(own | {"pred_depth": out["pred_depth"][0]})
        labels.append(label)
        samples.append(some[0])
    expected = reference_result(samples, maps, labels, truth, 0.1, 80.0)
    of = results.confidence["cameras"]
    if truth == "lidar":
        assert_same_result(results.confidence, expected, rtol=1e-3, atol=2e-3)
    else:  # two cameras have a mask of the car's own body, which the plain curves do not know
        for camera, names in {"BACK_LEFT": ("ause_abs_rel", "ause_rmse", "coverage"), "FRONT": ("coverage",)}.items():
            for name in names:
                np.testing.assert_allclose(of[camera][name], expected[camera][name], rtol=1e-3, atol=1e-3)
        assert 0 < results.pixels["FRONT"] < results.pixels["BACK_LEFT"] == 3 * 48 * 80
    for camera, metric in itertools.product(of, ("abs_rel", "rmse")):  # with nothing removed, P1's own number
        for curve in of[camera]["curves"][metric].values():
            assert curve[0] == pytest.approx(results.table["metric"][camera][metric])
    entry = results.confidence["cameras"]["all"]
    assert results.flat()["confidence/ece"] == entry["ece"]
    plain = evaluate_run(make_config(records, **changes), run)
    assert plain.confidence == {} and not any("confidence" in name for name in plain.flat())
    for name, value in plain.flat().items():
        assert results.flat()[name] == pytest.approx(value, rel=1e-5), name
    stem = "test_train_surround" + "_dense" * (truth == "dense")
    folder = run / "evaluation"
    evaluate_run(config, run)  # the files of the plain one have the same names
    saved = json.loads((folder / f"{stem}.json").read_text())
    assert saved["confidence"] == results.confidence and saved["options"]["confidence"] is True
    text = (folder / f"{stem}.md").read_text()
    assert f"| all | {entry['ause_abs_rel']:.4f} | {entry['random_ause_abs_rel']:.4f} |" in text
    assert f"| holds of the labels | {100 * entry['coverage'][0]:.1f} % |" in text
    picture = cv2.imread(str(folder / f"{stem}_confidence.png"))
    assert picture.std() > 10 and picture.shape[1] > 2 * picture.shape[0]


def test_evaluation_during_training_takes_the_same_way(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "eval/confidence/ause_rmse" in line]
    assert [line["step"] for line in found] == [2] and 0 <= found[0]["eval/confidence/ece"] <= 1


def test_labels_of_dense_truth_leave_rows_beyond_the_samples_empty(records):
    *_, (batch, samples, _) = pipeline.eval_batches(open_records(records), SIZE, 2)
    labels = eval_data.label_maps(batch, samples, "dense")
    assert len(samples) == 1 and labels[0].any() and not labels[1].any()


def test_what_cannot_be_measured_is_refused(records):
    for protocol in ("vfdepth", "affine"):
        with pytest.raises(
            ConfigError, match=rf"eval\.confidence = True needs eval\.protocol surround, not {protocol}"
        ):
            EvalOptions(SIZE, protocol=protocol, confidence=True)
    with pytest.raises(ConfigError, match=r"eval\.flip_tta = False"):
        EvalOptions(SIZE, flip_tta=True, confidence=True)
    with pytest.raises(ConfigError, match=r"eval\.confidence = True: a student's"):
        eval_options.check(make_config(records, **{"task": "teacher", "eval.confidence": True}))
    eval_options.check(make_config(records, **{"eval.confidence": True}))


def test_plot_of_every_kind_of_result():
    curve = {"uncertainty": [0.2] * 20, "oracle": [0.1] * 20, "random": [0.2] * 20}
    perfect = {name: [0.0] * 20 for name in curve}
    entry = {"curves": {"abs_rel": curve, "rmse": perfect}, "ause_abs_rel": 0.5, "ause_rmse": 0.0}
    found = {"removed": [i / 20 for i in range(20)], "levels": [i / 10 for i in range(1, 10)]}
    covered = {"coverage": [0.5] * 9, "ece": 0.2}
    pictures = []
    for more in ({}, covered):
        data = confidence_plot(found | {"cameras": {"all": entry | more}}, "a title")
        pictures.append(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))
    assert pictures[0].shape == pictures[1].shape and (pictures[0] != pictures[1]).any()


def test_a_predictor_that_gives_maps_by_name(records):
    """`evaluate` itself, with a distribution that is certain of the middle bin."""

    def predict(batch):
        shape = batch["images"].shape[:4]
        logits = np.zeros((*shape[:2], 4, 8, 3), np.float32) + np.float32([-99, 0, -99])
        centers = np.broadcast_to(np.float32([2.0, 8.0, 32.0]), (*shape[:2], 1, 1, 3))
        return {"pred_depth": np.full(shape, 8.0, np.float32), "bin_logits": logits, "bin_centers": centers}

    result = evaluate(predict, open_records(records), EvalOptions(SIZE, confidence=True))
    entry = result.confidence["cameras"]["all"]
    assert entry["ause_rmse"] == pytest.approx(entry["random_ause_rmse"])
    labels = [b["depth"][0] for b, _, _ in pipeline.eval_batches(open_records(records), SIZE, 1)]
    inside = [[np.mean((d[d > 0] > 4) & (d[d > 0] < 16)) for d in rig] for rig in labels]
    inner = [[np.mean(np.abs(np.log(d[d > 0] / 8)) <= 0.5 * np.log(2)) for d in rig] for rig in labels]
    assert entry["coverage"][4] == pytest.approx(np.mean(inner)) and entry["coverage"][8] <= np.mean(inside) + 1e-9
