"""An elementwise program as Mosaic GPU can run it: what concerns scalars only is taken out."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_gale.pallas.dispatch import UnsupportedError
from optax_gale.pallas.elementwise import Constant, Elementwise, Operation, wide


class _Substitute(NamedTuple):
    """Stands in for a primitive that the compiler lacks."""

    name: str
    bind: Callable[..., Any]


def _sqrt(x: Any, **_: Any) -> Any:
    # Zero and infinity are their own roots, and no product with their inverses.
    root = x * lax.rsqrt(x)
    return lax.select(x == _like(0, x), x, lax.select(x == _like(jnp.inf, x), x, root))


def _is_finite(x: Any, **_: Any) -> Any:
    return lax.abs(x) < _like(jnp.inf, x)


def _like(value: float, x: Any) -> Any:
    return jnp.full(x.shape, value, x.dtype)


_SUBSTITUTES = {
    "sqrt": _sqrt,
    "is_finite": _is_finite,
    "copy": lambda x, **_: x,
}
_MISSING = frozenset({"pow"})


def lowerable(
    inner: Elementwise, scalars: Sequence[Sequence[jax.Array]]
) -> tuple[Elementwise, jax.Array]:
    """Computes what a program computes from scalars alone, ahead of a kernel.

    Args:
      inner: a program.
      scalars: its scalars, for each leaf.

    Returns:
      The program that is left, and its scalars, ``(leaves, scalars)`` in float32 with at least one
      column.

    Raises:
      UnsupportedError: if what is left cannot run in a kernel.
    """
    values = [_scalar_values(inner, numbers) for numbers in scalars]
    known = values[0]
    first = inner.arrays + inner.scalars
    rest = [
        (first + i, operation)
        for i, operation in enumerate(inner.operations)
        if first + i not in known
    ]
    used = [x for _, operation in rest for x in operation.operands if not isinstance(x, Constant)]
    kept = sorted({x for x in (*used, *inner.outputs) if x in known})
    if any(x in known for x in inner.outputs):
        raise UnsupportedError("project_update: an output of `inner` depends on scalars only.")
    for x in kept:
        if known[x].dtype != jnp.float32:
            raise UnsupportedError(
                f"project_update: `inner` uses a scalar of dtype {known[x].dtype}; "
                "kernels take float32."
            )
    place = {x: x for x in range(inner.arrays)}
    place |= {x: inner.arrays + i for i, x in enumerate(kept)}
    place |= {x: inner.arrays + len(kept) + i for i, (x, _) in enumerate(rest)}
    operations = tuple(_moved(operation, place) for _, operation in rest)
    outputs = tuple(place[x] for x in inner.outputs)
    program = Elementwise(inner.arrays, len(kept), operations, outputs)
    numbers = [[leaf[x] for x in kept] or [jnp.float32(0)] for leaf in values]
    return program, jnp.stack([jnp.stack(x) for x in numbers])


def _scalar_values(inner: Elementwise, scalars: Sequence[jax.Array]) -> dict[int, Any]:
    """All values of a program that depend on no array, by where they stand."""
    values: dict[int, Any] = {}
    for i, x in enumerate(scalars):
        x = jnp.asarray(x)
        values[inner.arrays + i] = x.astype(wide(x.dtype))
    for i, operation in enumerate(inner.operations):
        operands = operation.operands
        if all(isinstance(x, Constant) or x in values for x in operands):
            position = inner.arrays + inner.scalars + i
            inputs = [
                jnp.asarray(x.value, wide(x.dtype)) if isinstance(x, Constant) else values[x]
                for x in operands
            ]
            # A program of scalars alone, whose first array is a scalar too.
            alone = operation._replace(operands=tuple(range(len(inputs))))
            (values[position],) = Elementwise(len(inputs), 0, (alone,), (len(inputs),))(inputs, [])
    return values


def _moved(operation: Operation, place: dict[int, int]) -> Operation:
    name = operation.primitive.name
    if name in _MISSING:
        raise UnsupportedError(f"project_update: the compiler of Mosaic GPU has no {name!r}.")
    primitive = operation.primitive
    if name in _SUBSTITUTES:
        primitive = _Substitute(name, _SUBSTITUTES[name])
    operands = tuple(x if isinstance(x, Constant) else place[x] for x in operation.operands)
    return operation._replace(primitive=primitive, operands=operands)
