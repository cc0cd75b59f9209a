"""The benchmark of a teacher's alignment: its ways of fitting are right, and its table says so."""

import re
import types

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import alignment
from fsmde_jax import interpolate
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
    fine = np.asarray(interpolate.resize(jnp.asarray(inverse)[..., None], 16, 24, "bilinear"))[..., 0]
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


def test_the_table_has_a_row_for_each_way_and_a_column_for_what_was_fitted_to(records, monkeypatch, capsys):
    monkeypatch.setattr(alignment, "open_teacher", lambda *a, **k: ToyTeacher())
    found = {}

    def student(images, intrinsics, cam_to_ego):
        found["shapes"] = images.shape, intrinsics.shape, cam_to_ego.shape
        return types.SimpleNamespace(depth=np.full(images.shape[:3], 3.0) + np.linspace(0, 1, images.shape[2]))

    monkeypatch.setattr(alignment, "load_model", lambda name: student)
    flags = ["--records", records, "--image_size", "32x64", "--longer_side", "56"]
    alignment.main([*flags, "--student", "mine"])
    text = capsys.readouterr().out
    assert "## tiny, 2 records, abs_rel on lidar depth" in text and "The student itself: 0." in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| s")]
    assert len(rows) == 4 and all(len(row) == 3 and 0 < float(row[1]) < 10 for row in rows)
    assert re.search(r"to the student, [1-6] views", text) and found["shapes"] == ((3, 32, 64, 3), (3, 3, 3), (3, 4, 4))
    alignment.main([*flags, "--truth", "dense"])
    text = capsys.readouterr().out
    assert "abs_rel on dense depth" in text and "student" not in text
    for more, said in (
        (["--labels", "1"], "--labels 1.0: expected a share between 0 and 1"),
        (["--labels", "1e-9"], "no view has 10 labels to fit; use a larger --labels"),
    ):
        with pytest.raises(SystemExit) as stopped:
            alignment.main([*flags, *more])
        assert stopped.value.code and said in str(stopped.value.code) + capsys.readouterr().err
