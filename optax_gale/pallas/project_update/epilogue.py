"""Elementwise programs as source text for Triton."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from optax_gale.pallas.dispatch import UnsupportedError
from optax_gale.pallas.elementwise import Constant, Elementwise, Operation, wide

# Expressions of primitives whose text does not depend on dtypes or parameters. Division, `tl.exp`
# and `tl.sqrt` are within two units in the last place; `tl.log` is not, near 1.
_EXPRESSIONS = {
    "abs": "tl.abs({0})",
    "add": "{0} + {1}",
    "add_any": "{0} + {1}",
    "and": "{0} & {1}",
    "copy": "{0}",
    "eq": "{0} == {1}",
    "exp": "tl.exp({0})",
    "ge": "{0} >= {1}",
    "gt": "{0} > {1}",
    "is_finite": 'tl.abs({0}) < float("inf")',
    "le": "{0} <= {1}",
    "log": "libdevice.log({0})",
    "lt": "{0} < {1}",
    "mul": "{0} * {1}",
    "ne": "{0} != {1}",
    "neg": "-{0}",
    "not": "~{0}",
    "or": "{0} | {1}",
    "rsqrt": "tl.rsqrt({0})",
    "sqrt": "tl.sqrt({0})",
    "square": "{0} * {0}",
    "sub": "{0} - {1}",
    "tanh": "libdevice.tanh({0})",
}
_TYPES = {"bool": "tl.int1", "float32": "tl.float32", "int32": "tl.int32", "uint32": "tl.uint32"}


def inner_source(inner: Elementwise, dtypes: Sequence[Any]) -> str:
    """A program as a function ``inner(v0, v1, ...)`` that returns a tuple.

    Args:
      inner: the program.
      dtypes: of its arrays, then of its scalars.

    Returns:
      The text, which refers to ``tl`` and ``libdevice``.

    Raises:
      UnsupportedError: a primitive, or a dtype, has no translation.
    """
    kinds = [wide(dtype) for dtype in dtypes]
    lines = [f"def inner({', '.join(f'v{i}' for i in range(len(kinds)))}):"]
    for operation in inner.operations:
        operands = [_operand(x) for x in operation.operands]
        of = [wide(x.dtype) if isinstance(x, Constant) else kinds[x] for x in operation.operands]
        lines.append(f"    v{len(kinds)} = {_expression(operation, operands, of)}")
        kinds.append(wide(operation.dtype))
    lines.append(f"    return ({', '.join(f'v{i}' for i in inner.outputs)},)")
    return "\n".join(lines) + "\n"


def finish_source(inner: Elementwise, scalars: Sequence[Any]) -> str:
    """The epilogue ``finish(v0, base, offsets, mask, numbers, results)`` of a tile ``v0`` of R.

    It reads the moments where the new ones will stand, runs ``inner``, and writes its outputs.

    Args:
      inner: the program.
      scalars: dtypes of its scalars, which stand in an array of float32 or of their bits.

    Returns:
      The text, which refers to ``tl`` and to ``inner``.
    """
    moments = range(1, inner.arrays)
    lines = ["def finish(v0, base, offsets, mask, numbers, results):"]
    lines += [f"    v{i} = tl.load(results[{i}] + base + offsets, mask=mask)" for i in moments]
    lines += [f"    v{i} = v{i}.to(tl.float32)" for i in moments]
    for i, dtype in enumerate(scalars):
        lines.append(f"    v{inner.arrays + i} = {_number(i, jnp.dtype(dtype))}")
    given = ", ".join(f"v{i}" for i in range(inner.arrays + len(scalars)))
    lines.append(f"    new = inner({given})")
    lines += [
        f"    tl.store(results[{i}] + base + offsets, new[{i}], mask=mask)"
        for i in range(len(inner.outputs))
    ]
    return "\n".join(lines) + "\n"


def _number(i: int, dtype: Any) -> str:
    text = f"tl.load(numbers + {i})"
    if jnp.issubdtype(dtype, jnp.floating):
        return text
    bits = f"{text}.to(tl.int32, bitcast=True)"
    return f"{bits} != 0" if dtype == jnp.bool_ else f"{bits}.to({_type(dtype)})"


def _operand(x: Any) -> str:
    if not isinstance(x, Constant):
        return f"v{x}"
    dtype = wide(x.dtype)
    if dtype == jnp.bool_:
        value = repr(bool(x.value))
    elif jnp.issubdtype(dtype, jnp.floating):
        value = f'float("{float(x.value)!r}")'
    else:
        value = repr(int(x.value))
    return f"tl.full((), {value}, {_type(dtype)})"


def _type(dtype: Any) -> str:
    name = jnp.dtype(dtype).name
    if name not in _TYPES:
        raise UnsupportedError(f"the inner computes in {name}, which the Triton kernel does not.")
    return _TYPES[name]


def _expression(operation: Operation, operands: list[str], dtypes: list[Any]) -> str:
    name, params, dtype = operation.primitive.name, dict(operation.params), wide(operation.dtype)
    _type(dtype)
    floating = jnp.issubdtype(dtype, jnp.floating)
    if name in _EXPRESSIONS:
        return _EXPRESSIONS[name].format(*operands)
    match name:
        case "convert_element_type" if dtype == jnp.bool_:
            return f"{operands[0]} != 0"
        case "convert_element_type":
            return f"tl.cast({operands[0]}, {_type(dtype)})"
        case "div":
            return f"{operands[0]} {'/' if floating else '//'} {operands[1]}"
        case "integer_pow" if params["y"] == 0:
            return f"tl.full((), 1, {_type(dtype)})"
        case "integer_pow":
            return _power(operands[0], params["y"])
        case "max" | "min":
            return _extremum(name, operands[0], operands[1], floating)
        case "clamp":
            low, x, high = operands
            return _extremum("min", _extremum("max", x, low, floating), high, floating)
        case "pow" if floating:
            return f"libdevice.pow({operands[0]}, tl.cast({operands[1]}, tl.float32))"
        case "select_n" if len(operands) == 3 and dtypes[0] == jnp.bool_:
            return f"tl.where({operands[0]}, {operands[2]}, {operands[1]})"
        case "sign":
            x, one = operands[0], "1.0" if floating else "1"
            return f"tl.where({x} > 0, {one}, tl.where({x} < 0, -{one}, {x}))"
    raise UnsupportedError(f"the inner uses {name} on {dtypes}, which the Triton kernel does not.")


def _extremum(name: str, x: str, y: str, floating: bool) -> str:
    # JAX's hand on a NaN, Triton's drop it unless told.
    nan = ", propagate_nan=tl.PropagateNan.ALL" if floating else ""
    return f"tl.{name}imum({x}, {y}{nan})"


def _power(x: str, y: int) -> str:
    return f"1.0 / ({_power(x, -y)})" if y < 0 else " * ".join([x] * y)
