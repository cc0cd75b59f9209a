"""Weather and time of day: the sun, the sky, haze and lamps of a scene, in linear light.

A white matt surface that faces a clear high sun reflects about 1; the sky's radiance is in the same unit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

CLEAR, CLOUDY, HAZY, OVERCAST, DUSK, RAIN = range(6)
SHARES = (0.34, 0.22, 0.12, 0.18, 0.07, 0.07)  # of scenes

# One row per kind of weather: brightness of the direct sun, of the sky, cloud cover, grey sky share, wet ground.
_WEATHER = (
    (1.05, 0.72, 0.10, 0.00, 0.0),
    (0.95, 0.80, 0.55, 0.10, 0.0),
    (0.50, 0.95, 0.15, 0.55, 0.0),
    (0.04, 1.50, 0.90, 0.95, 0.0),
    (0.08, 0.25, 0.45, 0.25, 0.0),
    (0.02, 1.00, 0.95, 1.00, 1.0),
)
# Sun's elevation in degrees (low, high) and visibility in kilometres (low, high) of each kind.
_ELEVATION = ((6.0, 65.0), (8.0, 62.0), (5.0, 45.0), (25.0, 60.0), (2.5, 6.0), (25.0, 60.0))
_VISIBILITY = ((6.0, 25.0), (5.0, 20.0), (0.25, 3.0), (1.5, 12.0), (2.0, 12.0), (0.4, 4.0))


class Light(NamedTuple):
    """Light of one scene; scalars unless a shape is given. Colours are linear RGB radiances."""

    sun_direction: jax.Array  # [3] unit vector towards the sun, world frame
    sun_colour: jax.Array  # [3] what a white surface that faces the sun reflects of its direct light
    zenith: jax.Array  # [3] radiance of the clear sky overhead
    horizon: jax.Array  # [3] and at the horizon, which is also the colour of haze
    glow: jax.Array  # radiance of the bright sky around the sun
    clouds: jax.Array  # share of the sky that clouds cover, 0..1
    extinction: jax.Array  # of haze, 1 / metre
    wetness: jax.Array  # 0..1: wet ground is darker and mirrors the sky
    lamps: jax.Array  # 0..1: how far street lamps, headlights and windows shine
    softness: jax.Array  # half width of shadow edges, metres per metre of distance to what casts them
    exposure: jax.Array  # what the cameras expose brighter than the scene's mean, in stops
    noise: jax.Array  # sensor noise of the scene's brightness relative to that of a bright day
    seed: jax.Array  # uint32 of the scene's textures: clouds, wear of the road


def sample_light(key: jax.Array) -> Light:
    """Light of one scene: clear, cloudy, hazy, overcast, dusk or rain, each varied."""
    keys = iter(jax.random.split(key, 24))

    def uniform(low: jax.Array | float, high: jax.Array | float, shape: tuple = ()) -> jax.Array:
        return low + (high - low) * jax.random.uniform(next(keys), shape)

    kind = jax.random.categorical(next(keys), jnp.log(jnp.array(SHARES)))
    sun, sky, clouds, grey, wet = jnp.array(_WEATHER)[kind]
    elevation = jnp.deg2rad(uniform(*jnp.array(_ELEVATION)[kind]))
    azimuth = uniform(0.0, 2 * jnp.pi)
    flat = jnp.cos(elevation)
    direction = jnp.stack([flat * jnp.cos(azimuth), flat * jnp.sin(azimuth), jnp.sin(elevation)])
    # The lower the sun, the longer the light's way through the air: redder and weaker.
    air = jnp.exp(-elevation / jnp.deg2rad(9.0))
    sun_colour = sun * uniform(0.9, 1.1) * jnp.array([1.0, 0.95, 0.87]) ** (1.0 + 4.0 * air) * (1.0 - 0.45 * air)
    warm = air * (1.0 - grey)
    blue = jnp.array([0.13, 0.27, 0.52]) * uniform(0.8, 1.25)
    pale = jnp.array([0.44, 0.55, 0.66]) * (1.0 - warm) + jnp.array([0.62, 0.46, 0.33]) * warm
    dull = jnp.array([0.50, 0.52, 0.55]) * uniform(0.9, 1.1)
    bright = sky * uniform(0.8, 1.2)
    visibility = 1000.0 * jnp.exp(uniform(*jnp.log(jnp.array(_VISIBILITY)[kind])))
    lamps = jnp.where(kind == DUSK, uniform(0.6, 1.0), jnp.where(kind == RAIN, uniform(0.0, 0.6), 0.0))
    return Light(
        sun_direction=direction,
        sun_colour=sun_colour,
        zenith=bright * (blue + (dull - blue) * grey),
        horizon=bright * (pale + (0.9 * dull - pale) * grey),
        glow=sun * uniform(0.3, 0.8) * (1.0 + grey),
        clouds=jnp.clip(clouds + uniform(-0.1, 0.15), 0.0, 1.0),
        extinction=3.9 / visibility,
        wetness=wet * uniform(0.5, 1.0),
        lamps=lamps,
        softness=jnp.where(grey > 0.4, 0.05, 0.012) * uniform(0.7, 1.5),
        exposure=0.25 * jax.random.normal(next(keys)),
        noise=jnp.where(kind == DUSK, uniform(2.0, 4.0), jnp.where(sky * sun < 0.1, uniform(1.2, 2.0), 1.0)),
        seed=jax.random.bits(next(keys), (), jnp.uint32),
    )
