"""The relation probe: which tokens of adjacent views show the same points, and how often a relation knows it."""

import dataclasses
import json

import cv2
import jax
import ml_collections
import numpy as np
import optax
import pytest

from benchmarks import relations
from configs import base
from data_prep import nuscenes
from fsmde_jax import build, consistency, relation_probe, sharding
from fsmde_jax.data import schema
from fsmde_jax.data.pipeline import eval_batches
from fsmde_jax.data.records import open_records
from fsmde_jax.models.student import normalise_images
from fsmde_jax.models.teacher_images import resize_for_teacher
from fsmde_jax.relation_probe import ColumnPrior, Tally, Truth, truth_of
from fsmde_jax.run_checkpoints import Checkpoints
from fsmde_jax.state import init_state
from fsmde_jax.teacher import open_teacher
from fsmde_jax.viz.relations import Query, relation_picture
from tests import eval_rigs, rendered
from tests.boxes import camera_pose
from tests.sample_factory import write_folder

GRID = (4, 8)
SIZE = (100, 200)  # so a token is 25x25 pixels
FOCAL = 100.0  # 90 degrees
CENTRE = (99.5, 49.5)


def seen_at(yaw, azimuth, slope):
    """(u, v, z) of a point 10 m away over the ground, at `azimuth` and rising by `slope`, in a camera at the origin."""
    angle = np.deg2rad(yaw - azimuth)  # positive: to the right of the optical axis
    z = 10.0 * np.cos(angle)
    return CENTRE[0] + FOCAL * np.tan(angle), CENTRE[1] - FOCAL * slope * 10.0 / z, z


def two_cameras(points, masks=(b"", b"")):
    """Two cameras at one place, looking 30 degrees to the left and to the right; points are (azimuth, slope)."""
    per_camera = []
    for yaw in (30.0, -30.0):
        uvz = np.array([seen_at(yaw, *point) for point in points], np.float32).reshape(-1, 3)
        inside = (uvz[:, 2] > 0) & (np.abs(uvz[:, :2] + 0.5 - np.array(SIZE[::-1]) / 2) < np.array(SIZE[::-1]) / 2).all(
            1
        )
        per_camera.append(uvz[inside])
    k = np.array([[FOCAL, 0, CENTRE[0]], [0, FOCAL, CENTRE[1]], [0, 0, 1]], np.float32)
    image = cv2.imencode(".png", np.zeros((*SIZE, 3), np.uint8))[1].tobytes()
    none = np.zeros((0, 3), np.float32)
    return schema.RigSample(
        sample_id="two", scene="scene", timestamp_us=0, camera_names=["LEFT", "RIGHT"], images=[image] * 2,
        image_size=np.array([SIZE] * 2), native_size=np.array([SIZE] * 2), intrinsics=np.array([k] * 2),
        cam_to_ego=np.array([camera_pose(yaw, (0.0, 0.0, 0.0)) for yaw in (30.0, -30.0)], np.float32),
        ego_to_global=np.array([np.eye(4)] * 2, np.float32), global_origin=np.zeros(3, np.int64),
        camera_timestamps_us=np.zeros(2, np.int64), points=per_camera, extra_points=[none] * 2,
        ego_masks=list(masks), dense_depth=[b""] * 2,
    )  # fmt: skip


def png(mask):
    return cv2.imencode(".png", mask, [cv2.IMWRITE_PNG_BILEVEL, 1])[1].tobytes()


def test_a_pixel_lies_in_the_token_whose_area_holds_it():
    uv = np.array([[-0.5, -0.5], [24.49, 24.49], [24.5, 24.49], [24.49, 24.5], [199.49, 99.49], [200.0, 100.0]])
    expected = [0, 0, 1, 8, 31, 31]  # the last: as the rule `truncate` stores the edge
    assert relation_probe.tokens_at(uv, SIZE, GRID).tolist() == expected


