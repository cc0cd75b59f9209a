"""P0, P1, P2, overlap and consistency against plain float64 versions: full resize by torch, ground truth by loops."""

import numpy as np
import pytest
import torch

from fsmde_jax import consistency, protocols
from tests import eval_rigs

SIZE = (24, 40)  # network height and width


def _metrics(d, g):
    e = np.log(d) - np.log(g)
    ratio = np.maximum(d / g, g / d)
    return {
        "abs_rel": np.mean(np.abs(d - g) / g),
        "sq_rel": np.mean((d - g) ** 2 / g),
        "rmse": np.sqrt(np.mean((d - g) ** 2)),
        "rmse_log": np.sqrt(np.mean(e**2)),
        "a1": np.mean(ratio < 1.25),
        "a2": np.mean(ratio < 1.5625),
        "a3": np.mean(ratio < 1.953125),
        "silog": 100 * np.sqrt(np.mean(e**2) - np.mean(e) ** 2),
        "log10": np.mean(np.abs(np.log10(d) - np.log10(g))),
    }


def _resized(depth, size):
    tensor = torch.from_numpy(depth.astype(np.float64))[None, None]
    return torch.nn.functional.interpolate(tensor, tuple(int(s) for s in size), mode="bilinear", align_corners=False)[
        0, 0
    ].numpy()


def _scattered(points, size, rule):
    image = np.zeros(tuple(size))
    for u, v, z in points:
        x, y = (
            (int(np.floor(u + np.float32(0.5))), int(np.floor(v + np.float32(0.5))))
            if rule == "round"
            else (int(u), int(v))
        )
        image[y, x] = z
    return image


def _predictions(sample, seed):
    """A bad guess with a scale of its own per image; some values beyond the range on both sides."""
    rng = np.random.default_rng(seed + 100)
    pred = np.exp(rng.uniform(np.log(0.05), np.log(150.0), (sample.num_cameras, *SIZE)))
    return (pred * rng.uniform(0.5, 2.0, (sample.num_cameras, 1, 1))).astype(np.float32)


def _surround_reference(samples, preds, low, high, rule):
    """P1, step by step as docs/protocol.md words it."""
    per_image = {}  # (part, camera) -> list of metrics
    for sample, pred in zip(samples, preds, strict=True):
        full = [_resized(p, s) for p, s in zip(pred, sample.native_size, strict=True)]
        gt = [_scattered(p, s, rule) for p, s in zip(sample.points, sample.native_size, strict=True)]
        valid = [(g > low) & (g < high) for g in gt]
        all_gt = np.concatenate([g[v] for g, v in zip(gt, valid, strict=True)])
        all_pred = np.concatenate([f[v] for f, v in zip(full, valid, strict=True)])
        shared = np.median(all_gt) / np.median(all_pred)
        for name, f, g, v in zip(sample.camera_names, full, gt, valid, strict=True):
            if not v.any():
                continue
            for part, s in (("metric", 1.0), ("median", np.median(g[v]) / np.median(f[v])), ("shared_median", shared)):
                per_image.setdefault((part, name), []).append(_metrics(np.clip(f[v] * s, low, high), g[v]))
            for a, b in ((0, 20), (20, 40), (40, 80), (80, 200)):
                w = v & (g >= a) & (g < b)
                if w.any():
                    per_image.setdefault((f"range_{a}_{b}", name), []).append(_metrics(np.clip(f[w], low, high), g[w]))
    table = {}
    for (part, name), rows in per_image.items():
        table.setdefault(part, {})[name] = {m: np.mean([r[m] for r in rows]) for m in rows[0]}
    for rows in table.values():
        cameras = list(rows.values())
        rows["all"] = {m: np.mean([r[m] for r in cameras]) for m in cameras[0]}
    return table


def _compare(found, expected):
    assert set(found) >= set(expected)
    for part, rows in expected.items():
        assert set(found[part]) == set(rows), part
        for name, row in rows.items():
            for metric, value in row.items():
                np.testing.assert_allclose(
                    found[part][name][metric], value, rtol=1e-5, atol=1e-8, err_msg=f"{part} {name} {metric}"
                )


