"""The optimiser: AdamW with warm-up and cosine decay, a rate of its own for the encoder, clipping.

The learning rate is an argument of the compiled step and no constant in it: runs that differ in their rates or their
length are one program, which JAX's compilation cache then keeps once.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

_ENCODERS = ("backbone", "pretrained")  # the encoder's name in the parameters of a student and of a teacher


def learning_rate_schedule(*, lr: float, warmup_steps: int, steps: int, final_lr_scale: float) -> optax.Schedule:
    """Linear warm-up from 0 to `lr`, then cosine to `lr * final_lr_scale` at `steps`.

    The warm-up is shortened to a tenth of a run that is shorter than ten of it, so that a short run reaches its peak.
    """
    warmup = min(warmup_steps, max(steps // 10, 1))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0, peak_value=lr, warmup_steps=warmup, decay_steps=max(steps, warmup + 1),
        end_value=lr * final_lr_scale,
    )  # fmt: skip


def learning_rates(schedule: optax.Schedule, steps: int) -> np.ndarray:
    """The rate of each update of a run, [steps] float32: element i is that of the update after i others."""
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)), np.float32)


def make_optimizer(*, weight_decay: float, clip_norm: float, encoder_lr_scale: float) -> optax.GradientTransformation:
    """AdamW on a parameter tree whose top-level key `backbone` (teachers: `pretrained`) holds the encoder.

    Its updates are those of a learning rate of 1, weight decay included, and proportional to the rate, by which the
    train step multiplies them. Its state is of the same kind whatever the arguments, so a resumed run may change them.

    Args:
      weight_decay: decoupled; not on vectors (biases, normalisation).
      clip_norm: largest global gradient norm; 0 = no clipping.
      encoder_lr_scale: factor on the encoder's learning rate.
    """

    def decay_mask(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    # As a schedule, so that its state has the counter that older checkpoints hold.
    adamw = optax.adamw(lambda step: 1.0, weight_decay=weight_decay, mask=decay_mask)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adamw.update(gradients, state, params)
        return {
            key: optax.tree.scale(encoder_lr_scale, entry) if key in _ENCODERS else entry
            for key, entry in updates.items()
        }, state

    clip = optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity()
    return optax.chain(clip, optax.GradientTransformation(adamw.init, update))
