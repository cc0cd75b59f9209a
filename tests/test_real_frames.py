"""The proof on real frames, small (two steps: the path) and full (the figures of issue and README)."""

import json

import pytest

from benchmarks import real_frames

TINY = [
    "--config.data.image_size=(64,96)",
    "--config.model.decoder_channels=(8,8,16,16,16)",
    "--config.model.num_bins=16",
]
TOY = {"fsmde_jax.main": "tests.toy_run"}


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_script_runs_on_real_frames(real_data, tmp_path, monkeypatch):
    """Converts, trains two steps, evaluates and draws, with an encoder that compiles at once."""
    run = real_frames.run
    monkeypatch.setattr(real_frames, "run", lambda *words: run(*[TOY.get(word, word) for word in words]))
    real_frames.main(["--out", str(tmp_path / "out"), *TINY, "--config.train.steps=2"])
    results = results_of(tmp_path / "out")
    assert all(results[name]["metric"]["abs_rel"] > 0 for name in ("keyframe", "clip"))
    medians = [m["abs_rel"] for m in results["clip"]["row_median"].values()]
    assert 0.25 < min(medians) < max(medians) < 0.33  # a property of the data
    assert len(list((tmp_path / "out").glob("run_*/evaluation/*.png"))) >= 2


@pytest.mark.slow
def test_the_path_on_real_frames(real_data, tmp_path):
    """A minute of training at 64x96 already beats the row median of the neighbouring frames on the clip."""
    real_frames.main(["--out", str(tmp_path / "out"), *TINY, "--config.train.steps=80"])
    results = results_of(tmp_path / "out")
    assert results["keyframe"]["metric"]["abs_rel"] < 0.25
    medians = [m["abs_rel"] for m in results["clip"]["row_median"].values()]
    assert results["clip"]["metric"]["abs_rel"] < min(medians)


@pytest.mark.slow
def test_the_figures_on_real_frames(real_data, tmp_path):
    real_frames.main(["--out", str(tmp_path / "out")])
    results = results_of(tmp_path / "out")
    assert results["keyframe"]["metric"]["abs_rel"] < 0.08
    assert results["clip"]["metric"]["abs_rel"] < 0.75 * min(
        m["abs_rel"] for m in results["clip"]["row_median"].values()
    )


def test_without_data_it_says_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("FSMDE_REAL_DATA", str(tmp_path))
    with pytest.raises(SystemExit):
        real_frames.main([])
    assert "nuscenes_keyframe/ and ddad_val_clip/" in capsys.readouterr().err
