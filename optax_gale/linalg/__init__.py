"""Randomized linear algebra for low-rank subspaces, on ``(*batch, m, n)`` arrays.

Pure functions, compiled, batched over leading axes, safe for any input: tiny, huge, rank-deficient,
zero or not finite. They run on matrices whose axes are sharded, on Auto and Explicit meshes.
"""

from optax_gale._products import einsum
from optax_gale.linalg._split import split_einsum
from optax_gale.linalg.orthonormalize import OrthonormalizeMethod, orthonormalize
from optax_gale.linalg.randomized_svd import randomized_svd
from optax_gale.linalg.range_finder import random_range, range_finder, range_finders, svd_range
from optax_gale.linalg.sketch import SketchKind, gaussian, make_sketch, rademacher
from optax_gale.linalg.subspaces import captured_energy, principal_angles

__all__ = [
    "OrthonormalizeMethod",
    "SketchKind",
    "captured_energy",
    "einsum",
    "gaussian",
    "make_sketch",
    "orthonormalize",
    "principal_angles",
    "rademacher",
    "random_range",
    "randomized_svd",
    "range_finder",
    "range_finders",
    "split_einsum",
    "svd_range",
]
