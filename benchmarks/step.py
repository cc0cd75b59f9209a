"""One distillation step with made-up data and random weights, and its parts: what `benchmarks.train_step` times."""

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import teacher


def configured(args: argparse.Namespace) -> Any:
    """The config of the step."""
    from configs import nuscenes

    config = nuscenes.get_config()
    config.data.image_size = tuple(int(side) for side in args.size.split("x"))
    config.data.batch_size = args.batch
    config.model.encoder, config.model.num_bins, config.model.dtype = args.encoder, args.bins, args.dtype
    config.teacher.dtype, config.teacher.longer_side = args.dtype, max(config.data.image_size) // 14 * 14
    config.train.batch_parts, config.train.fsdp = args.parts, args.fsdp
    if args.compare:
        config.distill.bins, config.distill.w_cross, config.distill.w_vr = "soft_assign", 0.0, 0.0
        config.loss.chamfer_weight = 0.0
    return config


def random_batch(config: Any, cameras: int) -> dict[str, np.ndarray]:
    """A batch as the input pipeline makes it, with LiDAR on 2 % of the pixels and cameras in a ring."""
    from fsmde_jax.data import transforms

    rigs, (height, width) = config.data.batch_size, config.data.image_size
    batch = transforms.empty_batch(rigs, cameras, (height, width), dense_depth=False, clean_images=True)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (rigs, cameras, height // 8, width // 8, 3), np.uint8)
    batch["images"][:] = batch["clean_images"][:] = coarse.repeat(8, 2).repeat(8, 3)
    labelled = rng.random(batch["depth"].shape) < 0.02
    batch["depth"][:] = np.where(labelled, rng.uniform(2, 70, batch["depth"].shape), 0)
    focal = 450.0 * width / 640
    batch["intrinsics"][:] = [[focal, 0, width / 2 - 0.5], [0, focal, height / 2 - 0.5], [0, 0, 1]]
    for k, yaw in enumerate(np.arange(cameras) * 2 * np.pi / cameras):
        side, ahead = np.array([np.sin(yaw), -np.cos(yaw), 0]), np.array([np.cos(yaw), np.sin(yaw), 0])
        batch["cam_to_ego"][:, k] = np.eye(4)
        batch["cam_to_ego"][:, k, :3, :3] = np.stack([side, [0, 0, -1], ahead], 1)
    batch["ego_to_global"][:] = np.eye(4)
    batch["ego_mask"][:], batch["view_mask"][:] = True, True
    return {name: array for name, array in batch.items() if name != "record_index"}


class Ours:
    """This project's step, its parts, and what is known of them."""

    def __init__(self, args: argparse.Namespace, reference: Any = None):
        import jax

        from fsmde_jax import build, build_teacher, sharding
        from fsmde_jax.teacher import Card, Teacher

        self.config = config = configured(args)
        params = teacher.random_parameters("small") if reference is None else _ported(reference)
        frozen = Teacher(params, Card("small"))
        originals = build_teacher.open_teacher, build_teacher.weight_hash
        build_teacher.open_teacher = lambda *_, **__: frozen  # type: ignore[assignment]
        build_teacher.weight_hash = lambda teacher: ""
        self.batch = random_batch(config, args.cameras)
        try:
            stand_in: Any = _Records(args.cameras, self.batch, config)
            self.distilled: Any = build_teacher.distilled(config, stand_in)
        finally:
            build_teacher.open_teacher, build_teacher.weight_hash = originals
        self.mesh = sharding.make_mesh(config.train.fsdp)
        self.context = jax.set_mesh(self.mesh)
        self.context.__enter__()
        self.model, fresh, self.step = build.training(config, self.mesh, self.distilled, args.cameras)
        self.state = fresh()
        self.frozen = jax.device_put(params, sharding.by_size(params, self.mesh))
        placed = sharding.batch_sharding(self.mesh)
        self.on_device = {name: jax.device_put(array, placed) for name, array in self.batch.items()}

    def compile(self) -> tuple[Any, dict[str, float]]:
        """The compiled step, and the seconds that took, cold and from the persistent cache."""
        import jax
        from jax.experimental.compilation_cache import compilation_cache

        taken = {}
        arguments = (self.state, self.on_device, np.float32(1e-4), self.frozen)
        with tempfile.TemporaryDirectory() as folder:
            before = os.environ.get("JAX_COMPILATION_CACHE_DIR")
            compilation_cache.reset_cache()
            jax.config.update("jax_compilation_cache_dir", folder)
            for name in ("cold", "cached"):
                jax.clear_caches()
                started = time.perf_counter()
                compiled = self.step.lower(*arguments).compile()
                taken[name] = time.perf_counter() - started
            jax.config.update("jax_compilation_cache_dir", before)
            compilation_cache.reset_cache()
        return compiled, taken

    def whole(self, compiled: Any) -> Callable[[], Any]:
        """A call of the whole step, which goes on from the state of the one before."""
        import jax

        def call() -> Any:
            self.state, metrics = compiled(self.state, self.on_device, np.float32(1e-4), self.frozen)
            return jax.block_until_ready((self.state, metrics))[1]

        return call

    def cached(self) -> Callable[[], Any]:
        """A call of the whole step whose batch holds the teacher's maps and tokens, as with `teacher.cache`."""
        import jax

        from fsmde_jax import build, sharding, teacher_signal
        from fsmde_jax.losses import teacher_bins

        loss, (height, width) = self.distilled.loss, self.config.data.image_size

        @jax.jit
        def kept(frozen: Any, batch: Any) -> dict[str, Any]:
            maps = _teacher_maps(loss, frozen, batch)
            r = teacher_bins.resize_rel_inv_depth(maps.rel_inv_depth, height // 2, width // 2)
            tokens = teacher_signal.pool_tokens(maps.tokens, loss.weights.tokens).astype(np.float16)
            return {"teacher_rel_inv_depth": r, "teacher_tokens": tokens}

        batch = {name: array for name, array in self.on_device.items() if name != "clean_images"}
        batch |= jax.device_put(kept(self.frozen, self.on_device), sharding.batch_sharding(self.mesh))
        distilled = dataclasses.replace(self.distilled, loss=dataclasses.replace(loss, module=None))
        _, fresh, step = build.training(self.config, self.mesh, distilled, batch["images"].shape[1])
        state = fresh()
        compiled = step.lower(state, batch, np.float32(1e-4), None).compile()

        def call() -> Any:
            nonlocal state
            state, metrics = compiled(state, batch, np.float32(1e-4), None)
            return jax.block_until_ready((state, metrics))[1]

        return call

    def input(self) -> Callable[[], Any]:
        """A call that makes the next batch in one thread (decode, augment, rasterise) and puts it on the devices."""
        import jax

        from fsmde_jax import build, sharding
        from fsmde_jax.data import pipeline

        records: Any = _Stored(self.batch)
        stream = pipeline.train_dataset(
            records, image_size=self.config.data.image_size, batch_size=self.config.data.batch_size, seed=0,
            augment=build.augment_options(self.config), num_threads=0, clean_images=True,
        )  # fmt: skip
        iterator, placed = iter(stream), sharding.batch_sharding(self.mesh)

        def call() -> Any:
            batch = pipeline.put_batch(next(iterator), placed)
            return jax.block_until_ready({name: array for name, array in batch.items() if name != "record_index"})

        return call

    def parts(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Name -> (jitted function, its arguments)."""
        import jax
        import jax.numpy as jnp
        import optax

        from fsmde_jax import optim
        from fsmde_jax.models.student import normalise_images

        o = self.config.optim
        optimizer = optim.make_optimizer(
            weight_decay=o.weight_decay, clip_norm=o.clip_norm, encoder_lr_scale=o.encoder_lr_scale
        )

        def update(params: Any, opt_state: Any, gradients: Any) -> Any:
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, optax.tree.scale(1e-4, updates)), opt_state

        loss, params, stats = self.distilled.loss, self.state.params, self.state.batch_stats
        keep = jax.tree.map(lambda leaf: leaf + 0, (params, stats))  # the step reuses the memory of its state

        def run_teacher(frozen: Any, batch: Any) -> Any:
            return _teacher_maps(loss, frozen, batch)

        cached = dataclasses.replace(loss, module=None)  # takes the teacher's maps from the batch

        def value(params: Any, stats: Any, batch: Any, maps: Any) -> Any:
            outputs, _ = self.model.apply(
                {"params": params, "batch_stats": stats}, normalise_images(batch["images"]), batch["intrinsics"],
                batch["cam_to_ego"], view_mask=batch["view_mask"], train=True, mutable=["batch_stats"],
            )  # fmt: skip
            batch = {**batch, "teacher_rel_inv_depth": maps.rel_inv_depth, "teacher_tokens": maps.tokens}
            return cached(outputs, batch, params, None)[0]

        maps = jax.jit(run_teacher)(self.frozen, self.on_device)
        moments, gradients = (jax.tree.map(jnp.copy, tree) for tree in (self.state.opt_state, keep[0]))
        given = (*keep, self.on_device, maps)
        return {
            "teacher": (jax.jit(run_teacher), (self.frozen, self.on_device)),
            "student forward": (jax.jit(value), given),
            "forward and backward": (jax.jit(jax.value_and_grad(value)), given),
            "update": (jax.jit(update), (keep[0], moments, gradients)),
        }


def _teacher_maps(loss: Any, frozen: Any, batch: Any) -> Any:
    from fsmde_jax import teacher_signal
    from fsmde_jax.models.student import normalise_images

    images = normalise_images(batch["clean_images"])
    return teacher_signal.run_teacher(loss.module, frozen, images, size=loss.size, tap=loss.tap)


class _Records:
    """Stands for records where distillation asks which cameras are adjacent."""

    def __init__(self, cameras: int, batch: dict[str, np.ndarray], config: Any):
        import types

        self.cameras = [f"CAM_{k}" for k in range(cameras)]
        size = np.tile(np.array(config.data.image_size), (cameras, 1))
        self._sample = types.SimpleNamespace(
            cam_to_ego=batch["cam_to_ego"][0], intrinsics=batch["intrinsics"][0], image_size=size,
            native_intrinsics=batch["intrinsics"][0], native_size=size, camera_names=self.cameras,
            images=[b"x"] * cameras, num_cameras=cameras,
        )  # fmt: skip

    def __getitem__(self, index: int) -> Any:
        return self._sample


class _Stored:
    """Stands for records: one rig, whose JPEGs lie in memory, again and again."""

    fingerprint = "benchmark"

    def __init__(self, batch: dict[str, np.ndarray]):
        import cv2

        from fsmde_jax.data.schema import RigSample

        count, height, width = batch["images"].shape[1:4]
        self.cameras = [f"CAM_{k}" for k in range(count)]
        size, none = np.tile(np.array((height, width)), (count, 1)), np.zeros((0, 3), np.float32)
        points = []
        for depth in batch["depth"][0]:
            v, u = np.nonzero(depth)
            points.append(np.stack([u, v, depth[v, u]], 1).astype(np.float32))
        self._sample = RigSample(
            sample_id="0", scene="0", timestamp_us=0, camera_names=self.cameras,
            images=[cv2.imencode(".jpg", image)[1].tobytes() for image in batch["images"][0]], image_size=size,
            native_size=size, intrinsics=batch["intrinsics"][0], cam_to_ego=batch["cam_to_ego"][0],
            ego_to_global=batch["ego_to_global"][0], global_origin=np.zeros(3, np.int64),
            camera_timestamps_us=np.zeros(count, np.int64), points=points, extra_points=[none] * count,
            ego_masks=[b""] * count, dense_depth=[b""] * count,
        )  # fmt: skip

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return self._sample

    def where(self, index: int) -> str:
        return "benchmark"


def _ported(reference: Any) -> Any:
    """Parameters of the port from the transformers model."""
    return teacher.our_program(reference, "small", "float32")[1]
