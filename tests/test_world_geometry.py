"""The whole world through a rig: dense depth of adjacent cameras agrees, labels lie on the surfaces, streams repeat."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from data_prep.world import batches, rigs
from fsmde_jax import geometry, sharding
from fsmde_jax.errors import ConfigError
from fsmde_jax.losses import total
from fsmde_jax.models import registry
from fsmde_jax.state import init_state, make_train_step

SIZE = (128, 224)


@pytest.fixture(scope="module")
def rig():
    """The nuScenes rig; its cameras expose at the LiDAR's moment, so that what moves stands still."""
    rig = rigs.scaled(rigs.read_rig("nuscenes"), size=SIZE)
    cameras = {name: dataclasses.replace(camera, delay=0.0) for name, camera in rig.cameras.items()}
    return dataclasses.replace(rig, cameras=cameras)


@pytest.fixture(scope="module")
def samples(rig):
    """Three scenes, each a batch of one; rendered two by two, as every stream here, so that all are compiled once."""
    stream = batches.batches(rig, batch_size=2, seed=3, split="test")
    pairs = [jax.device_get(next(stream)) for _ in range(2)]
    return [{name: value[i : i + 1] for name, value in pair.items()} for pair in pairs for i in range(2)][:3]


def interpolated(depth: np.ndarray, uv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth at sub-pixel places (inverse depth is linear on a plane), and where the four pixels see one surface."""
    left, top = np.floor(uv[:, 0]).astype(int), np.floor(uv[:, 1]).astype(int)
    a, b = uv[:, 0] - left, uv[:, 1] - top
    four = np.stack([depth[top + i, left + j] for i in (0, 1) for j in (0, 1)])
    weights = np.stack([(1 - b) * (1 - a), (1 - b) * a, b * (1 - a), b * a])
    seen = np.all(four > 0, 0)
    inverse = np.sum(weights / np.where(four > 0, four, 1.0), 0)
    whole = seen & (four.max(0) < 1.06 * np.where(seen, four, 1.0).min(0))
    return 1 / inverse, whole


def test_dense_depth_of_adjacent_cameras_agrees(samples):
    agree, hidden, total = 0, 0, 0
    for batch in samples:
        depth, k = batch["dense_depth"][0].astype(np.float64), batch["intrinsics"][0].astype(np.float64)
        cam_to_ego = batch["cam_to_ego"][0].astype(np.float64)
        pose = batch["ego_to_global"][0].astype(np.float64) @ cam_to_ego
        adjacent = np.asarray(geometry.adjacency(cam_to_ego, k, np.full(6, SIZE[1])))
        assert adjacent.sum() == 12
        v, u = np.mgrid[: SIZE[0], : SIZE[1]]
        for i, j in np.argwhere(adjacent):
            seen = depth[i] > 0
            points = geometry.unproject(k[i], np.stack([u[seen], v[seen]], -1).astype(float), depth[i][seen])
            local = geometry.transform_points(geometry.invert_rigid(pose[j]) @ pose[i], points)
            uv, z = geometry.project(k[j], local)
            inside = (z > 0.5) & np.all((uv >= 0) & (uv < np.array(SIZE[::-1]) - 1), -1)
            there, whole = interpolated(depth[j], uv[inside])
            ratio = z[inside][whole] / there[whole]
            visible = ratio < 1.05  # farther than what camera j sees there: hidden from it
            agree += int((np.abs(ratio[visible] - 1) < 0.01).sum())
            total += int(visible.sum())
            hidden += int((~visible).sum())
    assert total > 20_000
    assert hidden < 0.5 * total
    assert agree / total >= 0.99, f"{agree / total:.4f} of {total} pixels"


def label_counts(samples) -> tuple[int, int, int]:
    """Labels away from edges that lie on the dense surface, behind it, and all of them."""
    fit, behind, total = 0, 0, 0
    for batch in samples:
        seen = np.broadcast_to(batch["ego_mask"][0], batch["depth"][0].shape)
        for label, truth, mask in zip(batch["depth"][0], batch["dense_depth"][0], seen, strict=True):
            padded = np.pad(np.where(truth > 0, truth, 1e3), 2, mode="edge")
            near = np.lib.stride_tricks.sliding_window_view(padded, (5, 5)).reshape(*truth.shape, 25)
            inner = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))[1:-1, 1:-1].reshape(*truth.shape, 9)
            flat = (label > 0) & mask & (near.max(-1) < 1.15 * near.min(-1))
            # The label lies anywhere in its pixel, so it is compared with the range of its neighbours.
            far = label >= 1.02 * inner.max(-1)
            fit += int((flat & ~far & (label > 0.98 * inner.min(-1))).sum())
            behind, total = behind + int((flat & far).sum()), total + int(flat.sum())
    return fit, behind, total


def test_labels_lie_on_the_dense_surfaces_away_from_edges(samples):
    fit, _, total = label_counts(samples)
    assert total > 15_000
    assert fit / total >= 0.98, f"{fit / total:.4f} of {total} points"


@pytest.mark.slow
def test_labels_of_the_ddad_rig_lie_on_the_surfaces_that_its_cameras_see():
    """This LiDAR looks over cars from half a metre above the cameras, so a part of its points is hidden from them."""
    rig = rigs.scaled(rigs.read_rig("ddad"), size=(152, 242))
    cameras = {name: dataclasses.replace(camera, delay=0.0) for name, camera in rig.cameras.items()}
    stream = batches.batches(dataclasses.replace(rig, cameras=cameras), batch_size=1, seed=3, split="test")
    fit, behind, total = label_counts([jax.device_get(next(stream)) for _ in range(3)])
    assert total > 30_000
    assert behind < 0.15 * total, f"{behind} of {total} points are hidden"
    assert fit / (total - behind) >= 0.99, f"{fit / (total - behind):.4f} of {total - behind} points"


def test_labels_are_as_sparse_as_real_ones_and_images_are_pictures(samples):
    for batch in samples:
        counts = (batch["depth"][0] > 0).sum((1, 2))
        assert np.all((counts > 1200) & (counts < 6500)), counts
        assert np.all(batch["images"][0].std((1, 2, 3)) > 8)
        assert batch["images"].dtype == np.uint8
        assert np.all(batch["dense_depth"] >= 0)
        assert 0.01 < (batch["dense_depth"] == 0).mean() < 0.6, "some sky"
    assert not np.array_equal(samples[0]["images"], samples[1]["images"])


@pytest.fixture(scope="module")
def second(rig):
    """The second batch of a stream."""
    stream = batches.batches(rig, batch_size=2, seed=3, frames_per_scene=2)
    next(stream)
    return jax.device_get(next(stream))


@pytest.mark.slow
def test_a_stream_can_go_on_anywhere(rig, second):
    again = jax.device_get(next(batches.batches(rig, batch_size=2, seed=3, frames_per_scene=2, start=2)))
    for name, value in second.items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)
    np.testing.assert_array_equal(again["record_index"], [2, 3])
    for name in ("cam_to_ego", "intrinsics"):  # of one scene and rig; the pictures differ, since the car has moved
        np.testing.assert_array_equal(again[name][0], again[name][1])
    assert not np.array_equal(again["images"][0], again["images"][1])


@pytest.mark.slow
def test_the_train_step_takes_rendered_batches(second):
    batch = {name: value for name, value in second.items() if name != "record_index"}
    student = registry.build_student(encoder="efficientnet_lite0", decoder_channels=(8, 8, 8, 8, 8), num_bins=8)
    optimizer = optax.sgd(1.0)
    state = init_state(student, optimizer, 0, 6, SIZE, sharding.make_mesh())
    options = {"min_depth": 0.1, "max_depth": 80.0, "silog_lambda": 0.85, "chamfer_weight": 0.1}

    def loss(outputs, batch, params, teacher):
        return total.supervised_loss(outputs, batch, **options)

    _, metrics = make_train_step(student, optimizer, loss)(state, batch, 1e-3)
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0
    labels = (batch["depth"] > 0.1) & (batch["depth"] < 80.0) & batch["ego_mask"]
    assert metrics["valid_pixels"] == labels.sum() > 10_000


@pytest.mark.slow
def test_scenes_rendered_together_as_on_accelerators_equal_those_rendered_one_by_one(monkeypatch):
    rig = rigs.scaled(rigs.read_rig("nuscenes"), size=(32, 64))
    small = dataclasses.replace(rig, lidar=dataclasses.replace(rig.lidar, columns=90))
    second = jax.device_get(next(batches.batches(small, batch_size=2, seed=3, frames_per_scene=2, start=2)))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # takes the vmapped path, compiled for this CPU
    together = jax.device_get(next(batches.batches(small, batch_size=2, seed=3, frames_per_scene=2, start=2)))
    for name in ("depth", "dense_depth"):
        same = np.isclose(together[name], second[name], rtol=1e-4, atol=1e-3)
        assert same.mean() > 0.995, name  # rays through an edge may fall on either side
    assert np.mean(np.abs(together["images"].astype(int) - second["images"]) > 4) < 0.005


def test_wrong_streams_are_refused():
    rig = rigs.scaled(rigs.read_rig("nuscenes"), size=(32, 64))
    with pytest.raises(ConfigError, match="batch_size = 0"):
        next(batches.batches(rig, batch_size=0, seed=0))
    first, *others = rig.cameras
    odd = dataclasses.replace(rig.cameras[first], size=(16, 32))
    mixed = dataclasses.replace(rig, cameras={first: odd} | {name: rig.cameras[name] for name in others})
    with pytest.raises(ConfigError, match="one size"):
        batches.sample_function(mixed)
