"""One compiled step by itself: parts of a batch, steps that are left out, averages; on networks of a few parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from fsmde_jax import sharding
from fsmde_jax.state import TrainState, init_state, is_finite, make_train_step


class Net(nn.Module):
    """Two layers per pixel, with or without BatchNorm."""

    norm: bool = False

    @nn.compact
    def __call__(self, images, intrinsics, cam_to_ego, *, view_mask=None, train=False):
        x = nn.Dense(5)(images.reshape(-1, *images.shape[2:]))
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dense(2)(nn.tanh(x)) * intrinsics[..., 0, 0].reshape(-1, 1, 1, 1)
        return {"features": x.reshape(*images.shape[:2], *x.shape[1:])}


def loss_fn(outputs, batch, params, teacher):
    """Couples the rigs of a batch, as SP and RKD do."""
    each = outputs["features"].mean((1, 2, 3))
    gram = each @ each.T
    return jnp.square(gram - batch["wanted"] @ batch["wanted"].T).mean(), {"first": each[0, 0]}


def make_batch(seed, rigs=6):
    rng = np.random.default_rng(seed)
    return {
        "images": rng.integers(0, 256, (rigs, 2, 4, 4, 3)).astype(np.uint8),
        "intrinsics": (np.eye(3) * rng.uniform(0.5, 2, (rigs, 2, 1, 1))).astype(np.float32),
        "cam_to_ego": np.tile(np.eye(4, dtype=np.float32), (rigs, 2, 1, 1)),
        "view_mask": np.ones((rigs, 2), bool),
        "wanted": rng.normal(size=(rigs, 2)).astype(np.float32),
    }  # fmt: skip


def fresh(norm, average=False):
    model, optimizer = Net(norm), optax.sgd(1.0)
    return model, optimizer, init_state(model, optimizer, 0, 2, (4, 4), sharding.make_mesh(), average=average)


@pytest.mark.parametrize("parts", [2, 3])
def test_a_batch_in_parts_has_the_gradient_of_the_whole_batch_even_where_the_loss_couples_its_rigs(parts):
    after = []
    for number in (1, parts):
        model, optimizer, state = fresh(norm=False)
        state, metrics = make_train_step(model, optimizer, loss_fn, parts=number)(state, make_batch(0), 1.0)
        after.append((state.params, metrics))
    (whole, known), (split, found) = after
    assert float(known["grad_norm"]) > 1e-2
    for name in known:
        np.testing.assert_allclose(found[name], known[name], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), split, whole)


def test_in_parts_batch_norm_normalises_by_each_part_and_keeps_their_mean():
    """Against the network run on each part by itself, gradients by finite differences of the same."""
    model, optimizer, state = fresh(norm=True)
    batch, params, stats = make_batch(1), state.params, state.batch_stats

    def apart(params):
        outputs, seen = [], []
        for part in range(2):
            b = {k: v[part::2] for k, v in batch.items()}
            images = (b["images"] / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
            out, new = model.apply(
                {"params": params, "batch_stats": stats}, jnp.asarray(images, jnp.float32), b["intrinsics"],
                b["cam_to_ego"], view_mask=b["view_mask"], train=True, mutable=["batch_stats"],
            )  # fmt: skip
            outputs.append(out["features"])
            seen.append(new["batch_stats"])
        whole = jnp.zeros((6, *outputs[0].shape[1:])).at[0::2].set(outputs[0]).at[1::2].set(outputs[1])
        return loss_fn({"features": whole}, batch, params, None)[0], seen

    (loss, seen), gradient = jax.value_and_grad(apart, has_aux=True)(params)
    before = jax.tree.map(np.asarray, params)
    state, metrics = make_train_step(model, optimizer, loss_fn, parts=2)(state, batch, 1.0)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old - g, rtol=1e-4, atol=1e-5),
        state.params, before, gradient,
    )  # fmt: skip
    jax.tree.map(
        lambda new, a, b: np.testing.assert_allclose(new, (a + b) / 2, rtol=1e-5, atol=1e-6), state.batch_stats, *seen
    )


@pytest.mark.parametrize("what", ["loss", "gradient", "update"])
def test_a_step_that_is_not_finite_leaves_everything_but_the_count(what):
    model, optimizer, state = fresh(norm=True, average=True)
    broken = {
        "loss": lambda o, b, *_: (o["features"].mean() * jnp.where(b["wanted"].sum() > 1e3, jnp.nan, 1.0), {}),
        # sqrt at 0 has an infinite slope, while its value is fine
        "gradient": lambda o, b, *_: (
            jnp.sqrt(jnp.square(o["features"]).sum() * jnp.where(b["wanted"].sum() > 1e3, 0.0, 1.0)), {}
        ),
        "update": loss_fn,
    }  # fmt: skip
    step = make_train_step(model, optimizer, broken[what], average_decay=0.9)
    state, metrics = step(state, make_batch(0), 1e-3)
    assert metrics["skipped"] == 0 and state.step == 1
    before = jax.tree.map(np.array, state)
    bad = make_batch(1)
    if what != "update":
        bad["wanted"] = bad["wanted"] + np.float32(1e4)
    state, metrics = step(state, bad, 1e38 if what == "update" else 1e-3)
    assert metrics["skipped"] == 1 and state.step == 2
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(state, step=before.step), before)
    state, metrics = step(state, make_batch(2), 1e-3)
    assert metrics["skipped"] == 0 and np.isfinite(metrics["loss"])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params, before.params)
    assert max(jax.tree.leaves(moved)) > 0


def test_a_state_is_finite_where_all_numbers_are_there_and_finite():
    state = TrainState(jnp.int32(3), {"w": jnp.ones(3)}, {}, {"count": jnp.int32(1), "mu": jnp.zeros((2, 2))})
    assert is_finite(state)
    assert not is_finite(state.replace(opt_state={"mu": jnp.array([1.0, jnp.inf])}))
    assert not is_finite(state.replace(average={"params": {"w": jnp.array([jnp.nan])}}))
    taken = jnp.ones(3)
    taken.delete()
    assert not is_finite(state.replace(params={"w": taken}))
