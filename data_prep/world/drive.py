"""A rig driven through a scene: what every sensor sees at its own time, and where it was.

A keyframe is the LiDAR's moment; every camera exposes a little earlier or later (`Camera.delay`), from where the car
then is, and sees what moves where it then is. Times are whole microseconds since the scene's start.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial.transform import Rotation

from data_prep.world import lidar as lidars
from data_prep.world import primitives, raycast, render, road, scene, sensor
from data_prep.world.primitives import Geometry
from data_prep.world.rigs import Body, Rig
from data_prep.world.scene import Scene
from data_prep.world.surfaces import Semantic
from fsmde_jax import geometry as rigid

_LIDAR_KEY, _CAMERA_KEY, _PICTURE_KEY = 1, 1000, 1_000_000  # random streams of a scene; others belong to its cells

# On a CPU: geometry is thousands of small operations that run in milliseconds (at level 0 twelve times slower, above 1
# no faster and longer to compile); pictures and sweeps are worth XLA's own choice.
_QUICK_COMPILE = {"xla_backend_optimization_level": 1}
_PICTURE_COMPILE: dict[str, int] | None = None


class Views(NamedTuple):
    """Pictures of N cameras with images of one size."""

    rgb: jax.Array  # [N, H, W, 3] uint8
    depth: jax.Array  # [N, H, W] float32 z-depth in metres, 0 = sky
    semantic: jax.Array  # [N, H, W] uint8


class Calibration(NamedTuple):
    """How a rig's N cameras look, in the rig's order: an argument of the compiled stages, so one serves many rigs."""

    intrinsics: np.ndarray | jax.Array  # [N, 3, 3] float32
    cam_to_ego: np.ndarray | jax.Array  # [N, 4, 4] float32


class Frame(NamedTuple):
    """One keyframe on the device. Poses are relative to the anchor cell."""

    views: tuple[Views, ...]  # one per image size, see `size_groups`
    camera_ego: jax.Array  # [N, 4, 4] ego -> world at each camera's time, in the rig's order
    sweep: lidars.Sweep
    lidar_ego: jax.Array  # [4, 4] ego -> world at the keyframe's time
    anchor: jax.Array  # int32


@dataclasses.dataclass(frozen=True)
class Picture:
    """One camera's picture on the host."""

    rgb: np.ndarray  # [H, W, 3] uint8
    depth: np.ndarray  # [H, W] float32 z-depth in metres, 0 = sky
    semantic: np.ndarray  # [H, W] uint8
    ego_to_global: np.ndarray  # [4, 4] float64 at the camera's time
    time_us: int


@dataclasses.dataclass(frozen=True)
class Cloud:
    """One sweep's P points on the host."""

    points: np.ndarray  # [P, 3] float32 metres in the sensor's frame
    intensity: np.ndarray  # [P] float32, 0..1
    ring: np.ndarray  # [P] int32
    ego_to_global: np.ndarray  # [4, 4] float64
    time_us: int


def size_groups(rig: Rig) -> dict[tuple[int, int], list[int]]:
    """Cameras (their numbers in the rig's order) by image size."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, camera in enumerate(rig.cameras.values()):
        groups.setdefault(camera.size, []).append(number)
    return groups


def calibration(rig: Rig) -> Calibration:
    """Calibration of a rig's cameras."""
    cameras = rig.cameras.values()
    pairs = ([c.intrinsics for c in cameras], [c.cam_to_ego for c in cameras])
    return Calibration(*(np.stack(matrices).astype(np.float32) for matrices in pairs))


def delays_us(rig: Rig) -> list[int]:
    """Microseconds from the keyframe's time to each camera's, in the rig's order."""
    return [round(camera.delay * 1e6) for camera in rig.cameras.values()]