def test_matches_of_two_cameras_by_hand():
    # Straight ahead is 30 degrees off either axis: u = 99.5 +- 57.74, columns 6 and 1; z is the same in both, so v too.
    # 10 degrees to the left: 20 and 40 degrees off: u = 135.9 and 15.6, columns 5 and 0, and v differs, slope .3:
    # z = 9.397 and 7.660, v = 17.6 and 10.3, row 0 both; slope .22: v = 26.1 and 20.8, rows 1 and 0.
    # 50 degrees to the left the left camera alone sees it.
    points = [(0.0, 0.0), (0.0, 0.02), (0.0, -0.3), (10.0, 0.3), (10.0, 0.22), (50.0, 0.0)]
    truth = truth_of(two_cameras(points), GRID)
    # rows of v: slope 0 and .02: 49.5 and 47.2, tokens' row 1 (49.5 + .5 = 50 begins row 2); slope -.3: 84.1, row 3.
    left_to_right = {(2 * 8 + 6, 2 * 8 + 1), (1 * 8 + 6, 1 * 8 + 1), (3 * 8 + 6, 3 * 8 + 1), (5, 0), (8 + 5, 0)}
    expected = {(0, 1, a, b) for a, b in left_to_right} | {(1, 0, b, a) for a, b in left_to_right}
    assert set(map(tuple, truth.matches.tolist())) == expected and len(truth.matches) == len(expected)
    assert truth.num_rows == 9  # from the right, token 0 belongs to two tokens of the left
    assert truth.mask.all()


def test_a_token_pair_counts_once_however_many_points_it_has():
    points = [(0.0, slope) for slope in np.linspace(0.02, 0.2, 7)]
    assert len(truth_of(two_cameras(points), GRID).matches) == 2


def test_ego_body_takes_points_and_tokens():
    points = [(0.0, 0.1), (0.0, -0.1), (0.0, -0.3)]  # v = 37.95, 61.05, 84.1 and u = 41.8 in the right camera
    body = np.full(SIZE, 255, np.uint8)
    body[60:66, 36:48] = 0  # a small part of its token, but the point is on it
    body[75:100, 25:45] = 0  # four fifths of the token, and the point is on it
    truth = truth_of(two_cameras(points, (b"", png(body))), GRID)
    assert set(map(tuple, truth.matches.tolist())) == {(0, 1, 14, 9), (1, 0, 9, 14)}
    assert np.flatnonzero(~truth.mask[1]).tolist() == [3 * 8 + 1] and truth.mask[0].all()
    body[:] = 255
    body[75:100, 25:41] = 0  # .64 of the token is body; the point at u = 41.8 is not on it, but its token is out
    truth = truth_of(two_cameras(points, (b"", png(body))), GRID)
    assert sorted(truth.matches[truth.matches[:, 0] == 0][:, 2].tolist()) == [14, 22]


def test_an_absent_camera_has_no_tokens_and_no_matches():
    sample = two_cameras([(0.0, 0.0)])
    sample = dataclasses.replace(sample, images=[sample.images[0], b""])
    truth = truth_of(sample, GRID)
    assert truth.matches.shape == (0, 4) and truth.mask[0].all() and not truth.mask[1].any()


def test_matches_of_a_moving_rig_are_those_of_points_of_known_identity():
    sample, ids = eval_rigs.rig(1)  # cameras fire at their own times
    truth = truth_of(sample, (6, 10))
    expected = set()
    for i, j in np.argwhere(consistency.neighbours(sample)).tolist():
        places = []
        for k in (i, j):
            uv = sample.points[k][:, :2].astype(float)
            cells = np.floor((uv + 0.5) / [100 / 10, 60 / 6]).clip(0, [9, 5]).astype(int)
            places.append({p: int(10 * row + column) for p, (column, row) in zip(ids[k], cells, strict=True)})
        expected |= {(i, j, places[0][p], places[1][p]) for p in places[0].keys() & places[1].keys()}
    assert set(map(tuple, truth.matches.tolist())) == expected and len(expected) > 100


def one_to_one(rng, views=3, tokens=12):
    """A ring of views in which the first four tokens of each are the last four of the next one, in another order."""
    codes = np.arange(views * tokens).reshape(views, tokens)  # what a token shows
    matches = []
    for i in range(views):
        j, order = (i + 1) % views, rng.permutation(4)
        codes[j, 8 + order] = codes[i, :4]
        matches += [(i, j, a, 8 + b) for a, b in enumerate(order)] + [(j, i, 8 + b, a) for a, b in enumerate(order)]
    return codes, Truth(np.array(sorted(matches)), np.ones((views, tokens), bool))


@pytest.mark.parametrize("center", ["rig", "view", "none"])
def test_one_hot_codes_of_what_is_seen_are_always_found(center):
    codes, truth = one_to_one(np.random.default_rng(0))
    tokens = np.eye(codes.size, dtype=np.float32)[codes]
    scores = relation_probe.relation_rows(tokens, truth, center=center)
    tally = Tally()
    tally.add(scores, relation_probe.softmax_rows(scores, truth, tau_r=0.1), truth)
    means = tally.means()
    assert means["top1"] == means["top5"] == 1.0
    if center == "none":  # cosines are 1 and 0
        np.testing.assert_allclose(means["probability"], np.exp(10) / (np.exp(10) + 11), rtol=1e-5)


