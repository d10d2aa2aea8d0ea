"""How the outputs of a function depend on some of its inputs, read off its jaxpr.

An abstract interpretation: no number is computed, so the answer holds for all values, also where
hyperparameters are traced.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

_OTHER = "other"


class Dependence(NamedTuple):
    """How an array depends on the inputs that are watched.

    Attributes:
      on: None if it does not; an int i if it is ``u + c x_i``, elementwise, with a number c that is
        the same for all elements; ``"other"`` for anything else.
      uniform: whether it depends on nothing watched and all its elements are alike.
    """

    on: int | str | None
    uniform: bool = False

    @property
    def is_affine_in(self) -> int | None:
        """The input that it is affine in, if it is in one."""
        return self.on if isinstance(self.on, int) else None


_NONE, _UNIFORM, _ANY = Dependence(None), Dependence(None, uniform=True), Dependence(_OTHER)

# Elementwise and linear in the one operand.
_LINEAR = {"neg", "convert_element_type", "copy", "copy_p", "reduce_precision", "real"}
_LINEAR |= {"optimization_barrier", "sharding_constraint", "reshard", "pvary", "pcast"}
# Elementwise.
_ELEMENTWISE = {"add", "add_any", "sub", "mul", "div", "max", "min", "pow", "integer_pow", "sqrt"}
_ELEMENTWISE |= {"rsqrt", "exp", "log", "sign", "abs", "cos", "sin", "tanh", "select_n", "square"}
_ELEMENTWISE |= {"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "rem", "floor", "clamp"}
_KEEPS_UNIFORM = _ELEMENTWISE | _LINEAR | {"broadcast_in_dim", "reshape"}
# Primitives that call a function on their operands, and the parameters that hold it.
_CALLS = {"pjit", "jit", "closed_call", "core_call", "call", "eval_jaxpr", "custom_jvp_call"}
_CALLS |= {"custom_vjp_call", "custom_vjp_call_jaxpr", "checkpoint", "remat", "remat2"}
_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def called(equation: Any) -> Any | None:
    """What an equation calls on its operands, a jaxpr or a closed one; None if it is no call."""
    if equation.primitive.name not in _CALLS:
        return None
    found = next((equation.params[key] for key in _CALLED if key in equation.params), None)
    if found is None:
        return None
    return found if len(getattr(found, "jaxpr", found).invars) == len(equation.invars) else None


def is_identity(equation: Any) -> bool:
    """Whether a broadcast or reshape leaves its operand as it is."""
    return (
        equation.primitive.name in ("broadcast_in_dim", "reshape")
        and equation.params.get("dimensions") is None
        and equation.outvars[0].aval.shape == equation.invars[0].aval.shape
    )


def dependences(
    function: Callable[..., Any], arguments: Sequence[Any], watched: Sequence[int | None]
) -> Any:
    """Finds how every output of a function depends on the watched inputs.

    Args:
      function: the function; it is traced, not run.
      arguments: its arguments, arrays or shapes.
      watched: for every leaf of the arguments its number among the watched ones, or None.

    Returns:
      A tree like the function's result, with a `Dependence` at every leaf.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    inputs = [
        _given(var) if number is None else Dependence(number)
        for var, number in zip(closed.jaxpr.invars, watched, strict=True)
    ]
    outputs = _interpret(closed.jaxpr, inputs)
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


def sources(
    function: Callable[..., Any], arguments: Sequence[Any], watched: Sequence[int | None]
) -> list[frozenset[int]]:
    """Finds which of the watched inputs every output of a function depends on in any way.

    What goes through a loop depends on all that goes in.

    Args:
      function: the function; it is traced, not run.
      arguments: its arguments, arrays or shapes.
      watched: for every leaf of the arguments its number among the watched ones, or None.

    Returns:
      A set of numbers for every leaf of the function's result.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    inputs = [frozenset() if number is None else frozenset({number}) for number in watched]
    return _united(jaxpr, inputs)


def _united(jaxpr: Any, inputs: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    def apply(equation: Any, operands: list[frozenset[int]]) -> list[frozenset[int]]:
        function = called(equation)
        if function is not None:
            return _united(getattr(function, "jaxpr", function), operands)
        if equation.primitive.name == "cond":
            index, *inputs = operands
            branches = [_united(b.jaxpr, inputs) for b in equation.params["branches"]]
            return [index.union(*results) for results in zip(*branches, strict=True)]
        return [frozenset().union(*operands)] * len(equation.outvars)

    return _walk(jaxpr, inputs, lambda _: frozenset(), frozenset(), apply)


def _given(var: Any) -> Dependence:
    return _UNIFORM if var.aval.size == 1 else _NONE


def _interpret(jaxpr: Any, inputs: Sequence[Dependence]) -> list[Dependence]:
    return _walk(jaxpr, inputs, _given, _UNIFORM, _apply)


def _walk(
    jaxpr: Any,
    inputs: Sequence[Any],
    of_constant: Callable[[Any], Any],
    of_literal: Any,
    apply: Callable[[Any, list[Any]], Sequence[Any]],
) -> list[Any]:
    """What is known of a jaxpr's outputs, equation by equation."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {var: of_constant(var) for var in jaxpr.constvars}
    read = lambda x: of_literal if isinstance(x, Literal) else known[x]
    for equation in jaxpr.eqns:
        operands = [read(x) for x in equation.invars]
        known.update(zip(equation.outvars, apply(equation, operands), strict=True))
    return [read(x) for x in jaxpr.outvars]


