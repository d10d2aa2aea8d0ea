"""What a layer's derivative needs of its forward pass, besides its parameters."""

from typing import Any

import jax


class Residuals:
    """Takes a layer's pull-back apart, and puts it together again.

    `jax.vjp` gives a function that holds all that the derivative reads: activations, but weights,
    too. Kept for every layer, those would be a second copy of the model. Here they stay out, and
    come in again when the layer is walked through backwards.
    """

    def __init__(self) -> None:
        """Starts before the forward pass is traced."""
        self._treedef: Any = None
        self._places: list[tuple[str, Any]] = []

    def taken(self, pull_back: Any, known: Any, layer: jax.Array) -> list[jax.Array]:
        """The arrays to be kept, of what a pull-back holds.

        Args:
          pull_back: of `jax.vjp`.
          known: a tree of arrays that will be there without being kept.
          layer: the layer's number, which differs between layers.
        """
        leaves, self._treedef = jax.tree.flatten(pull_back)
        numbers = {id(x): number for number, x in enumerate(jax.tree.leaves(known))}
        self._places = []
        kept: list[jax.Array] = []
        of_kept: dict[int, int] = {}
        for x in leaves:
            if id(x) in numbers:
                self._places.append(("known", numbers[id(x)]))
            elif _trace(x) is _trace(layer):
                if id(x) not in of_kept:
                    of_kept[id(x)] = len(kept)
                    kept.append(x)
                self._places.append(("kept", of_kept[id(x)]))
            else:  # made outside of the loop over layers: the same for all
                self._places.append(("constant", x))
        return kept

    def pull_back(self, kept: list[jax.Array], known: Any) -> Any:
        """The pull-back, of arrays that were kept and those that are there."""
        given = {"kept": kept, "known": jax.tree.leaves(known)}
        leaves = [x if kind == "constant" else given[kind][x] for kind, x in self._places]
        return jax.tree.unflatten(self._treedef, leaves)


def _trace(x: Any) -> Any:
    """What traces a value; None of one that is there, as all are under `jax.disable_jit`."""
    return getattr(x, "_trace", None)
