"""The optimizer's part of a walk through the layers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_gale._averages import averaged, averaged_as, varying
from optax_gale.pallas import Implementation
from optax_gale.training import rows, stack, weights
from optax_gale.training.model import LayeredModel
from optax_gale.training.separable import check_separable
from optax_gale.training.walk import Forward, Walk
from optax_gale.transforms import trees
from optax_gale.transforms.accumulate import refuse_stateful_stages, zero_sums
from optax_gale.transforms.apply import halves_of, update_and_apply
from optax_gale.transforms.shardings import alike, first_element


class Stacks(NamedTuple):
    """Arrays with a leading axis of layers, or a layer's slices of them.

    Attributes:
      params: the stacked leaves of the parameters.
      state: the arrays of the optimizer's state that are kept layer by layer.
      sums: the stacked leaves of gradients as the inner sees them, added up.
    """

    params: list[Any]
    state: Any = ()
    sums: Any = ()

    def of_layer(self, layer: jax.Array) -> "Stacks":
        """A layer's slices."""
        taken: Stacks = stack.take_all_first(self, layer)
        return taken


class Carried(NamedTuple):
    """What a walk through the layers changes.

    Attributes:
      stacks: what every layer has of its own.
      shared: the state that layers share, by kind, after the step of any layer.
      squares: sum of the squares of gradients, float32 ``()``.
    """

    stacks: Stacks
    shared: dict[str, list[Any]]
    squares: jax.Array


class Sums(NamedTuple):
    """Gradients as the inner sees them, added up, of stacked leaves and of the others."""

    stacked: list[Any]
    others: list[Any]


