"""The library's equations in float64 NumPy, and what runs both sides of a comparison."""

from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

Tree = Any


def project(p: np.ndarray, g: np.ndarray, rows: bool) -> np.ndarray:
    return np.swapaxes(p, -1, -2) @ g if rows else g @ p


def lift(p: np.ndarray, u: np.ndarray, rows: bool) -> np.ndarray:
    return p @ u if rows else u @ np.swapaxes(p, -1, -2)


class Adam:
    """Adam's direction, without a learning rate."""

    def __init__(self, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8):
        self.b1, self.b2, self.eps = b1, b2, eps
        self.m = self.v = 0.0
        self.t = 0

    def __call__(self, g: np.ndarray) -> np.ndarray:
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        m = self.m / (1 - self.b1**self.t)
        v = self.v / (1 - self.b2**self.t)
        return m / (np.sqrt(v) + self.eps)


def _mixture(columns: int, rank: int) -> np.ndarray:
    return np.cos(1.0 + np.outer(np.arange(columns), np.arange(1, rank + 1)))


def fixed_sketch(x, *, rank, key, previous):
    """A range finder with a twin in NumPy: a sketch with a fixed matrix, and Householder's QR."""
    del key, previous
    y = jnp.einsum("...mn,nr->...mr", x, _mixture(x.shape[-1], rank), precision="highest")
    q, r = jnp.linalg.qr(y)
    return q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[..., None, :]


def fixed_sketch_numpy(x: np.ndarray, rank: int) -> np.ndarray:
    q, r = np.linalg.qr(x @ _mixture(x.shape[-1], rank))
    return q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]


def turned(x, *, rank, key, previous):
    """A range finder that costs next to nothing: the old subspace, turned."""
    del x, rank, key
    d = previous.shape[-2]
    turn, _ = np.linalg.qr(np.cos(1.0 + np.outer(np.arange(d), np.arange(1, d + 1))) + np.eye(d))
    return jnp.einsum("de,...er->...dr", turn.astype(np.float32), previous, precision="highest")


class Problem:
    """Noisy quadratics: the gradient of every weight at a step is ``W - target + noise[step]``."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], steps: int, seed: int = 0, noise=1.0):
        rng = np.random.default_rng(seed)
        draw = lambda shape: rng.normal(size=shape).astype(np.float32)
        self.steps = steps
        self.params = {k: draw(s) for k, s in shapes.items()}
        self.target = {k: draw(s) for k, s in shapes.items()}
        self.noise = {k: np.float32(noise) * draw((steps, *s)) for k, s in shapes.items()}

    def grads(self, params: Tree, step) -> Tree:
        return {k: params[k] - self.target[k] + self.noise[k][step] for k in self.params}

    def run(self, tx: optax.GradientTransformation) -> Iterator[tuple[Tree, Any]]:
        """Parameters and state after every step."""
        noise = jax.tree.map(jnp.asarray, self.noise)

        @jax.jit
        def advance(params, state, step):
            grads = {k: params[k] - self.target[k] + noise[k][step] for k in params}
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(jnp.asarray, self.params)
        state = tx.init(params)
        for step in range(self.steps):
            params, state = advance(params, state, step)
            yield params, state

    def run_numpy(self, update: Callable[[str, int, np.ndarray, np.ndarray], np.ndarray]) -> Tree:
        """Parameters after the last step of ``W += update(name, step, W, G)`` in float64."""
        params = {k: w.astype(np.float64) for k, w in self.params.items()}
        for step in range(self.steps):
            grads = self.grads(params, step)
            params = {k: w + update(k, step, w, grads[k]) for k, w in params.items()}
        return params

    def moved(self, params: Tree) -> Tree:
        """How far the weights have come: what an optimizer did, whatever it started from."""
        return {k: np.asarray(w, np.float64) - self.params[k] for k, w in params.items()}


def last(trajectory: Iterator[tuple[Tree, Any]]) -> tuple[Tree, Any]:
    *_, end = trajectory
    return end


def assert_trees_close(actual: Tree, expected: Tree, tolerance: float) -> None:
    """Every leaf agrees up to ``tolerance`` times its largest entry."""
    as64 = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    actual, expected = as64(actual), as64(expected)
    sizes = jax.tree.map(lambda x: max(np.abs(x).max(), 1e-300), expected)
    divide = lambda tree: jax.tree.map(np.divide, tree, sizes)
    chex.assert_trees_all_close(divide(actual), divide(expected), rtol=0, atol=tolerance)


def moments_of(state: Any, name: str) -> Tree:
    """The trees in a state's fields of one name, joined."""
    found = {}
    for path, x in jax.tree_util.tree_flatten_with_path(state)[0]:
        fields = [getattr(key, "name", None) for key in path]
        if name in fields:
            rest = path[fields.index(name) + 1 :]
            found[jax.tree_util.keystr(rest, simple=True, separator="/")] = x
    return found
