"""FSMDE-JAX: full surround monocular depth estimation in JAX/Flax.

An implementation of "Scale-invariant and View-relational Representation Learning for Full Surround Monocular
Depth" (arXiv 2512.08700). See README.md for use and docs/ for the conventions.
"""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str):
    """`load_model`, found when it is asked for: importing the package alone loads neither JAX nor the models."""
    if name == "load_model":
        return importlib.import_module("fsmde_jax.depth_model").load_model
    raise AttributeError(f"module 'fsmde_jax' has no attribute {name!r}")