def test_random_tokens_find_it_by_chance():
    rng = np.random.default_rng(0)
    tally, expected = Tally(), Tally()
    for _ in range(10):
        matches = np.stack([np.zeros(300, int), np.ones(300, int), *rng.integers(0, 60, (2, 300))], 1)
        truth = Truth(np.unique(matches, axis=0), np.ones((2, 60), bool))
        scores = relation_probe.relation_rows(rng.normal(size=(2, 60, 32)).astype(np.float32), truth, center="rig")
        tally.add(scores, relation_probe.softmax_rows(scores, truth, tau_r=0.1), truth)
        expected.add(*relation_probe.chance(truth), truth)
    deviation = np.sqrt(1 / 60 * 59 / 60 / tally.matches)
    assert abs(tally.means()["top1"] - 1 / 60) < 4 * deviation
    assert abs(tally.means()["top5"] - 5 / 60) < 4 * np.sqrt(5) * deviation
    found = expected.means()
    np.testing.assert_allclose([found["top1"], found["top5"], found["probability"]], [1 / 60, 5 / 60, 1 / 60])


@pytest.mark.parametrize("center", ["rig", "view", "none"])
def test_rows_are_those_of_the_formula(center):
    """Cosines and softmax by plain NumPy, with masked tokens that would change every mean."""
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(3, 7, 5)) + 2.0
    mask = rng.random((3, 7)) < 0.8
    mask[:, 0] = True
    tokens[~mask] = 1e3
    truth = Truth(np.array([[0, 1, 0, 0], [2, 1, 0, 0]]), mask)
    centred = tokens.copy()
    if center == "rig":
        centred -= tokens[mask].mean(0)
    elif center == "view":
        centred -= np.stack([t[m].mean(0) for t, m in zip(tokens, mask, strict=True)])[:, None]
    unit = centred / np.linalg.norm(centred, axis=-1, keepdims=True)
    scores = relation_probe.relation_rows(tokens.astype(np.float32), truth, center=center)
    found = relation_probe.softmax_rows(scores, truth, tau_r=0.3)
    for m, i in enumerate((0, 2)):
        logits = unit[1][mask[1]] @ unit[i, 0] / 0.3
        expected = np.zeros(7)
        expected[mask[1]] = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(found[m], expected, atol=2e-6)
        assert (found[m][~mask[1]] == 0).all()


