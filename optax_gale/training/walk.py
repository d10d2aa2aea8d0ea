"""The forward and the backward pass of a layered model, one layer at a time."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_gale._averages import AxisName, varying
from optax_gale.training import stack, weights
from optax_gale.training.model import LayeredModel, element
from optax_gale.training.residuals import Residuals
from optax_gale.transforms import dataflow, storage


class Forward(NamedTuple):
    """What a forward pass leaves for the backward one.

    Attributes:
      loss: the loss.
      kept: of the layers, ``(L, ...)`` each: their inputs, or all that their derivatives read.
      of_rest: gradient of the parameters that are not stacked, through the head.
      dx: gradient of the last layer's output.
    """

    loss: jax.Array
    kept: Any
    of_rest: Any
    dx: Any


class Walk:
    """The passes through one model."""

    def __init__(
        self,
        model: LayeredModel,
        params: Any,
        parameters: stack.Parameters,
        axis_name: AxisName = None,
        *,
        recompute: bool = True,
    ):
        """Takes the parameters apart.

        Args:
          model: the model.
          params: its parameters.
          parameters: where the stacked ones are.
          axis_name: along which gradients are each device's own.
          recompute: whether the backward pass computes activations again from a layer's input.
        """
        self._model, self._parameters, self._axis_name = model, parameters, axis_name
        self._residuals = None if recompute else Residuals()
        rest, blocks = model.split(params)
        self._rest = varying(weights.dequantize_weights(rest), axis_name)
        self._treedef = jax.tree.structure(blocks, is_leaf=storage.is_stored)

    def forward(self, stacked: Sequence[Any], batch: Any) -> Forward:
        """Runs all layers, and the head forwards and backwards.

        Args:
          stacked: the stacked leaves.
          batch: the batch.

        Returns:
          What `backward` needs.

        Raises:
          ValueError: if a piece of the model does not return what `LayeredModel` says.
        """
        x = self._model.embed(self._rest, batch)
        self._check(x, stacked, batch)

        def layer(x: Any, i: jax.Array) -> tuple[Any, Any]:
            values = self._values(stacked, i)
            if self._residuals is None:
                return self._run(values, x, batch, i), x
            params = self._elements(varying(values, self._axis_name))
            run = lambda params, x: self._model.block(params, x, batch, i)
            y, pull_back = jax.vjp(run, params, x)
            return y, self._residuals.taken(pull_back, (params, batch, i), i)

        x, kept = jax.lax.scan(layer, x, jnp.arange(self._parameters.length))

        def head(rest: Any, x: Any) -> jax.Array:
            loss = self._model.head(rest, x, batch)
            is_array = isinstance(loss, jax.Array)
            if not is_array or loss.ndim or not jnp.issubdtype(loss.dtype, jnp.floating):
                given = f"{loss.dtype} {loss.shape}" if is_array else type(loss).__name__
                raise ValueError(
                    f"`head` must return the loss and nothing else, an array of one float: got "
                    f"{given}."
                )
            return loss

        loss, (of_rest, dx) = jax.value_and_grad(head, argnums=(0, 1))(self._rest, x)
        return Forward(loss, kept, of_rest, dx)

    def read_by_embed(self, batch: Any) -> list[bool]:
        """For every leaf that is not stacked, whether ``embed`` depends on it.

        The gradient of the others is known after the head.
        """
        leaves = jax.tree.leaves(self._rest, is_leaf=storage.is_stored)
        watched: list[int | None] = [i for i, x in enumerate(leaves) for _ in jax.tree.leaves(x)]
        watched += [None] * len(jax.tree.leaves(batch))
        on = frozenset().union(*dataflow.sources(self._model.embed, (self._rest, batch), watched))
        numbers = iter(range(len(leaves)))
        is_read = jax.tree.map(lambda _: next(numbers) in on, self._rest, is_leaf=storage.is_stored)
        return self._parameters.others_by_path(is_read)

    def backward(
        self,
        batch: Any,
        forward: Forward,
        carried: Any,
        stacked_of: Callable[[Any], Sequence[Any]],
        visit: Callable[[Any, jax.Array, Any, list[Any]], Any],
    ) -> tuple[Any, list[Any]]:
        """Walks from the last layer to the first.

        Args:
          batch: the batch.
          forward: what the forward pass left.
          carried: what changes on the way, and more; ``carried.stacks`` has arrays with a leading
            axis of layers, and gives their slices ``of_layer(i)``.
          stacked_of: finds the stacked leaves of the parameters in such a tree.
          visit: ``(carried, layer, slices, grads) -> carried``, called with a layer's slices of
            ``carried.stacks`` and the gradients of its leaves, ``(1, ...)`` each.

        Returns:
          ``carried``, and the gradients of the leaves that are not stacked.
        """

        def layer(state: tuple[Any, Any], given: tuple[jax.Array, Any]) -> tuple[Any, None]:
            carried, dx = state
            i, kept = given
            slices = carried.stacks.of_layer(i)
            leaves = varying(weights.dequantize_weights(stacked_of(slices)), self._axis_name)
            grads, dx = self._pulled_back(leaves, kept, batch, i, dx)
            return (visit(carried, i, slices, grads), dx), None

        steps = (jnp.arange(self._parameters.length), forward.kept)
        (carried, dx), _ = jax.lax.scan(layer, (carried, forward.dx), steps, reverse=True)
        _, pull_back = jax.vjp(lambda rest: self._model.embed(rest, batch), self._rest)
        of_rest = jax.tree.map(jnp.add, forward.of_rest, pull_back(dx)[0])
        return carried, self._parameters.others_by_path(of_rest)

    def _pulled_back(
        self, leaves: list[Any], kept: Any, batch: Any, i: jax.Array, dx: Any
    ) -> tuple[list[Any], Any]:
        """Gradients of a layer's leaves and of its input, from that of its output."""
        if self._residuals is None:
            run = lambda leaves, x: self._run(leaves, x, batch, i)
            return jax.vjp(run, leaves, kept)[1](dx)
        params, as_leaves = jax.vjp(self._elements, leaves)
        grads, dx = self._residuals.pull_back(kept, (params, batch, i))(dx)
        return as_leaves(grads)[0], dx

    def _values(self, stacked: Sequence[Any], i: jax.Array) -> Any:
        return weights.dequantize_weights(stack.take(stacked, i))

    def _run(self, leaves: Sequence[Any], x: Any, batch: Any, i: jax.Array) -> Any:
        """One layer, from slices of the stacked leaves."""
        return self._model.block(self._elements(leaves), x, batch, i)

    def _elements(self, leaves: Sequence[Any]) -> Any:
        """The parameters of one layer."""
        return jax.tree.unflatten(self._treedef, [element(leaf) for leaf in leaves])

    def _check(self, x: Any, stacked: Sequence[Any], batch: Any) -> None:
        wrong = [a.dtype for a in jax.tree.leaves(x) if not jnp.issubdtype(a.dtype, jnp.floating)]
        if wrong:
            raise ValueError(
                f"`embed` must return floating arrays only, got {wrong[0]}. What is not to be "
                "differentiated, such as positions and masks, goes into the batch, which `block` "
                "gets too."
            )
        i = jnp.zeros((), jnp.int32)
        run = lambda stacked, x: self._run(self._values(stacked, i), x, batch, i)
        form = lambda tree: jax.tree.map(lambda a: f"{a.dtype} {a.shape}", tree)
        out = form(jax.eval_shape(run, stacked, x))
        if out != form(x):
            raise ValueError(
                "`block` must return the shapes and dtypes of its input, so that layers can follow "
                f"each other: got {out} for {form(x)}."
            )
