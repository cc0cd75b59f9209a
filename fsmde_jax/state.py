"""The training state and the compiled functions on it: initialise, one step, predict."""

import dataclasses
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

    step: jax.Array  # [] int32, number of steps done
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any = None  # {"params", "batch_stats"}: their exponential moving average; None = not kept

    @property
    def model(self) -> dict[str, Any]:
        """{"params", "batch_stats"}: what is evaluated, kept as the best and exported."""
        return self.average or {"params": self.params, "batch_stats": self.batch_stats}


def is_finite(state: TrainState) -> bool:
    """Whether all numbers of a state are there and finite."""
    leaves = jax.tree.leaves(state)
    if any(leaf.is_deleted() for leaf in leaves):  # a step that failed has taken its memory
        return False
    numbers = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return bool(jax.jit(lambda each: jnp.stack([jnp.isfinite(x).all() for x in each]).all())(numbers))


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    num_cameras: int,
    image_size: tuple[int, int],
    mesh: Mesh,
    companions: Callable[[jax.Array, Any], dict[str, Any]] | None = None,
    average: bool = False,
) -> TrainState:
    """A fresh state, born on the mesh as `sharding.by_size` says.

    `companions`, (key, shapes of the model's outputs) -> parameters by scope, are trained beside the model's own.
    `average`: keep moving averages.
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
        stats = variables.get("batch_stats", {})
        averages = {"params": params, "batch_stats": stats} if average else None
        return TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params), averages)

    key = jax.random.key(seed, impl="rbg")
    return jax.jit(build, out_shardings=sharding.by_size(jax.eval_shape(build, key), mesh))(key)


def _apply(model: nn.Module, params: Any, batch_stats: Any, batch: Batch, train: bool) -> Any:
    images = normalise_images(batch["images"])
    arguments = (images, batch["intrinsics"], batch["cam_to_ego"])
    mutable = ["batch_stats"] if train else False
    variables = {"params": params, "batch_stats": batch_stats}
    return model.apply(variables, *arguments, view_mask=batch["view_mask"], train=train, mutable=mutable)


def _forward(model: nn.Module, params: Any, batch_stats: Any, batch: Batch, parts: int) -> tuple[Any, Any]:
    """Outputs and batch statistics of the network in training, the batch in `parts` one after the other.

    Each part is computed again for the gradient (`jax.checkpoint`), so memory is that of one part's activations and of
    all outputs. The loss sees the outputs of the whole batch, so every term is what it is in one piece; only BatchNorm
    normalises by a part. Rig i is in part i mod `parts`, so each device's rigs are in all of them.
    """
    if parts == 1:
        outputs, mutated = _apply(model, params, batch_stats, batch, train=True)
        return outputs, mutated.get("batch_stats", {})
    inputs = {name: batch[name] for name in ("images", "intrinsics", "cam_to_ego", "view_mask")}
    split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), inputs)

    @jax.checkpoint
    def part(params: Any, piece: Batch) -> Any:
        return _apply(model, params, batch_stats, piece, train=True)

    outputs, mutated = jax.lax.map(lambda piece: part(params, piece), split)
    joined = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), outputs)
    return joined, jax.tree.map(lambda x: x.mean(0), mutated.get("batch_stats", {}))


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, loss_fn: LossFn, *, mesh: Mesh | None = None,
    parts: int = 1, average_decay: float = 0.0,
) -> Callable[[TrainState, Batch, Any, Any], tuple[TrainState, Metrics]]:  # fmt: skip
    """(state, batch, learning rate, frozen teacher parameters or None) -> (state, metrics); the old state's memory is
    reused. The updates of `optimizer` are multiplied by the rate.

    A step whose loss, gradient or new parameters are not finite leaves the state as it was, but for the count of steps.

    Args:
      mesh: where the state lies (default: all devices, whole on each).
      parts: compute the network on the batch in so many parts (`_forward`).
      average_decay: of the state's moving averages, if it has any; less in the first steps: (1 + step) / (10 + step).

    Returns:
      The compiled step. Metrics are scalars: the terms of the loss, `loss`, `grad_norm`, `param_norm` (after the
      update), `lr`, `skipped` (1 = the step left the state as it was).
    """
    mesh = mesh or sharding.make_mesh()

    def train_step(state: TrainState, batch: Batch, rate: Any, teacher: Any = None) -> tuple[TrainState, Metrics]:
        def compute(params: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
            params = sharding.gathered(params, mesh)
            outputs, batch_stats = _forward(model, params, state.batch_stats, batch, parts)
            loss, terms = loss_fn(outputs, batch, params, sharding.gathered(teacher, mesh))
            return loss, (terms, batch_stats)

        (loss, (terms, batch_stats)), gradients = jax.value_and_grad(compute, has_aux=True)(state.params)
        gradients = jax.lax.with_sharding_constraint(gradients, sharding.by_size(gradients, mesh))
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, optax.tree.scale(rate, updates))
        norms = {"grad_norm": optax.tree.norm(gradients), "param_norm": optax.tree.norm(params)}
        average = state.average
        if average is not None:
            decay = jnp.minimum(average_decay, (1.0 + state.step) / (10.0 + state.step))
            now = {"params": params, "batch_stats": batch_stats}
            average = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, average, now)
        new = TrainState(state.step + 1, params, batch_stats, opt_state, average)
        finite = jnp.all(jnp.isfinite(jnp.stack([loss, *norms.values()])))
        unchanged = dataclasses.replace(state, step=state.step + 1)
        kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, unchanged)
        metrics = {**terms, "loss": loss, **norms, "lr": jnp.asarray(rate, jnp.float32)}
        metrics["skipped"] = 1.0 - finite.astype(jnp.float32)
        place = sharding.by_size(kept, mesh), jax.tree.map(lambda _: sharding.replicated(mesh), metrics)
        return jax.lax.with_sharding_constraint((kept, metrics), place)

    return jax.jit(train_step, donate_argnames="state")


def make_predict(model: nn.Module, read: ReadFn) -> Callable[[Any, Any, Batch], Any]:
    """(params, batch_stats, batch) -> what `read` takes from the outputs: [B, N, H, W] float32, or arrays by name."""

    @jax.jit
    def predict(params: Any, batch_stats: Any, batch: Batch) -> Any:
        return read(_apply(model, params, batch_stats, batch, train=False))

    return predict