class Pass:
    """One step of an optimizer, layer by layer: what it starts from, and how it goes on."""

    def __init__(
        self,
        model: LayeredModel,
        tx: optax.GradientTransformationExtraArgs,
        params: Any,
        state: Any,
        implementation: Implementation | None,
        extra_args: dict[str, Any],
        key: jax.Array | None,
        recompute: bool,
    ):
        """Takes parameters and state apart.

        Raises:
          ValueError: if they cannot be, the optimizer mixes leaves, or weights in 8 bits have no
            key to be rounded with.
        """
        if key is None and weights.any_quantized(params):
            raise ValueError(
                "Weights in 8 bits are rounded at random: give `step` a `key`, another one at "
                "every step, such as jax.random.fold_in(jax.random.key(0), step)."
            )
        self._key = key
        values = as_seen(params)
        model.split(params)  # raises where there is no stack
        self.parameters = stack.Parameters(params, model.keys)
        self.tx, self.halves = tx, halves_of(tx)
        axis_name = self.halves.axis_name
        self.walk = Walk(model, params, self.parameters, axis_name, recompute=recompute)
        check_separable(tx, values, state, self.parameters, extra_args)
        self.layout = stack.State(state, self.parameters)
        self.values = values  # of which shapes are read only, where weights are in 8 bits
        self.stacked, self.others = self.parameters.stacked(params), self.parameters.others(params)
        self.parts = self.layout.parts(state)
        self._implementation, self._extra_args = implementation, extra_args

    def check_sums(self) -> None:
        """Raises ValueError if gradients of micro-batches cannot be summed."""
        refuse_stateful_stages(self.halves, self.values)

    def forward(self, batch: Any) -> Forward:
        """The forward pass, with the weights as they were."""
        return self.walk.forward(self.stacked, batch)

    def norm(self, batch: Any, forward: Forward) -> jax.Array:
        """The gradient's norm, from a backward pass of its own."""

        def visit(carried: Carried, layer: Any, slices: Stacks, grads: list[Any]) -> Carried:
            del layer, slices
            return carried._replace(squares=carried.squares + _squares(grads))

        begin = Carried(Stacks(self.stacked), {}, self._no_squares())
        carried, of_others = self.walk.backward(batch, forward, begin, _params_of, visit)
        return self._root(carried.squares + _squares(of_others))

    def update(
        self, batch: Any, forward: Forward, factor: jax.Array | None
    ) -> tuple[Any, Any, jax.Array]:
        """Walks back, and every layer takes its step as soon as its gradient is there.

        Returns:
          The new parameters, the new state, and the gradient's norm before the factor.
        """

        def visit(carried: Carried, layer: Any, slices: Stacks, grads: list[Any]) -> Carried:
            squares, grads = _scaled(carried.squares, grads, factor)
            new, state = update_and_apply(
                self.tx,
                self.parameters.of_layer(grads),
                self._state_of(slices, layer),
                self.parameters.of_layer(as_seen(slices.params)),
                implementation=self._implementation,
                layer=layer,
                **self._extra_args,
            )
            return self._replaced(carried, layer, new, state)._replace(squares=squares)

        others, parts, begin = as_seen(self.others), dict(self.parts), self._begin()
        early = [rows.is_large(x) for x in others]
        if any(early):
            # The gradient of what only the head reads is there, and gone before the layers' are
            # made. (Of small leaves that is no gain.)
            read = self.walk.read_by_embed(batch)
            early = [large and not later for large, later in zip(early, read, strict=True)]
            grads = _where(early, self.parameters.others_by_path(forward.of_rest))
            squares, grads = _scaled(begin.squares, grads, factor)
            others, found = self._step_of_others(others, parts, grads)
            dx, squares, (others, parts["other"]) = self._after(
                (others, found["other"]), forward.dx, squares
            )
            forward, begin = forward._replace(dx=dx), begin._replace(squares=squares)
        carried, grads = self.walk.backward(batch, forward, begin, _params_of, visit)
        grads = _where([not x for x in early], grads)
        squares, grads = _scaled(carried.squares, grads, factor)
        others, parts = self._step_of_others(others, parts, grads)
        return *self._finished(carried, others, parts), self._root(squares)

    def _after(self, made: Any, dx: Any, squares: jax.Array) -> tuple[Any, jax.Array, Any]:
        """Has what is computed from ``dx`` wait until something is made; returns all three."""
        if self.halves.axis_name is None:
            # What is made comes out of the barrier again, or it would have to be copied.
            dx, squares, made = jax.lax.optimization_barrier((dx, squares, made))
            return dx, squares, made
        # All that comes out is a device's own as ``dx`` is, and new weights are not: they stay
        # outside, with a number of each in their places.
        numbers = [first_element(x) for x in jax.tree.leaves(made)]
        dx, squares, _ = jax.lax.optimization_barrier((dx, squares, numbers))
        return dx, squares, made

    def _step_of_others(
        self,
        seen: Sequence[Any],
        parts: dict[str, list[Any]],
        grads: Sequence[Any],
    ) -> tuple[list[Any], dict[str, list[Any]]]:
        """Leaves that are not stacked take their step, if they have a gradient."""
        new, state = rows.update_and_apply(
            self.tx,
            self.parameters.of_others(grads),
            self.layout.whole(parts, stack.State.OTHERS),
            self.parameters.of_others(seen),
            implementation=self._implementation,
            **self._extra_args,
        )
        found = self.layout.parts_of(state, stack.State.OTHERS)
        return jax.tree.leaves(new, is_leaf=trees.is_box), {
            kind: alike(found[kind], self.parts[kind]) for kind in stack.State.OTHERS
        }

    def zeros(self) -> Sums:
        """Gradients of zero, as the inner sees them."""
        return self._sums(self.halves.zeros(self.values))

    def averaged(self, x: Any) -> Any:
        """What differs between devices that the optimizer averages over, averaged."""
        return averaged(x, self.halves.axis_name)

    def _no_squares(self) -> jax.Array:
        return varying(jnp.zeros((), jnp.float32), self.halves.axis_name)

    def _root(self, squares: jax.Array) -> jax.Array:
        """The norm; of several devices' gradients, the root of their mean square."""
        return jnp.sqrt(self.averaged(squares))

    def zero_sums(self, dtype: Any) -> Sums:
        """Sums of no gradients, in at least float32 unless a dtype is given."""
        return self._sums(zero_sums(self.halves, self.values, dtype))

    def _sums(self, tree: Any) -> Sums:
        tree = varying(tree, self.halves.axis_name)
        return Sums(self.parameters.stacked(tree), self.parameters.others(tree))

    def add(
        self,
        batch: Any,
        forward: Forward,
        sums: Sums,
        factor: jax.Array | None,
        *,
        refresh: bool,
    ) -> tuple[Sums, dict[str, list[Any]], jax.Array]:
        """Walks back, and adds up the gradients as the inner sees them.

        Args:
          batch: the batch.
          forward: what its forward pass left.
          sums: the sums so far.
          factor: what the gradients are multiplied by, or None.
          refresh: whether projectors may be refreshed.

        Returns:
          The sums, the parts of the state after the refresh, and the norm before the factor.
        """
        asked = dict(self._extra_args) if refresh else {**self._extra_args, "refresh": False}

        def visit(carried: Carried, layer: Any, slices: Stacks, grads: list[Any]) -> Carried:
            squares, grads = _scaled(carried.squares, grads, factor)
            projected, state = self.halves.project(
                self.parameters.of_layer(grads),
                self._state_of(slices, layer),
                self.parameters.of_layer(as_seen(slices.params)),
                layer=layer,
                **asked,
            )
            carried = carried._replace(
                stacks=carried.stacks._replace(
                    sums=stack.put(carried.stacks.sums, _added(slices.sums, projected), layer)
                ),
                squares=squares,
            )
            return self._replaced(carried, layer, None, state) if refresh else carried

        carried, grads = self.walk.backward(
            batch, forward, self._begin(sums.stacked), _params_of, visit
        )
        squares, grads = _scaled(carried.squares, grads, factor)
        norm = self._root(squares)
        projected, state = self.halves.project(
            self.parameters.of_others(grads),
            self.layout.whole(self.parts, stack.State.OTHERS),
            self.parameters.of_others(as_seen(self.others)),
            **asked,
        )
        found = self.layout.parts_of(state, stack.State.OTHERS)
        parts = self._joined(carried, found) if refresh else self.parts
        return Sums(carried.stacks.sums, _added(sums.others, projected)), parts, norm

    def step(
        self, sums: Sums, factor: jax.Array | float, parts: dict[str, list[Any]], *, several: bool
    ) -> tuple[Any, Any]:
        """Every layer takes its step for sums times a factor.

        Args:
          sums: gradients as the inner sees them, added up.
          factor: what they are multiplied by.
          parts: of the state.
          several: whether they are of several micro-batches, and so more precise than gradients.

        Returns:
          The new parameters and the new state.
        """
        seen = self.zeros()  # for its dtypes
        gradients = Sums(*map(weights.dequantize_weights, (self.stacked, self.others)))
        sums = averaged_as(sums, sums if several else gradients, self.halves.axis_name)
        self.parts = parts
        extra_args = {k: v for k, v in self._extra_args.items() if k != "refresh"}

        def visit(carried: Carried, layer: jax.Array) -> tuple[Carried, None]:
            slices = carried.stacks._replace(sums=sums.stacked).of_layer(layer)
            new, state = self.halves.apply(
                self.parameters.of_layer(_times(slices.sums, factor, seen.stacked)),
                self._state_of(slices, layer),
                self.parameters.of_layer(as_seen(slices.params)),
                self._implementation,
                layer=layer,
                **extra_args,
            )
            return self._replaced(carried, layer, new, state), None

        carried, _ = jax.lax.scan(visit, self._begin(), jnp.arange(self.parameters.length))
        new, state = self.halves.apply(
            self.parameters.of_others(_times(sums.others, factor, seen.others)),
            self.layout.whole(parts, stack.State.OTHERS),
            self.parameters.of_others(as_seen(self.others)),
            self._implementation,
            **extra_args,
        )
        others = jax.tree.leaves(new, is_leaf=trees.is_box)
        return self._finished(carried, others, self.layout.parts_of(state, stack.State.OTHERS))

    def _begin(self, sums: Sequence[Any] = ()) -> Carried:
        shared = {kind: self.parts[kind] for kind in ("stack", "all")}
        stacks = Stacks(self.stacked, self.parts["layer"], list(sums))
        return Carried(stacks, shared, self._no_squares())

    def _state_of(self, slices: Stacks, layer: jax.Array) -> Any:
        # What layers share is as it was before the step: each layer's step is the same one. Only
        # what they draw is their own.
        shared = [jax.tree.map(lambda x: stack.own_key(x, layer), x) for x in self.parts["all"]]
        parts = {**self.parts, "layer": slices.state, "all": shared}
        return self.layout.whole(parts, stack.State.LAYER)

    def _replaced(self, carried: Carried, layer: jax.Array, params: Any, state: Any) -> Carried:
        """Puts the results of a layer's step into their places."""
        parts = self.layout.parts_of(state, stack.State.LAYER)
        stacks = carried.stacks._replace(
            state=stack.put(carried.stacks.state, parts["layer"], layer)
        )
        if params is not None:
            key = None if self._key is None else jax.random.fold_in(self._key, layer)
            new = jax.tree.leaves(params, is_leaf=trees.is_box)
            # Of the old ones only how they are stored is asked.
            new = weights.like(stacks.params, new, self.parameters.stacked_paths, key)
            stacks = stacks._replace(params=stack.put(stacks.params, new, layer))
        shared = {kind: parts[kind] for kind in carried.shared}
        return carried._replace(stacks=stacks, shared=alike(shared, carried.shared))

    def _joined(self, carried: Carried, others: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The parts of the new state, from the layers' and from the others'."""
        of_others = {kind: alike(others[kind], self.parts[kind]) for kind in stack.State.OTHERS}
        return {"layer": carried.stacks.state, **carried.shared, **of_others}

    def _finished(
        self, carried: Carried, others: Sequence[Any], of_others: dict[str, list[Any]]
    ) -> tuple[Any, Any]:
        """The whole parameters and the whole state."""
        parts = self._joined(carried, of_others)
        others = weights.like(self.others, others, self.parameters.other_paths, self._key)
        return self.parameters.whole(carried.stacks.params, others), self.layout.whole(
            parts, tuple(parts)
        )


def _where(chosen: Sequence[bool], leaves: Sequence[Any]) -> list[Any]:
    return [x if yes else optax.MaskedNode() for x, yes in zip(leaves, chosen, strict=True)]


def _squares(grads: Sequence[Any]) -> jax.Array:
    leaves = [g.astype(jnp.float32) for g in jax.tree.leaves(grads)]
    return sum((jnp.sum(g * g) for g in leaves), jnp.zeros((), jnp.float32))


def _scaled(
    squares: jax.Array, grads: Sequence[Any], factor: jax.Array | None
) -> tuple[jax.Array, list[Any]]:
    """The sum with the squares of gradients, and the gradients times a factor."""
    squares, grads = squares + _squares(grads), list(grads)
    if factor is None:
        return squares, grads
    # The squares are summed first: so the product can be in the gradients' place.
    squares, grads = jax.lax.optimization_barrier((squares, grads))
    return squares, [jax.tree.map(lambda x: (x * factor).astype(x.dtype), g) for g in grads]


def _times(sums: Sequence[Any], factor: jax.Array | float, like: Sequence[Any]) -> list[Any]:
    return jax.tree.map(lambda x, y: (x * factor).astype(y.dtype), list(sums), list(like))


def _added(sums: list[Any], projected: Any) -> list[Any]:
    pairs = zip(jax.tree.leaves(sums), jax.tree.leaves(projected), strict=True)
    added = [s + x.astype(s.dtype) for s, x in pairs]
    return jax.tree.unflatten(jax.tree.structure(sums), added)


def as_seen(params: Any) -> Any:
    """Weights as the optimizer sees them: in float32 where they are in 8 bits."""
    return weights.dequantize_weights(params, jnp.float32)


def _params_of(stacks: Stacks) -> list[Any]:
    return stacks.params