def body_geometry(body: Body, ego_to_world: jax.Array) -> Geometry:
    """The car's own body at a pose [4, 4]."""
    parts = primitives.frustum(*(jnp.asarray(x) for x in (body.low, body.high, body.shrink_low, body.shrink_high)))
    parts = primitives.painted(parts, jnp.asarray(body.material), int(Semantic.EGO), jnp.asarray(body.colour))
    none = primitives.ellipsoid(jnp.zeros((0, 3)), jnp.ones((0, 3)))
    return Geometry(primitives.place(parts, ego_to_world[:3, :3], ego_to_world[:3, 3]), none)


def shadow_resolution(rig: Rig) -> int:
    """Pixels along a side of the sun's map that suit the images."""
    tallest = max(camera.size[0] for camera in rig.cameras.values())
    return int(np.clip(64 * round(2.5 * tallest / 64), 256, 1024))


def _stream(world: Scene, number: int, time_us: jax.Array | int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(world.key, number), time_us)


class Stages:
    """The steps from a scene and a time to a frame, pure functions of JAX arrays.

    They are separate because each compiles once and is then used for several things, and because what stands still
    need not be made again for every frame.
    """

    def __init__(self, rig: Rig, *, samples: int = 1):
        """`samples`: rays per pixel along each axis for the colours, 1 or 2."""
        self.rig, self.samples = rig, samples
        self.delays = jnp.array([0, *delays_us(rig)])

    def anchor(self, world: Scene, time_us: jax.Array) -> jax.Array:
        """Anchor cell (int32) of a keyframe's time."""
        return road.anchor_at(world.road, time_us.astype(jnp.float32) * 1e-6)

    def moving(self, world: Scene, anchor: jax.Array, times_us: jax.Array) -> tuple[Geometry, jax.Array]:
        """What moves at M times: parts [M, ...], without the car itself, and ego -> world [M, 4, 4]."""
        times = times_us.astype(jnp.float32) * 1e-6
        parts = jax.vmap(lambda t: scene.moving_geometry(world, anchor, t))(times)
        return parts, jax.vmap(lambda t: road.ego_pose(world.road, anchor, t))(times)

    def sweep(
        self, world: Scene, static: Geometry, moving: Geometry, egos: jax.Array, time_us: jax.Array
    ) -> lidars.Sweep:
        """The LiDAR's revolution at the first of the M times, `time_us`."""
        pose = egos[0] @ jnp.asarray(self.rig.lidar.sensor_to_ego, jnp.float32)
        key = _stream(world, _LIDAR_KEY, time_us)
        everything = self._everything(static, moving, egos, 0, body=True)
        return lidars.sweep(everything, self.rig.lidar, pose, key, world.light.extinction)

    def shadow(self, world: Scene, static: Geometry, moving: Geometry, egos: jax.Array) -> render.Shadow:
        """Light and shade around the car at the first of the M times."""
        everything = self._everything(static, moving, egos, 0, body=True)
        return render.shadow_map(world, everything, egos[0, :3, 3], shadow_resolution(self.rig))

    def views(
        self, world: Scene, anchor: jax.Array, static: Geometry, moving: Geometry, egos: jax.Array,
        shadow: render.Shadow, time_us: jax.Array, cameras: Calibration,
    ) -> tuple[Views, ...]:  # fmt: skip
        """All cameras' pictures of a keyframe; camera n at the n + 1st of the times, as `cameras` says."""

        def view(item: tuple, size: tuple[int, int]) -> Views:
            number, intrinsics, cam_to_ego = item
            seen = self._everything(static, moving, egos, 1 + number, body=self.rig.body.in_images)
            picture = render.render_camera(
                world, seen, shadow, anchor, egos[1 + number] @ cam_to_ego, intrinsics, size,
                _stream(world, _PICTURE_KEY + number, time_us), samples=self.samples,
                camera=sensor.sample_sensor(_stream(world, _CAMERA_KEY + number, 0)),
            )  # fmt: skip
            return Views(*picture)

        made = []
        for size, numbers in size_groups(self.rig).items():
            chosen = np.array(numbers)
            items = (jnp.array(numbers), *(jnp.asarray(matrices[chosen]) for matrices in cameras))
            one = functools.partial(view, size=size)
            # One by one, a CPU skips what a camera does not show.
            made.append(jax.lax.map(one, items) if jax.default_backend() == "cpu" else jax.vmap(one)(items))
        return tuple(made)

    def frame(self, world: Scene, time_us: jax.Array) -> Frame:
        """A whole keyframe at int32 microseconds: jit and vmap it to render many scenes at once on a device."""
        anchor = self.anchor(world, time_us)
        static = scene.static_geometry(world, anchor)
        moving, egos = self.moving(world, anchor, time_us + self.delays)
        shadow = self.shadow(world, static, moving, egos)
        views = self.views(world, anchor, static, moving, egos, shadow, time_us, calibration(self.rig))
        return Frame(views, egos[1:], self.sweep(world, static, moving, egos, time_us), egos[0], anchor)

    def _everything(
        self, static: Geometry, moving: Geometry, egos: jax.Array, number: jax.Array | int, *, body: bool
    ) -> Geometry:
        parts = [static, jax.tree.map(lambda leaf: leaf[number], moving)]
        return primitives.merge(*parts, *([body_geometry(self.rig.body, egos[number])] if body else []))


