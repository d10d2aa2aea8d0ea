"""A model made of a stack of equal blocks, as three functions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_gale.training import weights
from optax_gale.transforms import storage, trees


@dataclasses.dataclass(frozen=True)
class LayeredModel:
    """A loss in three pieces, of which the middle one is repeated for every layer of a stack.

    ``loss = head(rest, block(layer_L, ... block(layer_1, embed(rest, batch))), batch)``, where the
    parameters of all layers are stacked along a leading axis of length L, as ``nn.scan`` and
    `jax.vmap` of an initialiser make them.

    Attributes:
      embed: ``(rest, batch) -> x``: the first layer's input, an array or a tree of arrays, floating
        types only. ``rest`` is the parameters without ``layers``.
      block: ``(params, x, batch, layer) -> x``: one layer, with its parameters (no leading axis)
        and its number, int32 ``()``. The result has the shapes and dtypes of ``x``.
      head: ``(rest, x, batch) -> loss``: a float scalar, the mean over the batch.
      layers: place of the stacked parameters in the tree of mappings: a key, keys joined by "/", or
        a tuple of keys.

    Example:
      >>> import jax.numpy as jnp, optax_gale
      >>> model = optax_gale.LayeredModel(
      ...     embed=lambda rest, batch: batch["x"] @ rest["embed"],
      ...     block=lambda p, x, batch, layer: x + jnp.tanh(x @ p["kernel"]),
      ...     head=lambda rest, x, batch: jnp.mean((x @ rest["head"] - batch["y"]) ** 2),
      ... )
      >>> params = {
      ...     "embed": jnp.ones((3, 8)),
      ...     "layers": {"kernel": jnp.ones((4, 8, 8))},
      ...     "head": jnp.ones((8, 1)),
      ... }
      >>> model.loss(params, {"x": jnp.ones((2, 3)), "y": jnp.ones((2, 1))}).shape
      ()
    """

    embed: Callable[..., Any]
    block: Callable[..., Any]
    head: Callable[..., jax.Array]
    layers: str | tuple[str, ...] = "layers"

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that lead to the stacked parameters."""
        return tuple(self.layers.split("/")) if isinstance(self.layers, str) else self.layers

    def split(self, params: Any) -> tuple[Any, Any]:
        """Takes parameters apart.

        Returns:
          ``rest``, a dict without the stacked parameters, and those.

        Raises:
          ValueError: if there are none at ``layers``.
        """
        return _taken_out(params, list(self.keys), "/".join(self.keys))

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """The loss, differentiable as usual: activations are kept between layers only.

        Args:
          params: all parameters; those in 8 bits are read layer by layer, and have no derivative.
          batch: what ``embed``, ``block`` and ``head`` read.

        Returns:
          A scalar.
        """
        rest, stack = self.split(params)
        rest = weights.dequantize_weights(rest)

        @jax.checkpoint
        def layer(x: Any, given: tuple[Any, jax.Array]) -> tuple[Any, None]:
            params = jax.tree.map(element, given[0], is_leaf=storage.is_stored)
            return self.block(params, x, batch, given[1]), None

        numbers = jnp.arange(jax.tree.leaves(stack)[0].shape[0])
        # Slices of length 1, so that boxes still have a name for the axis of layers.
        sliced = jax.tree.map(lambda x: x[:, None], stack)
        x, _ = jax.lax.scan(layer, self.embed(rest, batch), (sliced, numbers))
        return self.head(rest, x, batch)


def element(leaf: Any) -> Any:
    """The parameter of one layer, from a slice of length 1; in its box, and not in 8 bits."""
    leaf = weights.dequantize_weights(leaf)
    box = leaf if trees.is_box(leaf) else None
    names = trees.box_names(box)
    return trees.rebox(box, trees.unbox(leaf)[0], None if names is None else names[1:])


def _taken_out(tree: Any, keys: list[str], path: str) -> tuple[Any, Any]:
    first, *others = keys
    if not isinstance(tree, Mapping) or first not in tree:
        found = sorted(map(str, tree)) if isinstance(tree, Mapping) else type(tree).__name__
        raise ValueError(
            f"`layers` must be where the stacked parameters are, a key of the parameters or keys "
            f"joined by '/': there is no '{first}' of '{path}' in {found}."
        )
    rest = {key: value for key, value in tree.items() if key != first}
    if not others:
        return rest, tree[first]
    rest[first], stack = _taken_out(tree[first], others, path)
    return rest, stack
