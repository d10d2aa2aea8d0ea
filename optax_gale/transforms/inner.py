"""What the wrapper must know of its inner.

An Optax transformation is a pair of functions: it cannot be asked whether it decays the weights or
which way its updates point. But its programs can be read, differentiated, and run on a few numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_gale import _sharding
from optax_gale.transforms import dataflow, shardings

_REMEDY = (
    "Put it outside the wrapper instead (for example schedule_free(gale(...)), or "
    "optax_gale.chain(gale_project(...), scale_by_adam(), ...) without it), or use an inner whose "
    "update depends on the parameters only through decoupled weight decay."
)


def decayed_update(
    inner: optax.GradientTransformationExtraArgs,
    grads: Any,
    inner_state: Any,
    params: Any,
    projected: Sequence[bool],
    extra_args: dict[str, Any],
) -> tuple[Any, Any, list[jax.Array | None]]:
    """Runs the inner, and separates the weight decay from its update.

    The update of a projected leaf is affine in its parameter, ``U(p) = U(0) + c p``, with a scalar
    c (``-lr * weight_decay``, or 0 where a mask says so). U(0) is the update that belongs to the
    subspace; c is the derivative with respect to the parameter along ones, and applies to the
    whole weight. Compilers fold it to the scalar that it is.

    Args:
      inner: the inner.
      grads: its gradients, projected leaves in their subspace.
      inner_state: its state.
      params: its parameters; the values of projected leaves do not matter.
      projected: which leaves are projected.
      extra_args: what else the inner's update takes.

    Returns:
      U(0) as a tree like ``grads``, the new state, and c for every leaf, float32; None for
      leaves that are not projected.
    """
    leaves, treedef = jax.tree.flatten(params)
    zeros = [
        jnp.zeros_like(x) for x, is_projected in zip(leaves, projected, strict=True) if is_projected
    ]

    def run(subspace_params):
        values = iter(subspace_params)
        merged = [next(values) if p else x for x, p in zip(leaves, projected, strict=True)]
        updates, state = inner.update(
            grads, inner_state, jax.tree.unflatten(treedef, merged), **extra_args
        )
        return updates, state

    updates, tangents, new_state = jax.jvp(
        run, (zeros,), ([jnp.ones_like(z) for z in zeros],), has_aux=True
    )
    coefficients = [
        shardings.first_element(c).astype(jnp.float32) if is_projected else None
        for c, is_projected in zip(jax.tree.leaves(tangents), projected, strict=True)
    ]
    return updates, new_state, coefficients


def examine(
    inner: optax.GradientTransformationExtraArgs, state: Any, tree: Any, projected: Sequence[bool]
) -> None:
    """Checks that the inner works in a subspace: what it does with the parameters' values.

    Its programs are read, not run: the answer holds for all values and steps.

    Args:
      inner: the inner.
      state: what its `init` made for ``tree``.
      tree: the parameters as the inner sees them.
      projected: which leaves are projected.

    Raises:
      ValueError: if a parameter's value finds its way into the inner's state, or its update of a
        projected leaf depends on the parameter otherwise than through ``U(p) = U(0) + c p``.
    """
    if not any(projected):
        return
    names = ", ".join(sorted(state_names(state))) or "no named state"
    numbers = [i if p else None for i, p in enumerate(projected)]

    def update(params, grads, state):
        return inner.update(grads, state, params, value=jnp.ones(()))

    watched = [*numbers, *[None] * (len(numbers) + len(jax.tree.leaves(state)))]
    try:
        of_init = dataflow.dependences(inner.init, (tree,), numbers)
        of_updates, of_state = dataflow.dependences(update, (tree, tree, state), watched)
    except jax.errors.JAXTypeError as error:
        raise ValueError(
            f"The inner ({names}) cannot be compiled: {error} Arguments that it needs as Python "
            "values must not be injected; name them in static_args=(...) of "
            "`optax.inject_hyperparams`."
        ) from error
    except Exception as error:
        raise ValueError(
            f"The inner ({names}) does not run on subspaces alone: {error}. If it evaluates the "
            "loss or its curvature at the whole parameters (line searches, Hessians), or needs an "
            "argument of its own, put it outside the wrapper."
        ) from error
    _refuse_copies(names, (of_init, of_state))
    for i, found in enumerate(_dependences(of_updates)):
        if found.on is not None and not (projected[i] and found.is_affine_in == i):
            raise ValueError(
                f"The inner ({names}) uses the parameters otherwise than for decoupled weight "
                f"decay, and in a subspace there are none to use. {_REMEDY}"
            )


def _dependences(tree: Any) -> list[dataflow.Dependence]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, dataflow.Dependence))


def _refuse_copies(names: str, of_state: Any) -> None:
    if any(x.on is not None for x in _dependences(of_state)):
        raise ValueError(
            f"The inner ({names}) keeps the parameters' values in its state, as a copy or inside "
            "an average (L2 regularisation before the moments, for example), and a subspace does "
            f"not have them. {_REMEDY}"
        )


def probe(
    inner: optax.GradientTransformationExtraArgs,
    tree: Any,
    projected: Sequence[bool],
    size: float,
) -> Any | None:
    """The inner's state after one step on a few numbers, with gradients of the given size.

    None where its hyperparameters are traced.
    """
    random = np.random.default_rng(0)
    sample = lambda shape: size * random.uniform(1.0, 2.0, shape)
    try:
        with _sharding.concrete():
            zeros, grads = (_small(tree, projected, make) for make in (np.zeros, sample))
            state = inner.update(grads, inner.init(zeros), zeros, value=jnp.ones(()))[1]
    except jax.errors.JAXTypeError:
        return None
    is_traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(state))
    return None if is_traced else state


def direction(
    inner: optax.GradientTransformationExtraArgs, tree: Any, projected: Sequence[bool]
) -> jax.Array | float:
    """The sign of the inner's update along a gradient: -1 for an optimizer, +1 for a `scale_by_*`.

    It is that of the first step that moves at all, among the first ones and those that are powers
    of two: a learning rate may rise from zero, and an accumulation moves once in a while. An inner
    that never moves has 0.
    """
    try:
        with _sharding.concrete():
            return float(_direction(inner, tree, projected, 1024))
    except jax.errors.JAXTypeError:  # a traced hyperparameter
        return _direction(inner, tree, projected, 64)


def _direction(inner, tree, projected, steps: int) -> jax.Array:
    ones = _small(tree, projected, np.ones)
    zeros = _small(tree, projected, np.zeros)

    def sign(count):
        state = _advance(inner.init(zeros), count)
        updates = inner.update(ones, state, zeros, value=jnp.ones(()))[0]
        of_projected = zip(jax.tree.leaves(updates), projected, strict=True)
        return jnp.sign(sum(jnp.sum(u) for u, p in of_projected if p))

    counts = np.concatenate([np.arange(steps), 2 ** np.arange(10, 31)])
    signs = jax.vmap(sign)(jnp.asarray(counts, jnp.int32))
    return signs[jnp.argmax(signs != 0)]


def _small(tree: Any, projected: Sequence[bool], make: Callable[[tuple[int, ...]], Any]) -> Any:
    """A tree of the same structure and dtypes with a few numbers a leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    shapes = [
        (1,) * (len(x.shape) - 2) + (2, 3) if p else (1,) * len(x.shape)
        for x, p in zip(leaves, projected, strict=True)
    ]
    arrays = [
        jnp.asarray(make(s), jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)
        for s, x in zip(shapes, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, arrays)


def _advance(state: Any, steps: int) -> Any:
    """The state with its step counters moved on, so that schedules are past their warm-up."""
    is_counter = lambda x: jnp.ndim(x) == 0 and jnp.issubdtype(jnp.asarray(x).dtype, jnp.integer)
    return jax.tree.map(lambda x: x + steps if is_counter(x) else x, state)


def state_names(state: Any) -> set[str]:
    """Class names of the named tuples in a state: what a person knows an inner by."""
    names: set[str] = set()

    def visit(x):
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            names.add(type(x).__name__)
            for child in x:
                visit(child)
        elif isinstance(x, (tuple, list)):
            for child in x:
                visit(child)
        elif isinstance(x, dict):
            for child in x.values():
                visit(child)

    visit(state)
    return names - {"MaskedNode", "EmptyState"}
