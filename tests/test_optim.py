"""The optimiser against NumPy, and its options one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fsmde_jax import optim


def test_schedule_warms_up_and_ends_where_it_says():
    schedule = optim.learning_rate_schedule(lr=1e-3, warmup_steps=10, steps=110, final_lr_scale=0.1)
    assert float(schedule(0)) == 0.0
    np.testing.assert_allclose(schedule(5), 5e-4, rtol=1e-6)
    np.testing.assert_allclose(schedule(10), 1e-3, rtol=1e-6)
    np.testing.assert_allclose(schedule(60), 1e-3 * (0.1 + 0.9 * 0.5), rtol=1e-5)  # half of the cosine
    np.testing.assert_allclose(schedule(110), 1e-4, rtol=1e-5)


def test_short_run_still_reaches_its_peak():
    schedule = optim.learning_rate_schedule(lr=1.0, warmup_steps=500, steps=100, final_lr_scale=0.0)
    np.testing.assert_allclose(schedule(10), 1.0, rtol=1e-6)


def _one_update(params, gradients, **options):
    defaults = {"weight_decay": 0.0, "clip_norm": 0.0, "encoder_lr_scale": 1.0}
    optimizer = optim.make_optimizer(**{**defaults, **options})
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    return jax.tree.map(lambda update: 0.1 * update, updates)


TEACHER = {"pretrained": {"w": jnp.full((2, 2), 2.0)}, "depth_head": {"w": jnp.full((2, 2), 2.0)}}
PARAMS = {"backbone": {"w": jnp.full((2, 2), 2.0), "b": jnp.full((2,), 2.0)}, "head": {"w": jnp.full((2, 2), 2.0)}}
GRADIENTS = jax.tree.map(lambda p: jnp.full_like(p, 3.0), PARAMS)


def test_first_adam_update_is_the_rate_and_encoder_has_its_own():
    updates = _one_update(PARAMS, GRADIENTS, encoder_lr_scale=0.25)
    np.testing.assert_allclose(updates["head"]["w"], -0.1, rtol=1e-5)  # Adam: m / sqrt(v) = 1 at the first step
    np.testing.assert_allclose(updates["backbone"]["w"], -0.025, rtol=1e-5)
    updates = _one_update(TEACHER, jax.tree.map(jnp.ones_like, TEACHER), encoder_lr_scale=0.25)
    np.testing.assert_allclose(updates["depth_head"]["w"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["pretrained"]["w"], -0.025, rtol=1e-5)


def test_weight_decay_spares_vectors():
    updates = _one_update(PARAMS, jax.tree.map(jnp.zeros_like, PARAMS), weight_decay=0.5)
    np.testing.assert_allclose(updates["head"]["w"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_allclose(updates["backbone"]["b"], 0.0)


def test_clipping_bounds_the_global_norm():
    optimizer = optim.make_optimizer(weight_decay=0.0, clip_norm=1.0, encoder_lr_scale=1.0)
    state = optimizer.init(PARAMS)
    _, state = optimizer.update(GRADIENTS, state, PARAMS)
    moments = jax.tree.leaves(state[1][0].mu)  # 0.1 * clipped gradient
    clipped = np.concatenate([np.ravel(m) for m in moments]) / 0.1
    np.testing.assert_allclose(np.linalg.norm(clipped), 1.0, rtol=1e-5)


def test_updates_times_the_rates_are_adamw_under_that_schedule():
    schedule = optim.learning_rate_schedule(lr=0.3, warmup_steps=2, steps=8, final_lr_scale=0.1)
    rates = optim.learning_rates(schedule, 8)
    assert rates.dtype == np.float32 and rates.shape == (8,)
    ours = optim.make_optimizer(weight_decay=0.1, clip_norm=0.0, encoder_lr_scale=1.0)
    adamw = optax.adamw(schedule, weight_decay=0.1, mask=jax.tree.map(lambda p: p.ndim > 1, PARAMS))
    reference = optax.chain(optax.identity(), adamw)
    mine, theirs = PARAMS, PARAMS
    my_state, their_state = ours.init(mine), reference.init(theirs)
    assert jax.tree.structure(my_state) == jax.tree.structure(their_state)  # checkpoints of either can be read
    for step in range(8):
        gradients = jax.tree.map(lambda p, step=step: p * 0.5 + step, PARAMS)
        updates, my_state = ours.update(gradients, my_state, mine)
        mine = optax.apply_updates(mine, optax.tree.scale(rates[step], updates))
        updates, their_state = reference.update(gradients, their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), mine, theirs)


def test_the_state_is_of_one_kind_whatever_the_options():
    """A resumed run may clip or scale otherwise than before."""
    plain = {"weight_decay": 0.1, "clip_norm": 1.0, "encoder_lr_scale": 1.0}
    wanted = jax.tree.structure(optim.make_optimizer(**plain).init(PARAMS))
    for change in ({"clip_norm": 0.0}, {"encoder_lr_scale": 0.1}, {"weight_decay": 0.0}):
        assert jax.tree.structure(optim.make_optimizer(**{**plain, **change}).init(PARAMS)) == wanted


def test_an_encoders_own_rate_is_optax_with_that_rate():
    """Over steps with weight decay, against a transformation of its own for each part."""
    ours = optim.make_optimizer(weight_decay=0.1, clip_norm=1.0, encoder_lr_scale=0.25)
    parts = {name: optax.adamw(rate, weight_decay=0.1, mask=lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree))
             for name, rate in (("encoder", 0.025), ("rest", 0.1))}  # fmt: skip
    labels = {"backbone": {"w": "encoder", "b": "encoder"}, "head": {"w": "rest"}}
    reference = optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(parts, labels))
    mine, theirs, state, other = PARAMS, PARAMS, ours.init(PARAMS), reference.init(PARAMS)
    for step in range(4):
        gradients = jax.tree.map(lambda p, step=step: p * 0.5 - step, PARAMS)
        updates, state = ours.update(gradients, state, mine)
        mine = optax.apply_updates(mine, optax.tree.scale(0.1, updates))
        updates, other = reference.update(gradients, other, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), mine, theirs)
