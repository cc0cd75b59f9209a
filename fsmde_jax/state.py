"""The training state and the compiled functions on it: initialise, one step, predict."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from fsmde_jax import sharding
from fsmde_jax.models.student import normalise_images

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# (outputs, batch, trained parameters, frozen teacher parameters or None) -> (loss, terms)
LossFn = Callable[[Any, Batch, Any, Any], tuple[jax.Array, Metrics]]
ReadFn = Callable[[Any], Any]  # outputs -> what is evaluated: [B, N, H, W], or arrays by name


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and writes. `params` and `batch_stats` are plain nested dicts."""

    step: jax.Array  # [] int32, number of updates done
    params: Any
    batch_stats: Any
    opt_state: Any


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    num_cameras: int,
    image_size: tuple[int, int],
    mesh: Mesh,
    companions: Callable[[jax.Array, Any], dict[str, Any]] | None = None,
) -> TrainState:
    """A fresh state, born on the mesh (every device holds it whole).

    `companions`, (key, shapes of the model's outputs) -> parameters by scope, are trained beside the model's own.
    """
    height, width = image_size

    def build(key: jax.Array) -> TrainState:
        images = jnp.zeros((1, num_cameras, height, width, 3), jnp.float32)
        intrinsics = jnp.tile(jnp.eye(3), (1, num_cameras, 1, 1))
        cam_to_ego = jnp.tile(jnp.eye(4), (1, num_cameras, 1, 1))
        variables = model.init(key, images, intrinsics, cam_to_ego, train=False)
        params = variables["params"]
        if companions is not None:
            outputs = jax.eval_shape(lambda v: model.apply(v, images, intrinsics, cam_to_ego, train=False), variables)
            params = {**params, **companions(jax.random.fold_in(key, 1), outputs)}
        return TrainState(jnp.zeros((), jnp.int32), params, variables.get("batch_stats", {}), optimizer.init(params))

    return jax.jit(build, out_shardings=sharding.replicated(mesh))(jax.random.key(seed, impl="rbg"))


def _apply(model: nn.Module, params: Any, batch_stats: Any, batch: Batch, train: bool) -> Any:
    images = normalise_images(batch["images"])
    arguments = (images, batch["intrinsics"], batch["cam_to_ego"])
    mutable = ["batch_stats"] if train else False
    variables = {"params": params, "batch_stats": batch_stats}
    return model.apply(variables, *arguments, view_mask=batch["view_mask"], train=train, mutable=mutable)


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, loss_fn: LossFn
) -> Callable[[TrainState, Batch, Any, Any], tuple[TrainState, Metrics]]:
    """(state, batch, learning rate, frozen teacher parameters or None) -> (state, metrics); the old state's memory is
    reused. The updates of `optimizer` are multiplied by the rate.

    Metrics are scalars: the terms of the loss, `loss`, `grad_norm`, `param_norm` (after the update), `lr`.
    """

    def train_step(state: TrainState, batch: Batch, rate: Any, teacher: Any = None) -> tuple[TrainState, Metrics]:
        def compute(params: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
            outputs, mutated = _apply(model, params, state.batch_stats, batch, train=True)
            loss, terms = loss_fn(outputs, batch, params, teacher)
            return loss, (terms, mutated.get("batch_stats", {}))

        (loss, (terms, batch_stats)), gradients = jax.value_and_grad(compute, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, optax.tree.scale(rate, updates))
        norms = {"grad_norm": optax.tree.norm(gradients), "param_norm": optax.tree.norm(params)}
        metrics = {**terms, "loss": loss, **norms, "lr": jnp.asarray(rate, jnp.float32)}
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    return jax.jit(train_step, donate_argnames="state")


def make_predict(model: nn.Module, read: ReadFn) -> Callable[[Any, Any, Batch], Any]:
    """(params, batch_stats, batch) -> what `read` takes from the outputs: [B, N, H, W] float32, or arrays by name."""

    @jax.jit
    def predict(params: Any, batch_stats: Any, batch: Batch) -> Any:
        return read(_apply(model, params, batch_stats, batch, train=False))

    return predict
