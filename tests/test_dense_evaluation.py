"""P1 against dense ground truth, the trivial predictors, and the table and picture that hold them."""

import csv
import dataclasses
import json

import cv2
import numpy as np
import pytest
import torch

from fsmde_jax import evaluate, protocols, trivial
from fsmde_jax.data import dense, pipeline
from fsmde_jax.data.records import open_records
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.evaluate import EvalOptions
from fsmde_jax.viz import colour, panorama
from tests import rooms, sample_factory

SIZE = (24, 40)
STORED = (45, 64)


def metrics_of(d, g):
    e = np.log(d) - np.log(g)
    ratio = np.maximum(d / g, g / d)
    return {
        "abs_rel": np.mean(np.abs(d - g) / g), "sq_rel": np.mean((d - g) ** 2 / g),
        "rmse": np.sqrt(np.mean((d - g) ** 2)), "rmse_log": np.sqrt(np.mean(e**2)), "a1": np.mean(ratio < 1.25),
        "silog": 100 * np.std(e),
    }  # fmt: skip


def resized(depth, size):
    tensor = torch.from_numpy(depth.astype(np.float64))[None, None]
    return torch.nn.functional.interpolate(tensor, tuple(size), mode="bilinear", align_corners=False)[0, 0].numpy()


def body(size):
    """A mask in whose lower middle the car's own body is."""
    mask = np.full(size, 255, np.uint8)
    mask[-size[0] // 4 :, size[1] // 3 : size[1] // 2] = 0
    return mask


@pytest.fixture(scope="module")
def samples():
    result = []
    for seed in range(3):
        sample = rooms.make(seed, image_size=STORED, sky_rows=5)
        masks = [cv2.imencode(".png", body((90, 160)))[1].tobytes(), *[b""] * 5]
        result.append(dataclasses.replace(sample, ego_masks=masks))
    return result


@pytest.fixture(scope="module")
def records(samples, tmp_path_factory):
    return open_records(sample_factory.write_folder(tmp_path_factory.mktemp("records") / "dense", samples))


def random_prediction(seed, size=SIZE):
    rng = np.random.default_rng(seed)
    return np.exp(rng.uniform(np.log(0.05), np.log(40.0), (6, *size))).astype(np.float32)


def reference(samples, predictions, low, high):
    """P1 with dense truth as docs/protocol.md words it: {(part, camera): metrics of each image}."""
    rows = {}
    for sample, prediction in zip(samples, predictions, strict=True):
        full = [resized(p, STORED) for p in prediction]
        truth = [rooms.plane(sample, i) for i in range(6)]
        truth = [np.round(t * 256) / 256 for t in truth]
        visible = np.ones((6, *STORED), bool)
        visible[:, :5] = False
        visible[0] &= body((90, 160)).reshape(45, 2, 160)[:, :, (2 * np.arange(64) + 1) * 160 // 128].min(1) == 255
        for column in range(64):  # area resize: every native pixel that touches a stored one must be visible
            touched = body((90, 160)).reshape(45, 2, 160)[:, :, int(column * 2.5) : int(np.ceil((column + 1) * 2.5))]
            visible[0, :, column] &= touched.min((1, 2)) == 255
        valid = [v & (t > low) & (t < high) for v, t in zip(visible, truth, strict=True)]
        everything = [np.concatenate([x[v] for x, v in zip(xs, valid, strict=True)]) for xs in (truth, full)]
        shared = np.median(everything[0]) / np.median(everything[1])
        for name, f, g, v in zip(sample.camera_names, full, truth, valid, strict=True):
            for part, s in (("metric", 1.0), ("median", np.median(g[v]) / np.median(f[v])), ("shared_median", shared)):
                rows.setdefault((part, name), []).append(metrics_of(np.clip(f[v] * s, low, high), g[v]))
            near = v & (g < 20)
            rows.setdefault(("range_0_20", name), []).append(metrics_of(np.clip(f[near], low, high), g[near]))
    return rows


def test_dense_p1_against_a_plain_version(samples):
    predictions = [random_prediction(seed) for seed in range(3)]
    protocol = protocols.SurroundProtocol(min_depth=1.0, max_depth=15.0, point_rule="round", truth="dense")
    for sample, prediction in zip(samples, predictions, strict=True):
        protocol.add(prediction, sample)
    table = protocol.table()
    cameras = {}
    for (part, camera), rows in reference(samples, predictions, 1.0, 15.0).items():
        for name in rows[0]:
            expected = np.mean([row[name] for row in rows])
            np.testing.assert_allclose(
                table[part][camera][name], expected, rtol=1e-4, err_msg=f"{part} {camera} {name}"
            )
            cameras.setdefault((part, name), []).append(expected)
    for (part, name), values in cameras.items():
        np.testing.assert_allclose(table[part]["all"][name], np.mean(values), rtol=1e-4)


def test_dense_overlap_is_the_part_of_the_surface_that_a_neighbour_has_in_its_image(samples):
    sample, prediction = samples[0], random_prediction(9)
    protocol = protocols.SurroundProtocol(min_depth=0.1, max_depth=80.0, point_rule="round", truth="dense")
    protocol.add(prediction, sample)
    for i in (1, 3):
        uv = rooms.pixels_of(STORED)
        depth = dense.decode(sample.dense_depth[i], STORED, "x").ravel().astype(float)
        known = depth > 0
        rays = np.concatenate([uv, np.ones((len(uv), 1))], 1) @ np.linalg.inv(sample.intrinsics[i].astype(float)).T
        ego = (rays * depth[:, None]) @ sample.cam_to_ego[i, :3, :3].T + sample.cam_to_ego[i, :3, 3]
        seen = np.zeros(len(uv), bool)
        for j in ((i + 1) % 6, (i - 1) % 6):
            local = (ego - sample.cam_to_ego[j, :3, 3]) @ sample.cam_to_ego[j, :3, :3]
            with np.errstate(all="ignore"):
                pixel = (local @ sample.intrinsics[j].T)[:, :2] / local[:, 2:]
            edge = (np.array(STORED)[::-1] / np.array([160, 90]) - 1) / 2  # half a NATIVE pixel beyond its first centre
            low, high = -0.5 * (1 + 0 * edge), np.array(STORED)[::-1] - 0.5
            seen |= (local[:, 2] > 0) & (pixel >= low).all(1) & (pixel < high).all(1)
        d, g = resized(prediction[i], STORED).ravel()[known & seen], depth[known & seen]
        expected = metrics_of(np.clip(d, 0.1, 80), g)["abs_rel"]
        np.testing.assert_allclose(protocol.table()["overlap"][sample.camera_names[i]]["abs_rel"], expected, rtol=2e-3)


def test_the_truth_itself_has_no_error(records, samples):
    def perfect(batch):
        sample = next(s for s in samples if np.allclose(s.ego_to_global, batch["ego_to_global"][0]))
        known = np.stack([dense.decode(d, STORED, "x") for d in sample.dense_depth])
        return np.where(known > 0, known, [rooms.plane(sample, i) for i in range(6)])[None]

    result = evaluate.evaluate(perfect, records, EvalOptions(STORED, ground_truth="dense"))
    assert result.flat()["metric/abs_rel"] == 0 and result.flat()["overlap/rmse"] == 0
    lidar = evaluate.evaluate(perfect, records, EvalOptions(STORED))
    assert 0 < lidar.flat()["metric/abs_rel"] < 0.05


def test_title_options_and_refusals_of_dense_truth(records, samples, tmp_path):
    result = evaluate.evaluate(trivial.constant_predictor(8.0), records, EvalOptions(SIZE, ground_truth="dense"))
    assert "DENSE ground truth" in result.title and "dense depth at the records' image size" in result.to_markdown()
    assert result.pixels["BACK"] == 3 * 40 * 64 and result.pixels["FRONT"] < result.pixels["BACK"]
    assert result.options["ground_truth"] == "dense"
    plain = evaluate.evaluate(trivial.constant_predictor(8.0), records, EvalOptions(SIZE))
    assert "dense" not in plain.title.lower() and "dense" not in plain.to_markdown()
    without = sample_factory.make_folder(tmp_path / "without", 1)
    with pytest.raises(ConfigError, match=r"eval.ground_truth = 'dense'.*none in .*without"):
        evaluate.evaluate(
            trivial.constant_predictor(8.0), open_records(without), EvalOptions(SIZE, ground_truth="dense")
        )
    with pytest.raises(ConfigError, match=r"needs eval\.protocol surround or affine"):
        EvalOptions(SIZE, protocol="vfdepth", ground_truth="dense")
    with pytest.raises(ConfigError, match="lidar, dense"):
        EvalOptions(SIZE, ground_truth="exact")
    damaged = dataclasses.replace(samples[0], dense_depth=[*samples[0].dense_depth[:2], b"x", *[b"y"] * 3])
    folder = sample_factory.write_folder(tmp_path / "damaged", [damaged], shards=1)
    with pytest.raises(DataError, match="camera BACK_LEFT: the dense depth"):
        evaluate.evaluate(
            trivial.constant_predictor(8.0), open_records(folder), EvalOptions(SIZE, ground_truth="dense")
        )


# --- predictors without a network -----------------------------------------------------------------------------------


def test_ground_depth_of_a_level_and_a_tilted_camera():
    k = np.array([[50.0, 0, 39.5], [0, 50.0, 29.5], [0, 0, 1]])
    level = np.eye(4)
    level[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    level[2, 3] = 1.5
    uv = np.array([[39.5, 30.5], [0.0, 54.5], [39.5, 29.5], [39.5, 10.0]])
    np.testing.assert_allclose(trivial.ground_depth(k, level, uv), [75.0, 3.0, np.inf, np.inf])  # h f / (v - cy)
    down = level.copy()
    down[:3, :3] = level[:3, :3] @ np.array([[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]])
    angle = np.arctan2(0.6, 0.8)
    along = np.arctan(10.0 / 50.0)
    signs = [trivial.ground_depth(k, down, np.array([[39.5, 29.5 + s * 10.0]]))[0] for s in (1, -1)]
    for s, found in zip((1, -1), signs, strict=True):  # distance along the axis: h cos(along) / sin(pitch + along)
        pitch = angle if np.isfinite(signs[1]) else -angle
        lower = np.sin(pitch + s * along)
        assert found == pytest.approx(1.5 * np.cos(along) / lower) if lower > 0 else np.isinf(found)
    assert np.isfinite(signs).any() or pitch < 0


def test_ground_plane_is_exact_on_the_floor_of_the_room(samples):
    sample = samples[1]
    batch = next(iter(_batches([sample])))
    predicted = trivial.ground_predictor(beyond=np.full(6, 99.0), caps=np.full(6, 80.0))(batch)[0]
    for i in range(6):
        k, pose = batch["intrinsics"][0, i].astype(float), sample.cam_to_ego[i].astype(float)
        truth = rooms.depth_at(k, pose, rooms.pixels_of(SIZE))
        rays = np.concatenate([rooms.pixels_of(SIZE), np.ones((len(truth), 1))], 1) @ np.linalg.inv(k).T
        floor = np.abs((rays * truth[:, None] @ pose[:3, :3].T + pose[:3, 3])[:, 2]) < 1e-6
        assert floor.mean() > 0.1
        np.testing.assert_allclose(predicted[i].ravel()[floor], truth[floor], rtol=1e-4)
        assert (predicted[i].ravel()[~floor] > truth[~floor] - 1e-3).all()  # the floor lies behind every wall
        assert (predicted[i][:3] == 99.0).all()


def _batches(samples):
    class Few:
        cameras = samples[0].camera_names

        def __len__(self):
            return len(samples)

        def __getitem__(self, index):
            return samples[index]

        def where(self, index):
            return str(index)

    return [batch for batch, _, _ in pipeline.eval_batches(Few(), SIZE, 1)]


def test_constants_are_the_best_there_are():
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 301):
        depth = np.exp(rng.normal(2, 1, count))
        best = trivial.lowest_error_constant(depth)
        candidates = np.concatenate([depth, np.exp(np.linspace(-2, 6, 500))])
        errors = [np.mean(np.abs(c - depth) / depth) for c in candidates]
        assert np.mean(np.abs(best - depth) / depth) <= min(errors) + 1e-12
    camera = trivial.CameraDepths(
        rng.integers(0, 9, 400), np.exp(rng.normal(2, 0.5, 400)), np.where(rng.random(400) < 0.5, np.inf, 5.0)
    )
    cap = trivial._best_cap(camera, 0.1, 80.0)
    error = [np.mean(np.abs(np.minimum(camera.ground, c) - camera.depth) / camera.depth) for c in
             (cap, *np.exp(np.linspace(-1, 4.3, 300)))]  # fmt: skip
    assert error[0] <= min(error) * 1.01


@pytest.mark.parametrize("truth", ["lidar", "dense"])
def test_fitted_predictors_of_the_room(records, truth):
    """On what they were fitted on, rows beat constants, and the best constant beats the median, in abs_rel."""
    predictors = trivial.fit(records, SIZE, min_depth=0.1, max_depth=80.0, truth=truth)
    options = EvalOptions(SIZE, ground_truth=truth)
    result = evaluate.evaluate(trivial.constant_predictor(5.0), records, options, baselines=predictors)
    error = {name: rows["all"]["abs_rel"] for name, rows in result.trivial.items()}
    assert set(error) == {
        "constant, median", "constant, lowest error", "row median", "row, lowest error",
        "ground plane, constant above", "ground plane, capped",
    }  # fmt: skip
    assert error["constant, lowest error"] < error["constant, median"]
    assert error["row, lowest error"] < error["row median"] < error["constant, median"]
    assert error["ground plane, capped"] < error["constant, lowest error"]
    alone = evaluate.evaluate(predictors["row median"], records, options)
    assert result.trivial["row median"] == alone.table["metric"]
    assert result.table == evaluate.evaluate(trivial.constant_predictor(5.0), records, options).table


def test_dense_rows_are_the_medians_of_the_planes(records, samples):
    found = trivial.collect(records, STORED, min_depth=0.1, max_depth=80.0, truth="dense")
    rows = trivial._by_row(found[3], STORED[0], np.median)
    planes = np.stack([dense.decode(s.dense_depth[3], STORED, "x") for s in samples])
    np.testing.assert_allclose(rows[5:], np.median(planes[:, 5:], (0, 2)), rtol=0.02)
    assert np.all(rows[:5] == rows[5])  # no depth there: as the nearest row


def test_dense_fit_takes_every_column(records):
    """Pixels are thinned out without preferring columns, or objects on one side would count more."""
    some = [dataclasses.replace(records[0], dense_depth=[dense.encode(np.tile(np.arange(1.0, 129), (128, 1)))] * 6,
                                image_size=np.full((6, 2), 128), ego_masks=[b""] * 6)]  # fmt: skip

    class One:
        cameras = records.cameras

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return some[index]

    found = trivial.collect(One(), STORED, min_depth=0.1, max_depth=200.0, truth="dense")[0]
    counts = np.bincount(found.depth.astype(int), minlength=129)[1:]
    assert 2000 < counts.sum() <= 6000 and counts.min() > 0.5 * counts.mean()


def test_trivial_rows_stand_in_the_table(records, tmp_path):
    baselines = {"ten metres": trivial.constant_predictor(10.0), "six metres": trivial.constant_predictor(6.0)}
    result = evaluate.evaluate(trivial.constant_predictor(5.0), records, EvalOptions(SIZE), baselines=baselines)
    six, five = result.trivial["six metres"]["all"]["abs_rel"], result.flat()["metric/abs_rel"]
    text = result.to_markdown()
    assert f"| trivial: six metres | {six:.4f} |" in text and "| trivial: ten metres |" in text
    best = min(("ten metres", "six metres"), key=lambda name: result.trivial[name]["all"]["abs_rel"])
    ratio = five / result.trivial[best]["all"]["abs_rel"]
    assert f"abs_rel of `metric` is {ratio:.2f} of that of the best trivial predictor ({best})." in text
    files = result.write(tmp_path)
    assert json.loads(files[1].read_text())["trivial"] == result.trivial
    rows = [row for row in csv.DictReader(files[2].open()) if row["part"] == "trivial: six metres"]
    assert len(rows) == 7 and float(rows[-1]["abs_rel"]) == pytest.approx(six, rel=1e-6)
    plain = evaluate.evaluate(trivial.constant_predictor(5.0), records, EvalOptions(SIZE)).to_markdown()
    assert "trivial" not in plain
    pooled = evaluate.evaluate(
        trivial.constant_predictor(5.0), records, EvalOptions(SIZE, protocol="vfdepth"), baselines=baselines
    )
    assert pooled.trivial["six metres"]["all"]["abs_rel"] != six  # by its own protocol


# --- the picture ----------------------------------------------------------------------------------------------------


def test_picture_shows_dense_truth_and_its_error(records):
    result = evaluate.evaluate(trivial.constant_predictor(5.0), records, EvalOptions(SIZE, num_pictures=1))
    images = np.zeros((1, 20, 40, 3), np.uint8)
    truth = np.full((1, 20, 40), 10.0, np.float32)
    truth[:, :, 20:] = 40.0
    truth[:, :8] = 0
    sheet = panorama.panorama(
        images, np.full((1, 20, 40), 10.0), truth * 0, ["A"], np.zeros(1), max_depth=80.0, cell_width=80, dense=truth
    )
    top, left = panorama._MARGIN + 24, panorama._MARGIN
    step = (sheet.shape[0] - panorama._MARGIN) // 2, 80 + panorama._BLOCK_GAP
    depth_cell, error_cell = (sheet[top + step[0] :][:40, x : x + 80] for x in (left, left + step[1]))
    near, far = colour.colour_depth(np.array([10.0, 40.0]), 1.0, 80.0)
    right, wrong = colour.colour_error(np.array([0.0, 0.75]), panorama._WORST)
    for cell, left_colour, right_colour in ((depth_cell, near, far), (error_cell, right, wrong)):
        assert (cell[30, 20] == left_colour).all() and (cell[30, 60] == right_colour).all()
    assert not depth_cell[12, 60].any() and not error_cell[12, 60].any()  # sky: the picture, which is black
    assert result.pictures[0][1].std() > 10
    with pytest.raises(ValueError, match="dense"):
        panorama.panorama(images, truth, None, ["A"], np.zeros(1), dense=truth[:, :5])