def _apply(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    name = equation.primitive.name
    function = called(equation)
    if function is not None:
        return _interpret(getattr(function, "jaxpr", function), operands)
    if name == "cond":
        return _conditional(equation, operands)
    if all(x.on is None for x in operands):
        uniform = name in _KEEPS_UNIFORM and all(x.uniform for x in operands)
        return [_UNIFORM if uniform else _given(var) for var in equation.outvars]
    return [_elementwise(equation, operands)] * len(equation.outvars)


def _elementwise(equation: Any, operands: list[Dependence]) -> Dependence:
    """The result of a primitive with one output, some operand of which depends."""
    name, params = equation.primitive.name, equation.params
    first = operands[0]
    if name == "is_finite" and first.on != _OTHER:
        return _NONE  # parameters are taken to be finite
    if name in _LINEAR or is_identity(equation) or (name == "integer_pow" and params["y"] == 1):
        return first if len(operands) == 1 else _ANY
    if name in ("add", "add_any", "sub"):
        return _joined(operands)
    if name == "mul":
        if any(isinstance(x, Literal) and x.val == 0 for x in equation.invars):
            return _NONE  # a decay of zero
        x, factor = operands if operands[0].on is not None else operands[::-1]
        return x if factor.uniform else _ANY
    if name == "div":
        return first if operands[1].uniform else _ANY
    if name == "select_n" and first.uniform:
        return _joined(operands[1:])
    return _ANY


def _conditional(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    index, *inputs = operands
    branches = [_interpret(b.jaxpr, inputs) for b in equation.params["branches"]]
    if index.on is not None:
        return [_ANY] * len(equation.outvars)
    outputs = [_joined(list(results)) for results in zip(*branches, strict=True)]
    return [x._replace(uniform=False) if x.on is None else x for x in outputs]


def _joined(parts: list[Dependence]) -> Dependence:
    """What a sum of the parts depends on, or a choice among them."""
    on = {x.on for x in parts} - {None}
    if not on:
        return _UNIFORM if all(x.uniform for x in parts) else _NONE
    return Dependence(on.pop()) if len(on) == 1 else _ANY


# How an array depends on the rows of others: its elements are alike along its first axis; they are
# anything, but depend on no row; row i depends on rows i only; or on others too.
_ALIKE, _FREE, _OF_ROWS, _MIXED = "alike", "free", "of rows", "mixed"

# Random numbers are as good as others of their kind.
_DRAWS = {"random_bits", "random_wrap", "random_unwrap", "random_seed", "random_fold_in"}
_DRAWS |= {"threefry2x32", "shift_right_logical", "shift_left", "xor", "bitcast_convert_type"}
_BY_ROW = _ELEMENTWISE | _LINEAR | _DRAWS | {"is_finite", "ceil", "round", "nextafter", "sign"}
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"}
_REDUCTIONS |= {"argmax", "argmin"}


def keeps_rows_apart(
    function: Callable[..., Any], arguments: Sequence[Any], has_rows: Sequence[bool]
) -> bool:
    """Whether a function treats the entries along a first axis apart from each other, and alike.

    Args:
      function: the function; it is traced, not run.
      arguments: its arguments, arrays or shapes.
      has_rows: for every leaf of the arguments whether its first axis is that one.

    Returns:
      True if entry i of every output that depends on the entries depends on entries i alone, and
      the function is the same for all i. False also where the program is not understood.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    inputs = [
        _OF_ROWS if rows else _of_size(var)
        for var, rows in zip(jaxpr.invars, has_rows, strict=True)
    ]
    return _MIXED not in _by_row(jaxpr, inputs)


def _of_size(var: Any) -> str:
    return _ALIKE if var.aval.size == 1 else _FREE


def _by_row(jaxpr: Any, inputs: Sequence[str]) -> list[str]:
    return _walk(jaxpr, inputs, _of_size, _ALIKE, _apply_by_row)


def _apply_by_row(equation: Any, operands: list[str]) -> list[str]:
    function = called(equation)
    if function is not None:
        return _by_row(getattr(function, "jaxpr", function), operands)
    depends = not {_OF_ROWS, _MIXED}.isdisjoint(operands)
    return [
        _one_by_row(equation, operands, var) or (_MIXED if depends else _of_size(var))
        for var in equation.outvars
    ]


def _one_by_row(equation: Any, operands: list[str], result: Any) -> str | None:
    """A result of a primitive; None where nothing is known of it."""
    if _MIXED in operands or not operands:
        return None
    name, params, first = equation.primitive.name, equation.params, operands[0]
    shape, given = result.aval.shape, equation.invars[0].aval.shape
    if name in _BY_ROW:
        if _FREE in operands:
            return None if _OF_ROWS in operands else _FREE
        return _OF_ROWS if _OF_ROWS in operands else _ALIKE
    if name == "pad" and operands[1] == _ALIKE:  # with a number
        operands = operands[:1]
    if len(operands) > 1 and name != "concatenate":
        return None
    if name == "broadcast_in_dim":
        places = params["broadcast_dimensions"]
        if first != _OF_ROWS and (0 not in places or given[places.index(0)] == 1):
            return _ALIKE
        keeps = bool(given) and places[0] == 0 and given[0] == shape[0]
    elif name == "reshape":
        keeps = given[:1] == shape[:1] and params.get("dimensions") is None
    elif name == "transpose":
        keeps = params["permutation"][0] == 0
    elif name == "squeeze":
        keeps = 0 not in params["dimensions"]
    elif name in _REDUCTIONS:
        keeps = 0 not in params["axes"]
    elif name == "slice":
        keeps = given[0] == shape[0]
    elif name == "pad":
        keeps = params["padding_config"][0] == (0, 0, 0)
    elif name == "concatenate":
        alike = set(operands) <= {_OF_ROWS, _ALIKE} and params["dimension"] != 0
        return (_OF_ROWS if _OF_ROWS in operands else _ALIKE) if alike else None
    else:
        return None
    return first if keeps else None
