"""Depth statistics: known pictures and records; the rendered world beside the real keyframe."""

import dataclasses

import numpy as np
import pytest

from data_prep import nuscenes
from data_prep.world import __main__ as world
from data_prep.world import statistics
from fsmde_jax.data import dense
from fsmde_jax.data.records import open_records
from tests.sample_factory import make_rig, write_folder


def test_sky_is_what_is_bright_smooth_and_reaches_the_top():
    picture = np.full((90, 160, 3), 60, np.uint8)
    picture[:36] = (170, 190, 220)  # sky
    assert statistics.sky_share(picture) == pytest.approx(0.4, abs=0.03)
    picture[:36, 80:] = 20  # a dark building in front of half of it
    assert statistics.sky_share(picture) == pytest.approx(0.2, abs=0.03)
    picture[:36] = (170, 190, 220)
    picture[:6] = 10  # under a bridge: bright, but not connected to the top
    assert statistics.sky_share(picture) < 0.02


def test_statistics_are_those_of_the_records(tmp_path):
    samples = []
    for seed in range(3):
        sample = make_rig(seed).sample
        height, width = sample.image_size[0]
        depth = np.full((height, width), 7.0, np.float32)
        depth[: height // 4] = 0  # a quarter of the image is sky
        blobs = [dense.encode(depth) for _ in range(6)]
        points = [p.copy() for p in sample.points]
        points[1][:, 2] = np.linspace(4.0, 50.0, len(points[1]))
        samples.append(dataclasses.replace(sample, dense_depth=blobs, points=points))
    records = open_records(write_folder(tmp_path / "records", samples, dense_depth=True))
    found = statistics.camera_statistics(records, progress=False)
    assert list(found) == samples[0].camera_names
    first, second = list(found.values())[:2]
    assert first.points == np.median([len(s.points[0]) for s in samples])
    assert second.quantiles == pytest.approx((8.6, 27.0, 45.4), abs=0.1)
    shares = np.array([1, 5, 10, 20, 10, 0]) / 46
    np.testing.assert_allclose(second.histogram, shares, atol=0.01)
    assert first.sky_exact == pytest.approx(0.25, abs=0.02)
    text = statistics.table(found, found)
    assert text.count("(1.00x)") == 12
    assert samples[0].camera_names[1] in text


def test_folders_without_a_common_camera_are_refused(tmp_path, capsys):
    sample = make_rig(0).sample
    others = dataclasses.replace(sample, camera_names=[f"other_{i}" for i in range(len(sample.camera_names))])
    ours, theirs = (write_folder(tmp_path / n, [s]) for n, s in (("a", sample), ("b", others)))
    with pytest.raises(SystemExit) as stop:
        statistics.main([str(ours), str(theirs)])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "no camera in common" in error
    assert sample.camera_names[0] in error and "other_0" in error


@pytest.mark.slow
def test_the_worlds_medians_are_within_a_factor_of_two_of_the_real_keyframe(real_data, tmp_path):
    flags = ["--scenes", "24", "--val_scenes", "0", "--frames", "1", "--image_size", "96x160", "--workers", "2"]
    world.main([*flags, "--out", str(tmp_path / "world")])
    common = ["--image_size", "96x160", "--workers", "1"]
    rendered = ["--dataroot", str(tmp_path / "world"), "--version", "v1.0-trainval", "--split", "train"]
    nuscenes.main([*rendered, *common, "--out", str(tmp_path / "rendered")])
    real = ["--dataroot", str(real_data / "nuscenes_keyframe"), "--version", "v1.0-mini", "--split", "mini_train"]
    nuscenes.main([*real, *common, "--out", str(tmp_path / "real")])
    ours, theirs = (
        statistics.camera_statistics(open_records(tmp_path / name), progress=False) for name in ("rendered", "real")
    )
    assert list(ours) == list(theirs)
    for name, one in ours.items():
        other = theirs[name]
        assert 0.5 < one.points / other.points < 2.0, name
        assert 0.5 < one.quantiles[1] / other.quantiles[1] < 2.0, name
        assert one.sky_exact is not None
        assert abs(one.sky_estimate - one.sky_exact) < 0.15, "the estimate can be trusted that far"
        assert abs(one.sky_estimate - other.sky_estimate) < 0.2, name
