"""Whether an optimizer can take its step layer by layer: read off its program, not run."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_gale.training.stack import Parameters, State
from optax_gale.transforms import dataflow, storage


def check_separable(
    tx: optax.GradientTransformationExtraArgs,
    params: Any,
    state: Any,
    parameters: Parameters,
    extra_args: Mapping[str, Any],
) -> None:
    """Raises ValueError unless every leaf's step depends on that leaf alone.

    The program is read, not run, with stacks of a single layer.
    """
    layout = State(state, parameters)
    parts = layout.parts(state)
    _check_fits(layout, parts, params, parameters)
    whole = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    first = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), tree
    )
    parts = {k: (first if k == "layer" else whole)(x) for k, x in parts.items()}
    small = parameters.whole(first(parameters.stacked(params)), whole(parameters.others(params)))
    numbers = list(range(len(parameters.paths)))

    def step(grads: Any, params: Any, parts: Any) -> Any:
        # Without the refresh, in which matrices may share a call though they do not mix.
        asked = {**extra_args, "refresh": False, "layer": jnp.zeros((), jnp.int32)}
        state = layout.whole(parts, tuple(parts))
        updates, new = tx.update(grads, state, params, **asked)
        after = layout.parts(new)
        _check_shapes(layout, parts, after)
        return parameters.leaves(updates), after

    # Of whom an array is; nobody's are those that layers share.
    owned = [
        owner if kind in ("layer", "other") else None
        for kind in sorted(parts)
        for x, (_, owner) in zip(parts[kind], layout.of_kind(kind), strict=True)
        for _ in jax.tree.leaves(x)
    ]
    try:
        found = dataflow.sources(step, (small, small, parts), [*numbers, *numbers, *owned])
    except _Refused:
        raise
    except Exception as error:
        raise ValueError(
            f"The optimizer does not take the step of a single layer: {error}. The state must come "
            "from `init` with these parameters, and the optimizer must treat the layers of a stack "
            "alike, without reshaping or rearranging leaves."
        ) from error
    _check_sources(layout, parts, parameters, found)


class _Refused(ValueError):
    """An error that says all that there is to say."""


def _check_sources(
    layout: State, parts: Any, parameters: Parameters, found: Sequence[frozenset[int]]
) -> None:
    count = len(parameters.paths)
    for i, on in enumerate(found[:count]):
        if on - {i}:
            raise _Refused(_mixes(f"The update of '{parameters.paths[i]}'", on - {i}, parameters))
    outputs = iter(found[count:])
    for kind in sorted(parts):
        for x, (name, owner) in zip(parts[kind], layout.of_kind(kind), strict=True):
            on = frozenset().union(*(next(outputs) for _ in jax.tree.leaves(x)))
            if kind in ("layer", "other") and on - {owner}:
                raise _Refused(_mixes(f"The optimizer's state{name}", on - {owner}, parameters))
            if kind in ("stack", "all") and on:
                raise _Refused(
                    f"The optimizer's state{name} depends on '{parameters.paths[min(on)]}' and is "
                    "not kept layer by layer, so layers cannot take their steps one after another. "
                    "Use a transformation that keeps it for every matrix, or put it outside of "
                    "`layerwise`."
                )


def _mixes(what: str, others: frozenset[int], parameters: Parameters) -> str:
    return (
        f"{what} depends on '{parameters.paths[min(others)]}', but layer by layer no two gradients "
        "exist at once. Take a transformation that mixes leaves out of the optimizer: for clipping "
        "by the global norm there is `clip_norm`."
    )


def _check_fits(layout: State, parts: Any, params: Any, parameters: Parameters) -> None:
    leaves = parameters.leaves(params)
    for kind in ("layer", "stack"):
        for x, (name, owner) in zip(parts[kind], layout.of_kind(kind), strict=True):
            assert owner is not None
            shape, leaf = jnp.shape(storage.unboxed(x)), jnp.shape(storage.unboxed(leaves[owner]))
            path = parameters.paths[owner]
            if kind == "stack" and len(shape) == len(leaf) and shape[1:] == leaf[1:]:
                raise _Refused(
                    f"The optimizer's state{name} has shape {shape} for '{path}' of shape {leaf}: "
                    "it was made for another number of layers. The state must come from `init` "
                    "with these parameters."
                )
            if ".projector" in name and len(shape) < 3:
                raise _Refused(
                    f"'{path}' of shape {leaf} is projected as one matrix, with the axis of layers "
                    "as one of its sides. Leave it at full rank (`select`, or a rank of None), or "
                    "say with `weight_dimension_numbers` which axes are its own."
                )


def _check_shapes(layout: State, before: Any, after: Any) -> None:
    for kind, arrays in before.items():
        rows = zip(layout.of_kind(kind), arrays, after[kind], strict=True)
        for (name, _), x, y in rows:
            shapes = [[a.shape for a in jax.tree.leaves(tree)] for tree in (x, y)]
            if shapes[0] != shapes[1]:
                raise _Refused(
                    f"The optimizer's state{name} has shape {shapes[0][0]} for a single layer, but "
                    f"its update makes {shapes[1][0]}: it treats the axis of layers as one of the "
                    "weight's own. Use a transformation that treats the layers of a stack alike."
                )
