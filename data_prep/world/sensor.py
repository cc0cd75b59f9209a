"""From radiance to the bytes of a camera: exposure, white balance, vignetting, lens blur, noise, tone curve."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from data_prep.world.light import Light

_LUMA = (0.2126, 0.7152, 0.0722)


class Sensor(NamedTuple):
    """What differs between the cameras of a rig; scalars unless a shape is given."""

    exposure: jax.Array  # stops
    balance: jax.Array  # [3] white balance gains
    vignetting: jax.Array  # light lost at the corners, 0..1
    blur: jax.Array  # standard deviation of the lens's blur, pixels
    noise: jax.Array  # relative to a usual sensor


def sample_sensor(key: jax.Array) -> Sensor:
    """A camera; draw it once per camera of a scene, so that it stays the same over time."""
    exposure, balance, vignetting, blur, noise = jax.random.split(key, 5)
    return Sensor(
        exposure=0.15 * jax.random.normal(exposure),
        balance=jnp.exp(0.02 * jax.random.normal(balance, (3,))),
        vignetting=jax.random.uniform(vignetting, minval=0.05, maxval=0.3),
        blur=jax.random.uniform(blur, minval=0.3, maxval=0.55),
        noise=jax.random.uniform(noise, minval=0.6, maxval=1.6),
    )


def _blurred(image: jax.Array, sigma: jax.Array) -> jax.Array:
    """Three-tap separable blur of [H, W, 3] with variance sigma^2 (sigma below 0.7 pixels)."""
    side = 0.5 * jnp.square(sigma)
    for axis in (0, 1):
        length = image.shape[axis]
        first = jax.lax.slice_in_dim(image, 0, 1, axis=axis)
        last = jax.lax.slice_in_dim(image, length - 1, length, axis=axis)
        before = jnp.concatenate([first, jax.lax.slice_in_dim(image, 0, length - 1, axis=axis)], axis)
        after = jnp.concatenate([jax.lax.slice_in_dim(image, 1, length, axis=axis), last], axis)
        image = image * (1.0 - 2.0 * side) + side * (before + after)
    return image


def expose(radiance: jax.Array, light: Light, sensor: Sensor, key: jax.Array) -> jax.Array:
    """Picture of a camera.

    Args:
      radiance: [H, W, 3] linear light.
      light: of the scene, for its exposure and noise.
      sensor: the camera.
      key: of the noise of this picture.

    Returns:
      [H, W, 3] uint8, sRGB.
    """
    height, width = radiance.shape[:2]
    luma = radiance @ jnp.array(_LUMA)
    # Metering by the mean of clipped logarithms: small bright lamps and dark corners change little.
    mean = jnp.exp(jnp.mean(jnp.log(jnp.clip(luma, 0.01, 2.0))))
    gain = 0.29 / mean**0.85 * 2.0 ** (light.exposure + sensor.exposure)
    y = (jnp.arange(height) - (height - 1) / 2.0) / (0.5 * height)
    x = (jnp.arange(width) - (width - 1) / 2.0) / (0.5 * width)
    corner = 0.5 * (jnp.square(x)[None, :] + jnp.square(y)[:, None])
    falloff = 1.0 - sensor.vignetting * corner
    image = _blurred(radiance, sensor.blur) * (gain * falloff[..., None]) * sensor.balance
    shot = 0.012 * sensor.noise * light.noise
    spread = shot * jnp.sqrt(jnp.maximum(image, 0.0)) + 0.25 * shot
    image = image + spread * _bell(key, image.shape)
    image = jnp.maximum(image, 0.0)
    # The tone curve of cameras: shadows a little deeper than in the scene, highlights that roll off.
    image = image * (image + 0.055) / (image + 0.12)
    over = jnp.maximum(image - 0.6, 0.0)
    image = jnp.minimum(jnp.minimum(image, 0.6) + 0.45 * over / (0.45 + over), 1.0)
    curve = jnp.where(image < 0.0031308, 12.92 * image, 1.055 * jnp.maximum(image, 1e-6) ** (1 / 2.4) - 0.055)
    return (255.0 * curve + 0.5).astype(jnp.uint8)


def _bell(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """About normal numbers: sums of the four bytes of random words, which cost a fraction of exact ones."""
    bits = jax.random.bits(key, shape, jnp.uint32)
    total = (bits & 255) + ((bits >> 8) & 255) + ((bits >> 16) & 255) + (bits >> 24)
    return (total.astype(jnp.float32) - 510.0) / 147.8
