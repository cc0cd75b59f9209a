"""The benchmark of a teacher's alignment: its ways of fitting are right, and its table says so."""

import json
import types

import numpy as np
import pytest

from benchmarks import alignment
from tests import rooms
from tests.sample_factory import write_folder
from tests.toy_teacher import ToyTeacher

LIMITS = {"min_depth": 0.5, "max_depth": 60.0}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    samples = [rooms.make(seed, cameras=3, native_size=(48, 96)) for seed in range(2)]
    return str(write_folder(tmp_path_factory.mktemp("records"), samples))


def test_every_way_of_fitting_finds_what_an_exact_map_leaves_open():
    rng = np.random.default_rng(0)
    inverse = rng.uniform(0.05, 0.5, (1, 2, 8, 12))
    fine = alignment.upsampled(inverse, (16, 24))
    mask = rng.random(fine.shape) < 0.3
    for shift, way in (
        (0.0, alignment.trained_with(False, **LIMITS)),
        (5.0, alignment.trained_with(True, **LIMITS)),
        (5.0, alignment.least_squares(True, **LIMITS)),
        (5.0, alignment.least_squares(False, **LIMITS)),
    ):
        found, valid = way(3.0 * inverse + shift, 1 / fine, mask)
        assert valid.all()
        np.testing.assert_allclose(found, 1 / inverse, rtol=1e-3)
        few = np.zeros_like(mask)
        few[:, :, 0, :9] = True
        assert not way(3.0 * inverse + shift, 1 / fine, few)[1].any()


def test_least_squares_minimises_what_it_is_named_after():
    rng = np.random.default_rng(1)
    r = rng.uniform(0.1, 1.0, (1, 1, 8, 12))
    fine = alignment.upsampled(r, (16, 24))
    depth = np.exp(rng.normal(0, 0.2, fine.shape)) / (0.3 * fine + 0.02)
    mask = rng.random(fine.shape) < 0.5
    x, d = fine[mask], depth[mask]
    for relative, weight in ((True, d), (False, np.ones_like(d))):
        found, _ = alignment.least_squares(relative, 1e-3, 1e6)(r, depth, mask)
        slope, level = np.polyfit(r.ravel(), 1 / found.ravel(), 1)
        loss = [np.sum((weight * (slope * a * x + level + b) - weight / d) ** 2)
                for a, b in ((1, 0), (1.01, 0), (0.99, 0), (1, 1e-3), (1, -1e-3))]  # fmt: skip
        assert loss[0] == min(loss)


@pytest.fixture
def toys(monkeypatch):
    """A toy teacher, and a student that says 3 to 4 m from left to right; what it was given goes into the dict."""
    given = {}

    def student(images, intrinsics, cam_to_ego):
        given["shapes"] = images.shape, intrinsics.shape, cam_to_ego.shape
        given["says"] = np.full(images.shape[:3], 3.0) + np.linspace(0, 1, images.shape[2])
        return types.SimpleNamespace(depth=given["says"])

    monkeypatch.setattr(alignment, "open_teacher", lambda *a, **k: ToyTeacher())
    monkeypatch.setattr(alignment, "load_model", lambda name: student)
    return given


def flags(records):
    return ["--records", records, "--image_size", "32x64", "--longer_side", "56"]


def test_the_table_has_a_row_for_each_way_and_a_column_for_what_was_fitted_to(records, toys, capsys, tmp_path):
    out = tmp_path / "found.json"
    alignment.main([*flags(records), "--student", "mine", "--truth", "dense", "--labels", "1", "--out", str(out)])
    text = capsys.readouterr().out
    assert "## tiny, 2 records, abs_rel on dense depth" in text
    assert "to the labels, 6 of 6 views | to the student, 6 of 6 views" in text
    assert toys["shapes"] == ((3, 32, 64, 3), (3, 3, 3), (3, 4, 4))
    found = json.loads(out.read_text())["fitted_to"]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(("| s", "| the"))]
    assert {row[0]: float(row[2]) for row in rows} == {
        way: pytest.approx(value, abs=1e-4) for way, value in found["student"]["abs_rel"].items()
    }
    truth = [rooms.plane(rooms.make(seed, cameras=3, native_size=(48, 96)), i) for seed in range(2) for i in range(3)]
    nearest = [d[1::3].repeat(2, 0)[:32, [round(1.5 * u + 0.25) for u in range(64)]] for d in truth]
    own = np.mean([np.abs(toys["says"][0] / d - 1).mean() for d in nearest])
    assert found["student"]["abs_rel"]["the student itself"] == pytest.approx(own, rel=0.05)
    assert len(rows) == len(found["labels"]["abs_rel"]) == 5


def test_labels_that_were_fitted_to_are_not_measured_on(records, toys, monkeypatch, capsys):
    monkeypatch.setattr(
        alignment, "trained_with", lambda *a: lambda r, depth, mask: (np.ones(r.shape), np.ones((1, 3), bool))
    )
    seen = []
    add = alignment.Column.add

    def spy(self, fitted, own, truth, counts):
        seen.append((truth > 0).sum() - counts.sum())
        add(self, fitted, own, truth, counts)

    monkeypatch.setattr(alignment.Column, "add", spy)
    for share in ("0.2", "0.8"):
        alignment.main([*flags(records), "--labels", share, "--limit", "1"])
    few, many = seen
    assert 0 < 3 * few < many
    text = capsys.readouterr().out
    assert "student" not in text and text.count("## tiny, 1 records") == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--labels", "1"], "--labels 1.0: expected a share above 0 and below 1, since it is measured on the others"),
        (["--labels", "2", "--truth", "dense"], "--labels 2.0: expected a share above 0 and at most 1"),
        (["--labels", "nan"], "--labels nan: expected"),
        (["--image_size", "32"], "--image_size 32"),
        (["--labels", "1e-9"], "no view could be fitted to the labels: that takes 10 values"),
    ],
)
def test_what_cannot_be_measured_is_said(records, toys, more, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        alignment.main([*flags(records), *more])
    assert stopped.value.code and said in str(stopped.value.code) + capsys.readouterr().err