@pytest.mark.parametrize(("rule", "high"), [("round", 80.0), ("truncate", 200.0)])
def test_surround_against_a_plain_version(rule, high):
    samples = [eval_rigs.rig(seed, rule=rule)[0] for seed in range(3)]
    preds = [_predictions(s, i) for i, s in enumerate(samples)]
    samples[1].points[2] = samples[1].points[2][:0]  # an image without ground truth is skipped, and counted
    protocol = protocols.SurroundProtocol(min_depth=0.1, max_depth=high, point_rule=rule)
    for sample, pred in zip(samples, preds, strict=True):
        protocol.add(pred, sample)
    _compare(protocol.table(), _surround_reference(samples, preds, 0.1, high, rule))
    assert protocol.skipped == {name: int(name == "BACK_LEFT") for name in eval_rigs.NAMES}
    assert protocol.samples == 3
    assert ("range_80_200" in protocol.table()) == (high > 80)


def test_surround_leaves_out_a_camera_that_the_sample_lacks():
    sample, _ = eval_rigs.rig(0)
    pred = _predictions(sample, 0)
    sample.images[3], sample.points[3] = b"", sample.points[3][:0]
    protocol = protocols.SurroundProtocol(min_depth=0.1, max_depth=80.0, point_rule="round")
    protocol.add(pred, sample)
    assert "BACK" not in protocol.pixels and "BACK" not in protocol.table()["metric"]
    assert not any("BACK" in pair.split(">") for pair in protocol.consistency.result())
    _compare(protocol.table(), _surround_reference([sample], [pred], 0.1, 80.0, "round"))


@pytest.mark.parametrize("source", [(5, 7), (24, 40), (1, 3), (60, 100), (90, 131)])
def test_sampling_equals_torch_resize(source):
    rng = np.random.default_rng(0)
    image, size = rng.uniform(1, 80, source).astype(np.float32), (60, 100)
    rows, cols = (a.ravel() for a in np.mgrid[: size[0], : size[1]])
    found = protocols.sample_bilinear(image, rows, cols, size).reshape(size)
    np.testing.assert_allclose(found, _resized(image, size), rtol=1e-12)


def test_ground_truth_pixel_rules_and_order():
    def _number(found):
        return [int(np.flatnonzero((points == uvz).all(1))[0]) for uvz in found.uvz]

    points = np.array(
        [[1.5, 0.4, 5.0], [2.2, 0.0, 7.0], [1.9, 0.9, 9.0], [-0.4, 1.0, 3.0], [3.6, 0.0, 4.0]], np.float32
    )
    found = protocols.ground_truth(points, (2, 4), "round")
    image = {(r, c): (d, p) for r, c, d, p in zip(found.rows, found.cols, found.depth, _number(found), strict=True)}
    assert image == {
        (0, 2): (7.0, 1),
        (1, 2): (9.0, 2),
        (1, 0): (3.0, 3),
    }  # halves go up; u = 3.6 rounds out of the image
    found = protocols.ground_truth(points, (2, 4), "truncate")
    image = {(r, c): (d, p) for r, c, d, p in zip(found.rows, found.cols, found.depth, _number(found), strict=True)}
    assert image == {
        (0, 1): (9.0, 2),
        (0, 2): (7.0, 1),
        (0, 3): (4.0, 4),
    }  # the later point of a pixel wins, not the nearer
    with pytest.raises(ValueError, match="point rule"):
        protocols.ground_truth(points, (2, 4), "nearest")


def test_limits_are_strict_and_medians_are_of_the_unclipped_prediction():
    sample, _ = eval_rigs.rig(0, cameras=1, native=(4, 4), stored=(4, 4))
    depths = [
        [0, 0, 0.125],
        [1, 0, 80.0],
        [0, 1, 4.0],
        [1, 1, 8.0],
        [2, 1, 6.0],
        [3, 1, 10.0],
    ]  # 1/8 is exact in float32
    sample.points = [np.array(depths, np.float32)]
    pred = np.full((1, 4, 4), 1.0, np.float32)
    pred[0, 1] = [100.0, 200.0, 300.0, 400.0]
    protocol = protocols.SurroundProtocol(min_depth=0.125, max_depth=80.0, point_rule="round")
    protocol.add(pred, sample)
    table, gt = protocol.table(), np.array([4.0, 8.0, 6.0, 10.0])
    assert protocol.pixels["FRONT"] == 4
    np.testing.assert_allclose(table["metric"]["all"]["abs_rel"], np.mean(np.abs(80.0 - gt) / gt))
    scaled = np.array([100.0, 200.0, 300.0, 400.0]) * (7.0 / 250.0)  # means of the two middle values
    np.testing.assert_allclose(table["median"]["all"]["abs_rel"], np.mean(np.abs(scaled - gt) / gt))


