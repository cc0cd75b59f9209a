"""An encoder that compiles at once, for tests of whatever goes on around it."""

import contextlib
from collections.abc import Iterator

import flax.linen as nn
import jax

from fsmde_jax.models import student
from fsmde_jax.models.batch_norm import BatchNorm


class ToyEncoder(nn.Module):
    """Stands for an encoder: five taps at strides 2 to 32, a convolution each, and statistics of the batch."""

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        taps = []
        for width in (4, 4, 6, 8, 8):
            # In front of the statistics a bias would have a gradient of rounding alone, which Adam makes steps of.
            x = nn.Conv(width, (3, 3), strides=(2, 2), padding=1, use_bias=bool(taps))(x)
            if not taps:
                x = BatchNorm(use_running_average=not train, momentum=0.9)(x, mask=mask)
            x = nn.relu(x)
            taps.append(x)
        return tuple(taps)


def make_encoder(encoder, dtype, name):
    """In place of `student.make_encoder`."""
    return ToyEncoder(name=name)


@contextlib.contextmanager
def toy_encoder() -> Iterator[None]:
    """Every student gets the toy for its encoder, and compiles without optimisations, once for all of a test run."""
    kept = student.make_encoder, jax.config.jax_persistent_cache_min_compile_time_secs
    student.make_encoder = make_encoder
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        yield
    finally:
        student.make_encoder = kept[0]
        jax.config.update("jax_disable_most_optimizations", False)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", kept[1])
