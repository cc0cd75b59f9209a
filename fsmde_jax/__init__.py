"""FSMDE-JAX: full surround monocular depth estimation in JAX/Flax.

An implementation of "Scale-invariant and View-relational Representation Learning for Full Surround Monocular
Depth" (arXiv 2512.08700). See README.md for use and docs/ for the conventions.
"""

__version__ = "0.1.0"