def _vfdepth_reference(samples, preds, masks, high, rule, batch):
    values = {}
    for start in range(0, len(samples), batch):
        for c, name in enumerate(samples[0].camera_names):
            d, g = [], []
            for sample, pred, mask in list(zip(samples, preds, masks, strict=True))[start : start + batch]:
                native, size = _scattered(sample.points[c], sample.native_size[c], rule), pred.shape[1:]
                small = np.zeros(size)
                for y, x in np.argwhere(native > 0):
                    small[int(y * (size[0] / native.shape[0])), int(x * (size[1] / native.shape[1]))] = native[y, x]
                valid = (small > 0) & (small < high) & mask[c]
                d.append(np.clip(pred[c].astype(np.float64), 0, high)[valid])
                g.append(small[valid])
            d, g = torch.from_numpy(np.concatenate(d)), torch.from_numpy(np.concatenate(g))
            scale = torch.median(g) / torch.median(d)
            values.setdefault(("metric", name), []).append(_metrics(d.numpy(), g.numpy()))
            values.setdefault(("median", name), []).append(_metrics(torch.clamp(d * scale, 0, high).numpy(), g.numpy()))
    table = {}
    for (part, name), rows in values.items():
        table.setdefault(part, {})[name] = {m: np.mean([r[m] for r in rows]) for m in rows[0]}
    for rows in table.values():
        cameras = list(rows.values())
        rows["all"] = {m: np.mean([r[m] for r in cameras]) for m in cameras[0]}
    return table


def test_vfdepth_against_a_plain_version_with_a_smaller_last_batch():
    samples = [eval_rigs.rig(seed, rule="truncate")[0] for seed in range(5)]
    preds = [_predictions(s, i) for i, s in enumerate(samples)]
    rng = np.random.default_rng(7)
    masks = [rng.random((6, *SIZE)) < 0.8 for _ in samples]
    protocol = protocols.VfdepthProtocol(max_depth=200.0, point_rule="truncate", batch_size=4)
    for sample, pred, mask in zip(samples, preds, masks, strict=True):
        protocol.add(pred, sample, mask)
    expected = _vfdepth_reference(samples, preds, masks, 200.0, "truncate", 4)
    _compare(protocol.table(), expected)
    _compare(protocol.table(), expected)  # asking twice changes nothing


def test_vfdepth_counts_batches_without_ground_truth():
    sample, _ = eval_rigs.rig(0)
    pred, mask = _predictions(sample, 0), np.ones((6, *SIZE), bool)
    mask[1] = False
    protocol = protocols.VfdepthProtocol(max_depth=80.0, point_rule="round")
    protocol.add(pred, sample, mask)
    assert "FRONT_LEFT" not in protocol.table()["metric"]
    assert protocol.skipped["FRONT_LEFT"] == 1 and protocol.skipped["FRONT"] == 0


def test_correspondences_find_exactly_the_shared_points():
    sample, ids = eval_rigs.rig(3, points=3000)
    adjacent = consistency.neighbours(sample)
    ring = np.array([[abs(i - j) in (1, 5) for j in range(6)] for i in range(6)])
    np.testing.assert_array_equal(adjacent, ring)
    for i, j in np.argwhere(ring):
        a, b = consistency.correspondences(sample, i, j)
        np.testing.assert_array_equal(ids[i][a], ids[j][b])
        assert set(ids[i][a]) == set(ids[i]) & set(ids[j])
        assert len(a) > 50
    empty, _ = eval_rigs.rig(3)
    empty.points[1] = empty.points[1][:0]
    assert len(consistency.correspondences(empty, 0, 1)[0]) == 0
    assert len(consistency.correspondences(empty, 1, 0)[0]) == 0


def test_overlap_pixels_are_those_whose_point_a_neighbour_has():
    sample, ids = eval_rigs.rig(4)
    for i in range(6):
        shared = np.isin(ids[i], np.concatenate([ids[(i - 1) % 6], ids[(i + 1) % 6]]))
        np.testing.assert_array_equal(consistency.seen_by_neighbours(sample, i, sample.points[i]), shared)


