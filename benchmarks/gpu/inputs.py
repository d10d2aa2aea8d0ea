"""The weights and gradients that all arms of a size work on."""

from typing import Any

import jax

from benchmarks.gpu import data, shapes


class Inputs:
    """Random weights and gradients of a model's matrices.

    Weights are handed from arm to arm: every step replaces them in place.
    """

    def __init__(self, size: str, layers: int, *, stacked: bool):
        """Makes the gradients."""
        self.size, self.layers, self.stacked = size, layers, stacked
        self.shapes = shapes.parameters(size, stacked=stacked, layers=layers)
        self.grads = data.normal_tree(self.shapes, seed=1)
        self._params: Any = None

    def take(self) -> Any:
        """The weights, which are then the caller's to donate."""
        params = self._params
        self._params = None
        return data.normal_tree(self.shapes, seed=0, scale=0.02) if params is None else params

    def give(self, params: Any) -> None:
        """Takes weights back. If an arm fails and does not, the next gets new ones."""
        self._params = params

    def copies(self) -> tuple[Any, Any]:
        """Weights and gradients for a rival outside JAX, which must not change them."""
        self._params = self.take()
        return jax.tree.leaves(self._params), jax.tree.leaves(self.grads)