def test_hits_count_as_sorting_does_and_ties_are_drawn_by_lot():
    rng = np.random.default_rng(0)
    mask = np.ones((2, 9), bool)
    mask[1, 8] = False
    matches = np.array([[0, 1, row, column] for row in range(9) for column in range(8)])
    truth = Truth(matches, mask)
    scores = rng.permuted(np.tile(np.arange(9.0), (len(matches), 1)), axis=1)
    scores[:, 8] = 99.0  # masked: it is not in the way
    for k in (1, 5):
        best = np.argsort(-scores[:, :8], 1)[:, :k]
        np.testing.assert_array_equal(relation_probe.hits(scores, truth, k), (best == matches[:, 3:]).any(1))
    np.testing.assert_allclose(relation_probe.hits(np.zeros((72, 9)), truth, 5), 5 / 8)
    tied = np.array([[3.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    one = Truth(np.array([[0, 1, 0, 2]]), mask)
    assert relation_probe.hits(tied, one, 1) == 0 and relation_probe.hits(tied, one, 4) == 1
    np.testing.assert_allclose(relation_probe.hits(tied, one, 2), 1 / 3)
    with pytest.raises(ValueError, match="not finite"):
        relation_probe.hits(np.full((1, 9), np.nan), one, 1)


def test_several_true_columns_bound_what_is_possible():
    matches = np.array([[0, 1, 0, c] for c in (2, 5)] + [[0, 1, 3, c] for c in range(7)])
    tally = Tally()
    truth = Truth(matches, np.ones((2, 10), bool))
    tally.add(*relation_probe.best_possible(truth), truth)
    found = tally.means()
    np.testing.assert_allclose([found["top1"], found["top5"], found["probability"]], [2 / 9, (2 + 5) / 9, 2 / 9])
    assert truth.num_rows == 2 and Tally().means() == {}


def test_the_prior_knows_only_the_other_half():
    mask = np.ones((3, 10), bool)
    one, two = (Truth(np.array(matches), mask) for matches in ([[0, 1, 4, 7]], [[0, 1, 4, 7], [1, 2, 0, 3]]))
    prior = ColumnPrior()
    for truth in (one, one, Truth(np.array([[0, 1, 4, 2]]), mask)):
        prior.add(truth)
    scores, probabilities = prior.predict(two)
    assert scores[0].argmax() == 7 and probabilities[0, 7] == 2 / 3 and probabilities[0, 2] == 1 / 3
    np.testing.assert_allclose(probabilities[1], 0.1)  # a pair of cameras that it has never seen
    # Scenes a, b, a: b is measured with both samples of a, and the reverse.
    tally, by = relation_probe.cross_fitted_prior([one, two, one], ["a", "b", "a"])
    assert by == "scenes" and tally.matches == 4
    np.testing.assert_allclose(tally.means()["top1"], (1 + 1 + 1 + 0.1) / 4)
    # Of one scene: every other sample. The second half alone holds [1, 2, 0, 3], so nobody knows it.
    tally, by = relation_probe.cross_fitted_prior([one, two, one], ["a", "a", "a"])
    assert by == "samples" and tally.matches == 4
    other = Truth(np.array([[0, 1, 4, 1]]), mask)
    assert relation_probe.cross_fitted_prior([one, other], ["a", "b"])[0].means()["top5"] < 0.5
    assert relation_probe.cross_fitted_prior([one], ["a"])[0].matches == 0


def test_the_picture_marks_what_was_asked():
    left, right = np.full((60, 100, 3), 90, np.uint8), np.full((60, 100, 3), 90, np.uint8)
    probabilities = np.full(60, np.nan)
    probabilities[:50] = np.linspace(0, 1, 50) / 24.5

    def draw(token, true):
        return relation_picture(left, right, [Query(token, [true], probabilities)], (6, 10), ("A", "B")).astype(int)

    def middle(picture, colour):
        return np.argwhere(np.abs(picture - colour).max(-1) < 40).mean(0)

    magenta, green = (255, 47, 214), (53, 255, 75)
    first, second = draw(11, 11), draw(48, 38)
    assert first.shape == second.shape
    for colour in (magenta, green):  # 48 and 38 are lower and further to the right than 11
        assert (middle(second, colour) > middle(first, colour) + 20).all()
    assert middle(first, magenta)[1] < first.shape[1] / 2 < middle(first, green)[1]
    with pytest.raises(ValueError, match="at least one query"):
        relation_picture(left, right, [], (6, 10), ("A", "B"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records of two rendered scenes of six cameras, LiDAR included."""
    root = tmp_path_factory.mktemp("relations")
    rendered.nuscenes(root / "data", frames=(2, 1))
    for split in ("mini_train", "mini_val"):
        nuscenes.main([
            "--dataroot", str(root / "data"), "--version", "v1.0-mini", "--split", split, "--image_size", "native",
            "--workers", "1", "--out", str(root / split),
        ])  # fmt: skip
    return root


@pytest.fixture(scope="module")
def student(folder):
    """The folder of a run, as training leaves it, with random parameters."""
    config = base.get_config()
    config.data.image_size = (64, 96)
    config.model.decoder_channels = (4, 4, 8, 8, 8)
    config.model.num_bins = 8
    workdir = folder / "run"
    state = init_state(build.build_model(config), optax.identity(), 0, 6, (64, 96), sharding.make_mesh())
    with Checkpoints(workdir, 1) as checkpoints:
        checkpoints.save_best(state, {"identity": {"config": config.to_dict()}})
    return workdir, config, state


def test_tokens_of_the_teacher_are_those_of_its_own_taps(folder):
    teacher, records = open_teacher("tiny"), open_records(folder / "mini_val")
    source = relations.teacher_source(teacher, records, (7, 12), longer_side=168, taps=(0, 2, 3), features=True)
    assert source.size == (98, 168)
    (batch, _, _), *_ = eval_batches(records, source.size, 1)
    found = source.run(batch)
    images = resize_for_teacher(normalise_images(batch["images"]), 98, 168)[0]
    outputs = jax.jit(teacher.module().apply)({"params": teacher.params}, images)
    for tap in (0, 2, 3):  # the grid is the teacher's own
        np.testing.assert_allclose(found[f"tap {tap}"], outputs["taps"][tap].reshape(6, 84, -1), atol=2e-4)
    features = np.asarray(outputs["features"])  # [6, 56, 96, F]: 8x8 pixels a token
    pooled = features.reshape(6, 7, 8, 12, 8, -1).mean((2, 4)).reshape(6, 84, -1)
    np.testing.assert_allclose(found["features"], pooled, rtol=1e-5, atol=2e-4)  # DPT features reach 1e3
    assert set(found) == {"tap 0", "tap 2", "tap 3", "features"}
    for blank in map(np.asarray, source.run(relations.blank_batch(batch)).values()):  # every view is the same
        np.testing.assert_allclose(blank, np.broadcast_to(blank[:1], blank.shape), atol=1e-4)


def test_tokens_of_a_student_are_its_decoders(folder, student):
    workdir, config, state = student
    records = open_records(folder / "mini_val")
    source = relations.student_source(workdir, records, (4, 6))
    (batch, _, _), *_ = eval_batches(records, (64, 96), 1)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    images = normalise_images(batch["images"])
    apply = jax.jit(lambda *arguments: build.build_model(config).apply(*arguments, train=False)["features"])
    features = np.asarray(apply(variables, images, batch["intrinsics"]))
    expected = features[0].reshape(6, 4, 2, 6, 2, -1).mean((2, 4)).reshape(6, 24, -1)
    np.testing.assert_allclose(source.run(batch)["features"], expected, atol=1e-4)


def test_command_line(folder, student, capsys):
    out, drawn = folder / "out" / "relations.json", folder / "out" / "relations.png"
    both = f"{folder / 'mini_train'},{folder / 'mini_val'}"
    relations.main([
        "--records", both, "--student", str(student[0]), "--taps", "1", "3", "--centers", "rig", "none", "--features",
        "--out", str(out), "--picture", str(drawn),
    ])  # fmt: skip
    text, result = capsys.readouterr().out, json.loads(out.read_text())
    records = open_records(both)
    truths = [truth_of(sample, (6, 10)) for sample in records]
    assert result["records"] == 3 and result["correspondences"] == sum(len(truth.matches) for truth in truths) > 50
    assert (
        f"{result['correspondences']} correspondences in {result['rows']} rows" in text and "n = 3" in result["title"]
    )
    assert result["identity"]["data"] == {"eval": records.fingerprint} and result["identity"]["hardware"]["cores"]
    assert list(result["references"]) == [
        "chance",
        "most frequent column (of the other half of the scenes)",
        "best possible",
    ]
    np.testing.assert_allclose(result["references"]["chance"]["top5"], 5 / 60)
    assert result["references"]["best possible"]["top1"] == pytest.approx(result["rows"] / result["correspondences"])
    teacher, other = result["sources"]
    assert len(teacher["made_by"]["sha256"]) == 64 and teacher["made_by"]["teacher"]["variant"] == "tiny"
    kinds = [(kind, center) for kind in ("tap 1", "tap 3", "features") for center in ("rig", "none")]
    for blank in (False, True):
        assert [(m["tokens"], m["centering"]) for m in teacher["means"] if m["blank"] == blank] == kinds
    assert [(m["tokens"], m["centering"], m["blank"]) for m in other["means"]] == [
        ("features", "rig", False), ("features", "none", False),
    ]  # fmt: skip
    assert text.count("| features | rig |") == 2 and other["made_by"]["run"] == "run"
    best = result["references"]["best possible"]
    for row in teacher["means"] + other["means"]:
        assert all(0 <= row[name] <= best[name] + 1e-9 for name in relation_probe.MEASURES)
    assert cv2.imread(str(drawn)).std() > 20


def fails(capsys, *flags):
    with pytest.raises(SystemExit):
        relations.main(list(flags))
    return capsys.readouterr().err


def test_errors_say_what_to_do(folder, student, capsys, tmp_path):
    records = ["--records", str(folder / "mini_val")]
    assert "--tokens 20x30: finer than the teacher's own tokens, 10x18" in fails(capsys, *records, "--tokens", "20x30")
    message = fails(capsys, *records, "--tokens", "7x13", "--longer_side", "630", "--student", str(student[0]))
    assert "finer than the student's features, 8x12" in message
    assert "expected ROWSxCOLUMNS" in fails(capsys, *records, "--tokens", "0x4")
    assert "--tau_r 0.0" in fails(capsys, *records, "--tau_r", "0")
    assert "train first" in fails(capsys, *records, "--student", str(tmp_path))
    lonely = write_folder(tmp_path / "lonely", [two_cameras([(50.0, 0.0)])])
    assert "no LiDAR point is seen by two adjacent cameras in 1 records" in fails(capsys, "--records", str(lonely))


def test_a_run_that_trains_a_teacher_is_no_student(folder, student, capsys, tmp_path):
    config = ml_collections.ConfigDict(student[1].to_dict())
    config.task = "teacher"
    with Checkpoints(tmp_path / "taught", 1) as checkpoints:
        checkpoints.save_best(student[2], {"identity": {"config": config.to_dict()}})
    message = fails(capsys, "--records", str(folder / "mini_val"), "--student", str(tmp_path / "taught"))
    assert "trains a teacher" in message and "fsmde_jax.convert" in message