def test_overlap_part_of_the_table():
    sample, ids = eval_rigs.rig(5)
    pred = _predictions(sample, 5)
    protocol = protocols.SurroundProtocol(min_depth=0.1, max_depth=80.0, point_rule="round")
    protocol.add(pred, sample)
    rows = []
    for i, name in enumerate(sample.camera_names):
        known, image = {}, _resized(pred[i], sample.native_size[i])
        for k, (u, v, z) in enumerate(sample.points[i]):
            known[int(np.floor(v + np.float32(0.5))), int(np.floor(u + np.float32(0.5)))] = (z, ids[i][k])
        neighbours = set(ids[(i - 1) % 6]) | set(ids[(i + 1) % 6])
        chosen = [(image[yx], z) for yx, (z, k) in known.items() if k in neighbours and 0.1 < z < 80]
        d, g = np.array(chosen, np.float64).T
        rows.append(_metrics(np.clip(d, 0.1, 80), g)["abs_rel"])
        np.testing.assert_allclose(protocol.table()["overlap"][name]["abs_rel"], rows[-1], rtol=1e-5)
    np.testing.assert_allclose(protocol.table()["overlap"]["all"]["abs_rel"], np.mean(rows), rtol=1e-5)


def _consistency_reference(sample, ids, at_points, low, high):
    values = {}
    k = np.array([[50.0, 0, 49.5], [0, 50.0, 29.5], [0, 0, 1]])  # native intrinsics of eval_rigs.rig
    pose = [sample.ego_to_global[i].astype(float) @ sample.cam_to_ego[i].astype(float) for i in range(6)]
    for i in range(6):
        for j in ((i + 1) % 6, (i - 1) % 6):
            place = {p: n for n, p in enumerate(ids[j])}
            for n, p in enumerate(ids[i]):
                if p not in place:
                    continue
                u, v, z = sample.points[i][n].astype(float)
                z_j = sample.points[j][place[p], 2]
                if not (low < z < high and low < z_j < high):
                    continue
                d_i, d_j = np.clip(at_points[i][n], low, high), np.clip(at_points[j][place[p]], low, high)
                world = pose[i] @ np.append(np.linalg.inv(k) @ [u, v, 1.0] * d_i, 1.0)
                z_ij = (np.linalg.inv(pose[j]) @ world)[2]
                pair = f"{sample.camera_names[i]}>{sample.camera_names[j]}"
                values.setdefault(pair, []).append(abs(z_ij - d_j) / d_j)
    return {p: np.mean(v) for p, v in values.items()} | {"overall": np.mean(np.concatenate(list(values.values())))}


def test_consistency_against_loops():
    sample, ids = eval_rigs.rig(6, points=1500)
    rng = np.random.default_rng(0)
    at_points = [np.exp(rng.uniform(-3, 5, len(p))) for p in sample.points]
    measure = consistency.Consistency(1.0, 60.0)
    measure.add(sample, at_points)
    expected = _consistency_reference(sample, ids, at_points, 1.0, 60.0)
    assert set(measure.result()) == set(expected)
    for pair, value in expected.items():
        np.testing.assert_allclose(measure.result()[pair], value, rtol=1e-6, err_msg=pair)


def test_consistency_is_zero_for_the_truth_and_sees_one_camera_that_disagrees():
    sample, _ = eval_rigs.rig(7)
    measure = consistency.Consistency(0.1, 200.0)
    measure.add(sample, [p[:, 2].astype(np.float64) for p in sample.points])
    assert measure.result()["overall"] < 1e-5
    wrong = consistency.Consistency(0.1, 200.0)
    wrong.add(sample, [p[:, 2].astype(np.float64) * (1.3 if i == 0 else 1.0) for i, p in enumerate(sample.points)])
    for pair in measure.counts:
        value = wrong.result()[pair]
        assert value > 0.1 if "FRONT" in pair.split(">") else value < 1e-5, pair


def test_a_single_camera_has_no_overlap_and_no_consistency():
    sample, _ = eval_rigs.rig(0, cameras=1)
    protocol = protocols.SurroundProtocol(min_depth=0.1, max_depth=80.0, point_rule="round")
    protocol.add(_predictions(sample, 0), sample)
    assert protocol.consistency.result() == {}
    assert "overlap" not in protocol.table()


def test_unusable_predictions_are_refused():
    sample, _ = eval_rigs.rig(0)
    protocol = protocols.SurroundProtocol(min_depth=0.1, max_depth=80.0, point_rule="round")
    with pytest.raises(ValueError, match="N = 6"):
        protocol.add(np.ones((5, *SIZE)), sample)
    with pytest.raises(ValueError, match="not finite"):
        protocol.add(np.full((6, *SIZE), np.nan), sample)
    with pytest.raises(ValueError, match="positive depths"):
        protocol.add(np.full((6, *SIZE), -1.0), sample)
    with pytest.raises(ValueError, match="ego_mask"):
        protocols.VfdepthProtocol(max_depth=80.0, point_rule="round").add(
            np.ones((6, *SIZE)), sample, np.ones((6, 2, 2), bool)
        )