def frame_function(rig: Rig, *, samples: int = 1) -> Callable[[Scene, jax.Array], Frame]:
    """`Stages.frame` of a rig: a pure function of the scene and the keyframe's time in int32 microseconds."""
    return Stages(rig, samples=samples).frame


class Drive:
    """One scene on the host: renders keyframes and sweeps with global poses in float64.

    The global frame of a scene is turned and moved at random, as recorded drives are.
    """

    def __init__(self, renderer: Renderer, key: jax.Array, rig: Rig | None = None):
        """`key` is `scene.scene_key(seed, split, index)`; `rig` may differ from the renderer's in its cameras'
        intrinsics and poses (`rigs.varied`), in nothing else (ValueError)."""
        self.renderer = renderer
        self.rig = rig or renderer.rig
        _check_same_but_calibration(self.rig, renderer.rig)
        self._calibration = calibration(self.rig)
        self.world = renderer.sample(key)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
        turn, east, north = rng.uniform((-np.pi, 200.0, 200.0), (np.pi, 2200.0, 2200.0))
        self.start = rigid.pose_matrix([np.cos(turn / 2), 0.0, 0.0, np.sin(turn / 2)], [east, north, 0.0])

    def _global(self, anchor: jax.Array, ego: jax.Array) -> np.ndarray:
        """[..., 4, 4] float64, exactly rigid."""
        poses = np.array(ego, np.float64)
        poses[..., :3, 3] += np.asarray(self.renderer.anchor_position(self.world.road, anchor), np.float64)
        exact = Rotation.from_matrix(poses[..., :3, :3].reshape(-1, 3, 3)).as_matrix()
        poses[..., :3, :3] = exact.reshape(poses[..., :3, :3].shape)
        return self.start @ poses

    def keyframe(self, number: int) -> tuple[dict[str, Picture], Cloud]:
        """Pictures by camera name and the sweep of keyframe `number` (0, 1, ...)."""
        rig = self.rig
        time_us = round(number * 1e6 / rig.keyframe_rate)
        frame = jax.device_get(self.renderer.frame(self.world, np.int32(time_us), self._calibration))
        poses = self._global(frame.anchor, frame.camera_ego)
        pictures: dict[int, Picture] = {}
        for views, numbers in zip(frame.views, size_groups(rig).values(), strict=True):
            for row, n in enumerate(numbers):
                parts = (views.rgb[row], views.depth[row], views.semantic[row])
                pictures[n] = Picture(*parts, poses[n], time_us + delays_us(rig)[n])
        named = {name: pictures[n] for n, name in enumerate(rig.cameras)}
        return named, self._cloud(frame.sweep, frame.anchor, frame.lidar_ego, time_us)

    def sweep(self, time_us: int) -> Cloud:
        """The LiDAR's revolution at any time."""
        made, ego, anchor = jax.device_get(self.renderer.sweep(self.world, np.int32(time_us)))
        return self._cloud(made, anchor, ego, time_us)

    def _cloud(self, made: lidars.Sweep, anchor: jax.Array, ego: jax.Array, time_us: int) -> Cloud:
        kept = np.asarray(made.valid)
        points, intensity, ring = (np.asarray(x)[kept] for x in (made.points, made.intensity, made.ring))
        return Cloud(points, intensity, ring, self._global(anchor, ego), time_us)


