"""Protocol P0: relative predictions aligned to the ground truth, against plain least squares."""

import cv2
import numpy as np
import pytest

from fsmde_jax import affine, evaluate, metrics
from fsmde_jax.data import dense
from fsmde_jax.data.records import open_records
from fsmde_jax.evaluate import EvalOptions
from tests import rooms, sample_factory

SIZE, STORED, LIMITS = (24, 40), (45, 64), {"min_depth": 0.5, "max_depth": 30.0}


def test_alignment_is_least_squares_on_inverse_depth():
    rng = np.random.default_rng(0)
    gt = rng.uniform(2, 79, 400)
    r = 3.0 / gt + 0.7 + rng.normal(0, 0.02, gt.shape)
    solution = np.linalg.lstsq(np.stack([r, np.ones_like(r)], 1), 1 / gt, rcond=None)[0]
    np.testing.assert_allclose(affine.align(r, gt), solution, rtol=1e-9)
    s, t = affine.align(5 / gt - 2, gt)
    np.testing.assert_allclose(affine.to_depth(5 / gt - 2, s, t, min_depth=0.1, max_depth=80.0), gt, rtol=1e-9)
    wild = np.array([-1e3, 1e3])
    np.testing.assert_allclose(affine.to_depth(wild, s, t, min_depth=0.1, max_depth=80.0), [80.0, 0.1])


def test_where_the_alignment_fails_the_best_constant_is_left():
    gt = np.random.default_rng(1).uniform(2, 79, 50)
    for failed in (-1 / gt, np.ones_like(gt), np.full(7, 0.1), np.zeros(5), np.ones(1)):
        s, t = affine.align(failed, gt[: len(failed)])
        assert s == 0
        np.testing.assert_allclose(t, np.mean(1 / gt[: len(failed)]))


@pytest.fixture(scope="module")
def samples():
    return [rooms.make(seed, image_size=STORED, sky_rows=5) for seed in range(3)]


def reference(samples, predictions, truth_of):
    """{camera: [metrics of each image]}: resize with OpenCV in float64, solve, clip, invert."""
    rows = {}
    for sample, prediction in zip(samples, predictions, strict=True):
        for i, name in enumerate(sample.camera_names):
            gt = truth_of(sample, i)
            full = cv2.resize(prediction[i].astype(np.float64), gt.shape[::-1], interpolation=cv2.INTER_LINEAR)
            valid = (gt > LIMITS["min_depth"]) & (gt < LIMITS["max_depth"])
            r, target = full[valid], 1 / gt[valid]
            s, t = np.linalg.lstsq(np.stack([r, np.ones_like(r)], 1), target, rcond=None)[0]
            s, t = (s, t) if s > 0 else (0.0, target.mean())
            depth = 1 / np.clip(s * r + t, 1 / LIMITS["max_depth"], 1 / LIMITS["min_depth"])
            rows.setdefault(name, []).append(metrics.depth_metrics(depth, gt[valid]))
    return rows


def dense_of(sample, i):
    return dense.decode(sample.dense_depth[i], STORED, "test").astype(np.float64)


def sparse_of(sample, i):
    plane = np.zeros(sample.native_size[i])
    for u, v, z in sample.points[i]:
        plane[int(np.floor(v + np.float32(0.5))), int(np.floor(u + np.float32(0.5)))] = z
    return plane


@pytest.mark.parametrize(("truth", "truth_of"), [("dense", dense_of), ("lidar", sparse_of)])
def test_the_protocol_equals_a_plain_version(samples, truth, truth_of):
    rng = np.random.default_rng(3)
    predictions = [rng.uniform(0, 5, (6, *SIZE)).astype(np.float32) for _ in samples]
    for i in range(6):  # something true in them, so that most alignments succeed
        for sample, prediction in zip(samples, predictions, strict=True):
            exact = cv2.resize(dense_of(sample, i), SIZE[::-1], interpolation=cv2.INTER_NEAREST)
            prediction[i] += np.where(exact > 0, 20 / np.maximum(exact, 0.1), 0)
    predictions[0][2] *= -1  # one fails
    protocol = affine.AffineProtocol(**LIMITS, point_rule="round", truth=truth)
    for sample, prediction in zip(samples, predictions, strict=True):
        protocol.add(prediction, sample)
    expected = reference(samples, predictions, truth_of)
    table = protocol.table()["affine"]
    for name, rows in expected.items():
        for metric in metrics.NAMES:
            np.testing.assert_allclose(table[name][metric], np.mean([row[metric] for row in rows]), rtol=1e-6)
    everything = [np.mean([row["abs_rel"] for row in rows]) for rows in expected.values()]
    np.testing.assert_allclose(table["all"]["abs_rel"], np.mean(everything), rtol=1e-6)
    assert protocol.failed[samples[0].camera_names[2]] == 1 and sum(protocol.failed.values()) == 1
    scaled = affine.AffineProtocol(**LIMITS, point_rule="round", truth=truth)
    for sample, prediction in zip(samples, predictions, strict=True):
        scaled.add(3.5 * prediction - 2, sample)
    np.testing.assert_allclose(scaled.table()["affine"]["all"]["rmse"], table["all"]["rmse"], rtol=1e-4)


def test_an_evaluation_under_it_says_so_and_counts_failures(samples, tmp_path):
    records = open_records(sample_factory.write_folder(tmp_path / "dense", samples))
    options = EvalOptions(image_size=SIZE, protocol="affine", ground_truth="dense", num_pictures=1, **LIMITS)

    in_order = iter(samples)

    def exact(batch):
        return _inverse(next(in_order))[None]

    constant = {"constant": lambda batch: np.ones((1, 6, *SIZE), np.float32)}
    results = evaluate.evaluate(exact, records, options, baselines=constant)
    assert sum(results.failed.values()) == 0 and set(results.failed) == set(samples[0].camera_names)
    assert results.flat()["affine/abs_rel"] < 0.1 < results.trivial["constant"]["all"]["abs_rel"]
    text = results.to_markdown()
    assert "P0 `affine`" in text and "not aligned" in text and "abs_rel of `affine` is" in text
    assert results.pictures[0][1].ndim == 3
    with pytest.raises(ValueError, match=r"\[N, H, W\]"):
        affine.AffineProtocol(**LIMITS, point_rule="round").add(np.ones((5, *SIZE)), samples[0])


def _inverse(sample):
    maps = [cv2.resize(dense_of(sample, i), SIZE[::-1], interpolation=cv2.INTER_NEAREST) for i in range(6)]
    return np.stack([np.where(m > 0, 4 / np.maximum(m, 0.1) + 1, 1.0) for m in maps]).astype(np.float32)
