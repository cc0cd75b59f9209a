"""Random parameters of a network without compiling its initialisation."""

import functools

import jax
import numpy as np


def random_variables(module, *args, seed=1):
    """Variables of a module with He-scaled random numbers everywhere, so that nothing stays at a zero initialisation.

    From shapes alone: compiling the real initialisation takes several times longer than a test.
    """
    rng = np.random.default_rng(seed)

    def fill(keys, spec):
        leaf = keys[-1].key
        if leaf == "kernel":
            return rng.normal(size=spec.shape).astype(np.float32) * np.float32(np.sqrt(2 / np.prod(spec.shape[:-1])))
        noise = 0.1 * rng.normal(size=spec.shape).astype(np.float32)
        return 1 + np.abs(noise) if leaf in ("scale", "var") else noise

    shapes = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), *args)
    return jax.tree_util.tree_map_with_path(fill, shapes)
