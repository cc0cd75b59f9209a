"""A teacher that compiles at once: local, symmetric under mirroring, with outputs like those of `DepthAnything`."""

import types
from typing import Any

import jax.numpy as jnp
import numpy as np

from fsmde_jax import interpolate
from fsmde_jax.teacher import Card

CHANNELS = 5


def params(
    seed: int = 0, *, gain: float = 1.0, scale: float = 1.0, shift: float = 0.0, ramp: float = 1.0
) -> dict[str, Any]:
    """The toy's parameters; the map is scale * f(images) + shift."""
    rng = np.random.default_rng(seed)
    mix = rng.uniform(0.2, 1.0, 3) * gain
    numbers = {"mix": mix, "ramp": ramp, "scale": scale, "shift": shift, "project": rng.normal(size=(3, CHANNELS))}
    return {name: jnp.asarray(value, jnp.float32) for name, value in numbers.items()}


class ToyModule:
    """Stands for the linen module."""

    sizes = types.SimpleNamespace(embed_dim=CHANNELS, fusion=CHANNELS)
    patch = 14

    def __init__(self, max_depth: float | None = None):
        self.max_depth = max_depth

    def apply(self, variables: Any, x: Any) -> dict[str, Any]:
        """x [M, H, W, 3] -> maps: a brightness, smoothed by a symmetric kernel, plus a ramp from top to bottom."""
        p = variables["params"]
        m, h, w, _ = x.shape
        assert m and h % 14 == 0 and w % 14 == 0
        grey = x.astype(jnp.float32) @ p["mix"]
        padded = jnp.pad(grey, ((0, 0), (0, 0), (1, 1)), mode="edge")
        smooth = (padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]) / 4
        raw = smooth + p["ramp"] * jnp.linspace(0.0, 1.0, h)[:, None]
        taps = interpolate.resize(x, h // 14, w // 14, "area") @ p["project"]
        features = interpolate.resize(x @ p["project"], 8 * h // 14, 8 * w // 14, "area")
        result = {"rel_inv_depth": raw * p["scale"] + p["shift"]}
        if self.max_depth is not None:
            result = {"depth": self.max_depth / (1 + jnp.exp(raw))}
        several = tuple(taps * (1 + (3 - k) * jnp.arange(CHANNELS)) for k in range(4))  # no two have equal cosines
        return {**result, "taps": several, "features": features}


class ToyTeacher:
    """Stands for `teacher.Teacher`."""

    token_stride = 14

    def __init__(self, max_depth: float | None = None, **options: Any):
        self.params = params(**options)
        self.card = Card("tiny", max_depth=max_depth)
        self.shift_known = max_depth is not None

    def module(self, dtype: Any = jnp.float32, **options: Any) -> ToyModule:
        return ToyModule(self.card.max_depth)
