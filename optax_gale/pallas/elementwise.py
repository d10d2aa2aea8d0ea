"""Elementwise functions as short programs, which kernels can run on tiles of their arrays."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Primitives with one output whose elements depend on the operands' same elements only.
PRIMITIVES = frozenset(
    {"abs", "add", "add_any", "and", "clamp", "convert_element_type", "copy", "div", "eq", "exp"}
    | {"ge", "gt", "integer_pow", "is_finite", "le", "log", "lt", "max", "min", "mul", "ne", "neg"}
    | {"not", "or", "pow", "rsqrt", "select_n", "sign", "sqrt", "square", "sub", "tanh"}
)


class Operation(NamedTuple):
    """One primitive of a program.

    Attributes:
      primitive: the JAX primitive, one of `PRIMITIVES`.
      params: its parameters, as sorted pairs.
      operands: where its operands stand: arrays, then scalars, then results of operations; Python
        numbers stand for themselves as ``Constant``.
      dtype: of the result.
    """

    primitive: Any
    params: tuple[tuple[str, Any], ...]
    operands: tuple[Any, ...]
    dtype: Any


class Constant(NamedTuple):
    """A number written into a program."""

    value: float | int | bool
    dtype: Any


class Elementwise(NamedTuple):
    """An elementwise function of arrays of one shape and of scalars.

    Half precision is computed in float32, and rounded where it leaves the program.

    Attributes:
      arrays: how many arrays it takes.
      scalars: how many scalars, which follow the arrays.
      operations: the program.
      outputs: which values it returns.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_gale.pallas.elementwise import Elementwise, Operation
      >>> double = Operation(jax.lax.mul_p, (), (0, 1), jnp.float32)
      >>> program = Elementwise(1, 1, (double,), (2,))
      >>> program([jnp.ones(3)], [jnp.float32(2)])[0].tolist()
      [2.0, 2.0, 2.0]
    """

    arrays: int
    scalars: int
    operations: tuple[Operation, ...]
    outputs: tuple[int, ...]

    def __call__(self, arrays: Sequence[Any], scalars: Sequence[Any]) -> list[jax.Array]:
        """Runs the program.

        Args:
          arrays: arrays, or tiles, of one shape.
          scalars: scalars.

        Returns:
          The outputs, of the arrays' shape; half precision as float32.
        """
        shape = arrays[0].shape
        values = [_widened(x) for x in (*arrays, *scalars)]
        for operation in self.operations:
            operands = [
                _constant(x) if isinstance(x, Constant) else values[x] for x in operation.operands
            ]
            values.append(_apply(operation, operands, shape))
        return [_broadcast(values[i], shape) for i in self.outputs]


def wide(dtype: Any) -> Any:
    """The dtype in which a program computes what its author computes in ``dtype``."""
    half = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    return jnp.dtype(jnp.float32 if half else dtype)


def _widened(x: Any) -> Any:
    return x if x.dtype == wide(x.dtype) else x.astype(wide(x.dtype))


def _constant(x: Constant) -> jax.Array:
    return jnp.asarray(x.value, wide(x.dtype))


def _broadcast(x: Any, shape: tuple[int, ...]) -> Any:
    return x if x.shape == shape else jnp.broadcast_to(x, shape)


def _apply(operation: Operation, operands: list[Any], shape: tuple[int, ...]) -> Any:
    if operation.primitive.name == "convert_element_type":
        return operands[0].astype(wide(operation.dtype))
    if any(x.shape for x in operands):
        operands = [_broadcast(x, shape) for x in operands]
    return operation.primitive.bind(*operands, **dict(operation.params))
