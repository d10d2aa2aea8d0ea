"""Problems for the kernels, their references in float64, and Adam's step as a program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_gale.pallas.back_project_apply.reference import (
    back_project_apply as back_project_apply_reference,
)
from optax_gale.pallas.project_update.reference import project_update as project_update_reference
from optax_gale.transforms.fusion import Analysis

SCALARS = {"first": 1 - 0.9**3, "second": 1 - 0.999**3, "rate": -1e-3}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """Arrays for both kernels: lists over leaves."""

    weights: list
    gradients: list
    projectors: list
    moments: list
    updates: list
    rows: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def draw(cls, shape, rank, rows, *, leaves=1, dtype=jnp.float32, state="float32", seed=0):
        *batch, m, n = shape
        subspace = (*batch, rank, n) if rows else (*batch, m, rank)
        key = jax.random.key(seed)

        def normal(shape, dtype, number, leaf):
            own = jax.random.fold_in(jax.random.fold_in(key, number), leaf)
            return jax.random.normal(own, shape, jnp.float32).astype(dtype)

        projector = (*batch, m if rows else n, rank)
        make = lambda number, shape, dtype: [
            normal(shape, dtype, number, leaf) for leaf in range(leaves)
        ]
        scale = np.float32(projector[-2]) ** -0.5
        return cls(
            make(0, shape, dtype),
            make(1, shape, dtype),
            [(p * scale).astype(dtype) for p in make(2, projector, jnp.float32)],
            [
                (0.1 * m, 1e-3 + 0.01 * jnp.square(v).astype(v.dtype))
                for m, v in zip(make(3, subspace, state), make(4, subspace, state), strict=True)
            ],
            make(5, subspace, dtype),
            rows,
        )


def adam():
    """Adam's step, ``(R, M, V, 1 - b1^t, 1 - b2^t, -lr) -> (U, M, V)``, as Optax writes it."""

    def step(leaves, state):
        (r,), (mu, nu) = leaves, state
        mu = optax.tree.update_moment(r, mu, 0.9, 1)
        nu = optax.tree.update_moment_per_elem_norm(r, nu, 0.999, 2)
        first, second, rate = (jnp.sum(jnp.float32(x)) for x in SCALARS.values())
        return [rate * (mu / first) / (jnp.sqrt(nu / second) + 1e-8)], [mu, nu], []

    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    return Analysis(step, [shape], [shape, shape], [0]).programs[0].function


def adam_numpy(r, mu, nu, *scalars):
    """The same in NumPy."""
    first, second, rate = SCALARS.values()
    mu, nu = 0.9 * mu + 0.1 * r, 0.999 * nu + 0.001 * r * r
    return rate * (mu / first) / (np.sqrt(nu / second) + 1e-8), mu, nu


def error(found, expected):
    """Relative error in the Frobenius norm; infinite where an element was not written."""
    found = np.asarray(jnp.asarray(found, jnp.float32), np.float64)
    if not np.isfinite(found).all():
        return np.inf
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


__all__ = [
    "SCALARS",
    "Problem",
    "adam",
    "adam_numpy",
    "back_project_apply_reference",
    "error",
    "project_update_reference",
]
