"""What depth a distribution over bins stands for; the student's, and the crossing's of its loss."""

from typing import Any

import jax.numpy as jnp

Array = Any  # jax.Array

EXPECTATIONS = ("log", "depth")


def expected_depth(probabilities: Array, centers: Array, expectation: str) -> Array:
    """The depth [...] metres, float32, that probabilities [..., K] over centers [..., K] stand for.

    `depth` is sum_k p_k c_k (AdaBins). `log` is exp(sum_k p_k log c_k): where p is broad, a little of it on the
    farthest bins, tens of times as far, does not carry the mean away. (Sums, no matrix product, which accelerators
    would round.)
    """
    probabilities, centers = probabilities.astype(jnp.float32), centers.astype(jnp.float32)
    if expectation == "log":
        return jnp.exp(jnp.sum(probabilities * jnp.log(centers), -1))
    if expectation != "depth":
        raise ValueError(f"expectation {expectation!r}: expected one of {EXPECTATIONS}")
    return jnp.sum(probabilities * centers, -1)