def _check_same_but_calibration(rig: Rig, other: Rig) -> None:
    cameras = [{name: (c.size, c.delay) for name, c in r.cameras.items()} for r in (rig, other)]
    rest = rig.lidar is other.lidar and rig.body is other.body and rig.keyframe_rate == other.keyframe_rate
    if not rest or list(cameras[0].items()) != list(cameras[1].items()):
        raise ValueError(f"rig {rig.name} differs from the renderer's in more than its cameras' calibration")


class Renderer:
    """The compiled stages of a rig; they compile when first used and serve all scenes."""

    def __init__(self, rig: Rig, *, samples: int = 1):
        """See `Stages`."""
        self.rig = rig
        self._calibration = calibration(rig)
        stages = Stages(rig, samples=samples)
        self._delays = np.asarray(stages.delays)
        fast, best = (_QUICK_COMPILE, _PICTURE_COMPILE) if jax.default_backend() == "cpu" else (None, None)
        self.sample = jax.jit(scene.sample_scene, compiler_options=fast)
        self.anchor_position = jax.jit(road.anchor_position)
        self._anchor = jax.jit(stages.anchor)
        self._static_geometry = jax.jit(scene.static_geometry, compiler_options=fast)
        self._moving = jax.jit(stages.moving, compiler_options=fast)
        steps = (stages.shadow, stages.views, stages.sweep)
        self._shadow, self._views, self._sweep = (jax.jit(step, compiler_options=best) for step in steps)
        self._last: tuple[Scene | None, int, Any] = (None, 0, None)

    def _static(self, world: Scene, anchor: int) -> Geometry:
        """Static geometry; the last one is kept, because a car stays in a cell for several frames."""
        last = self._last  # read once and written once: threads may share a renderer
        if last[0] is not world or last[1] != anchor:
            last = self._last = (world, anchor, self._static_geometry(world, np.int32(anchor)))
        return last[2]

    def frame(self, world: Scene, time_us: np.int32, cameras: Calibration | None = None) -> Frame:
        """A keyframe; `cameras`: those of the rig unless given."""
        anchor = self._anchor(world, time_us)
        static = self._static(world, int(anchor))
        moving, egos = self._moving(world, anchor, time_us + self._delays)
        shadow = self._shadow(world, static, moving, egos)
        views = self._views(world, anchor, static, moving, egos, shadow, time_us, cameras or self._calibration)
        return Frame(views, egos[1:], self._sweep(world, static, moving, egos, time_us), egos[0], anchor)

    def sweep(self, world: Scene, time_us: np.int32) -> tuple[lidars.Sweep, jax.Array, jax.Array]:
        """A revolution of the LiDAR, ego -> world [4, 4] and the anchor."""
        anchor = self._anchor(world, time_us)
        static = self._static(world, int(anchor))
        moving, egos = self._moving(world, anchor, time_us + self._delays)  # all times, to compile it only once
        return self._sweep(world, static, moving, egos, time_us), egos[0], anchor


def body_masks(rig: Rig) -> dict[str, np.ndarray]:
    """Per camera [H, W] bool: False where it sees the car's own body (traced exactly)."""
    masks = {}
    body = body_geometry(rig.body, jnp.eye(4))
    for name, camera in rig.cameras.items():
        if rig.body.in_images and len(rig.body.low):
            k, pose = (jnp.asarray(x, jnp.float32) for x in (camera.intrinsics, camera.cam_to_ego))
            tiles = raycast.pinhole_tiles(k, pose, camera.size)
            hits = jax.jit(raycast.trace)(body, tiles)
            masks[name] = np.asarray(raycast.untile(hits.part, camera.size)) == raycast.NOTHING
        else:
            masks[name] = np.ones(camera.size, bool)
    return masks
