"""The part of an inner that kernels can run: what it does to one leaf, element by element.

An Optax transformation is opaque, but its jaxpr is not. Where a leaf's update and moments depend on
its gradient elementwise, as in Adam, Lion or momentum, their equations become a program that a
kernel runs on the tiles of a projected gradient while they are still in registers. Everything else
(step counters, bias corrections, schedules, other leaves) is evaluated beside it as usual.
"""

import functools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from optax_gale import _sharding
from optax_gale.pallas.elementwise import PRIMITIVES, Constant, Elementwise, Operation
from optax_gale.transforms import dataflow

# Primitives with functions inside that can be run again as they stand.
_WITH_FUNCTIONS = {"scan", "while", "cond", "reduce", "reduce_window", "reduce_precision"}


# Primitives that give something else every time.
_UNREPEATABLE = {"rng_uniform"}


class Equation(NamedTuple):
    """An equation of a flattened jaxpr.

    Attributes:
      eqn: the jaxpr's equation, for its primitive and parameters.
      inputs: value numbers, or literals.
      outputs: value numbers.
    """

    eqn: Any
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]


class Program(NamedTuple):
    """What happens to one leaf.

    Attributes:
      function: ``(R, *moments, *scalars) -> (U, *moments)``.
      moments: which arrays of the state are its moments.
      scalars: the numbers of the values that it takes as scalars.
      scalar_dtypes: their dtypes.
    """

    function: Elementwise
    moments: tuple[int, ...]
    scalars: tuple[int, ...]
    scalar_dtypes: tuple[str, ...]


class Evaluation(NamedTuple):
    """What was computed beside the programs; None where a program computes it.

    Attributes:
      updates: updates of the leaves.
      state: arrays of the state.
      others: the function's other outputs.
      scalars: the scalars of every program.
    """

    updates: list[Any]
    state: list[Any]
    others: list[Any]
    scalars: dict[int, list[jax.Array]]


class Analysis:
    """The elementwise parts of ``function(leaves, state) -> (updates, state, others)``."""

    def __init__(
        self,
        function: Callable[[list[Any], list[Any]], tuple[list[Any], list[Any], list[Any]]],
        leaves: Sequence[Any],
        state: Sequence[Any],
        candidates: Collection[int],
    ):
        """Traces the function and looks for programs.

        Args:
          function: the inner's update, on flat lists.
          leaves: gradients, arrays or shapes.
          state: its state, arrays or shapes.
          candidates: the leaves that a kernel could serve.
        """
        closed = jax.make_jaxpr(function)(list(leaves), list(state))
        self._leaves, self._state = len(leaves), len(state)
        self._avals: list[Any] = []
        self._equations: list[Equation] = []
        self._is_readable = True
        self._known: dict[Hashable, tuple[int, ...]] = {}
        self._inputs = [self._new(var.aval) for var in closed.jaxpr.invars]
        constants = [self._new(var.aval) for var in closed.jaxpr.constvars]
        self._constants = dict(zip(constants, closed.consts, strict=True))
        self._outputs = self._flatten(closed.jaxpr, self._inputs, constants)
        self._made_by = {v: e for e in self._equations for v in e.outputs}
        # Effects, such as printing, happen only where everything is run as it stands.
        readable = self._is_readable and not closed.effects
        found = {i: self._program(i) for i in (candidates if readable else ())}
        self.programs: dict[int, Program] = {i: p for i, p in found.items() if p is not None}

    def _new(self, aval: Any) -> int:
        self._avals.append(aval)
        return len(self._avals) - 1

    def _flatten(self, jaxpr: Any, inputs: Sequence[Any], constants: Sequence[Any]) -> list[Any]:
        """Appends a jaxpr's equations, with the calls in it opened; returns its outputs."""
        known = dict(zip(jaxpr.invars, inputs, strict=True))
        known |= dict(zip(jaxpr.constvars, constants, strict=True))
        read = lambda x: x if isinstance(x, Literal) else known[x]
        for eqn in jaxpr.eqns:
            operands = [read(x) for x in eqn.invars]
            function = dataflow.called(eqn)
            if function is not None:
                body = getattr(function, "jaxpr", function)
                numbers = [self._new(var.aval) for var in body.constvars]
                self._constants |= dict(zip(numbers, getattr(function, "consts", ()), strict=True))
                results = self._flatten(body, operands, numbers)
                known.update(zip(eqn.outvars, results, strict=True))
                continue
            if eqn.primitive.name not in _WITH_FUNCTIONS:
                self._is_readable &= not any(map(_is_function, eqn.params.values()))
            known.update(zip(eqn.outvars, self._appended(eqn, operands), strict=True))
        return [read(x) for x in jaxpr.outvars]

    def _appended(self, eqn: Any, operands: list[Any]) -> tuple[int, ...]:
        """Appends an equation, unless there is one like it; returns its outputs.

        What leaves have in common, such as their decay, must be one value to be passed only once.
        """
        params = sorted(eqn.params.items(), key=lambda item: item[0])
        inputs = [_literal_key(x) if isinstance(x, Literal) else x for x in operands]
        key: Hashable = (eqn.primitive, *params, *inputs)
        try:
            if key in self._known and eqn.primitive.name not in _UNREPEATABLE:
                return self._known[key]
        except TypeError:  # a parameter that cannot be hashed
            key = len(self._equations)
        self._known[key] = outputs = tuple(self._new(var.aval) for var in eqn.outvars)
        self._equations.append(Equation(eqn, tuple(operands), outputs))
        return outputs

    def _depending(self, value: int) -> set[int]:
        """Every value that depends on a given one."""
        found = {value}
        for equation in self._equations:
            if any(x in found for x in equation.inputs if isinstance(x, int)):
                found.update(equation.outputs)
        return found

    def _program(self, leaf: int) -> Program | None:
        """The program of a leaf, if its update and moments are elementwise and nothing else is."""
        gradient = self._inputs[leaf]
        dependent = self._depending(gradient)
        where = [i for i, x in enumerate(self._outputs) if isinstance(x, int) and x in dependent]
        states = range(self._leaves, self._leaves + self._state)
        if leaf not in where or any(i != leaf and i not in states for i in where):
            return None
        moments = tuple(i - self._leaves for i in where if i != leaf)
        arrays = [gradient, *(self._inputs[self._leaves + k] for k in moments)]
        shape = self._avals[gradient].shape
        if any(self._avals[x].shape != shape for x in arrays):
            return None
        if any(not _is_narrow_float(self._avals[x].dtype) for x in arrays):
            return None  # kernels compute in float32
        outputs = [self._outputs[i] for i in (leaf, *(self._leaves + k for k in moments))]
        if any(self._avals[x].shape != shape for x in outputs):
            return None
        return self._built(dependent, arrays, outputs, moments)

    def _built(
        self, dependent: set[int], arrays: list[int], outputs: list[int], moments: tuple[int, ...]
    ) -> Program | None:
        shape = self._avals[arrays[0]].shape
        needed, scalars, order = set(arrays), list[int](), list[int]()
        stack = list(outputs)
        while stack:
            value = stack.pop()
            if value in needed:
                continue
            needed.add(value)
            if self._avals[value].shape == ():
                if value in dependent:
                    return None  # a norm, say: known only when all of the gradient is
                scalars.append(value)
                continue
            equation = self._made_by.get(value)
            if equation is None or not self._is_elementwise(equation, shape):
                return None
            order.append(value)
            stack += [x for x in equation.inputs if isinstance(x, int)]
        scalars.sort()
        if any(not _is_number(self._avals[x].dtype) for x in scalars):
            return None  # a random key, say
        slots: dict[int, Any] = {x: k for k, x in enumerate((*arrays, *scalars))}
        operations = list[Operation]()
        for value in sorted(order):
            equation = self._made_by[value]
            operands = tuple(
                _constant(x) if isinstance(x, Literal) else slots[x] for x in equation.inputs
            )
            operation = _operation(equation.eqn, operands, self._avals[value].dtype)
            if isinstance(operation, Operation):
                slots[value] = len(arrays) + len(scalars) + len(operations)
                operations.append(operation)
            else:
                slots[value] = operation
        results = tuple(slots[x] for x in outputs)
        if any(isinstance(x, Constant) for x in results):
            return None
        function = Elementwise(len(arrays), len(scalars), tuple(operations), results)
        dtypes = tuple(str(self._avals[x].dtype) for x in scalars)
        return Program(function, moments, tuple(scalars), dtypes)

    def _is_elementwise(self, equation: Equation, shape: tuple[int, ...]) -> bool:
        name = equation.eqn.primitive.name
        shapes = [
            np.shape(x.val) if isinstance(x, Literal) else self._avals[x].shape
            for x in equation.inputs
        ]
        if len(equation.outputs) != 1 or any(s not in ((), shape) for s in shapes):
            return False
        if name in PRIMITIVES:
            return True
        scalar = name == "broadcast_in_dim" and shapes == [()]
        return len(shapes) == 1 and (scalar or dataflow.is_identity(equation.eqn))

    def evaluate(
        self, leaves: Mapping[int, jax.Array], state: Sequence[jax.Array], kernels: Collection[int]
    ) -> Evaluation:
        """Computes what the programs of ``kernels`` do not.

        Args:
          leaves: the gradients, by their numbers; those of ``kernels`` are not needed.
          state: the state's arrays.
          kernels: the leaves whose programs are run elsewhere.
        """
        elsewhere = {
            position
            for i in kernels
            for position in (i, *(self._leaves + k for k in self.programs[i].moments))
        }
        wanted = {
            x
            for position, x in enumerate(self._outputs)
            if position not in elsewhere and isinstance(x, int)
        }
        wanted |= {x for i in kernels for x in self.programs[i].scalars}
        for equation in reversed(self._equations):
            if wanted.intersection(equation.outputs):
                wanted.update(x for x in equation.inputs if isinstance(x, int))
        values: dict[int, Any] = dict(self._constants)
        values |= {self._inputs[i]: x for i, x in leaves.items()}
        values |= dict(zip(self._inputs[self._leaves :], state, strict=True))
        read = lambda x: x.val if isinstance(x, Literal) else values[x]
        for equation in self._equations:
            if wanted.intersection(equation.outputs):
                results = _run(equation.eqn, [read(x) for x in equation.inputs])
                values.update(zip(equation.outputs, results, strict=True))

        @functools.cache
        def array(number: int) -> jax.Array:
            return jax.numpy.asarray(values[number])

        last = self._leaves + self._state
        out: list[Any] = []
        given: set[int] = set()
        for position, x in enumerate(self._outputs):
            if position in elsewhere:
                out.append(None)
            elif isinstance(x, Literal):
                out.append(jax.numpy.asarray(x.val))
            elif x in given and position < last:
                # Equal values are one, but a state whose arrays are may not be donated.
                out.append(jax.numpy.array(array(x), copy=True))
            else:
                given.add(x)
                out.append(array(x))
        scalars = {i: [array(x) for x in self.programs[i].scalars] for i in kernels}
        return Evaluation(out[: self._leaves], out[self._leaves : last], out[last:], scalars)


def _literal_key(literal: Any) -> Hashable:
    value = np.asarray(literal.val)
    return (str(literal.aval), value.shape, value.tobytes())


def _is_function(x: Any) -> bool:
    """Whether a parameter of an equation holds jaxprs."""
    parts = x if isinstance(x, (tuple, list)) else (x,)
    return any(isinstance(part, (Jaxpr, ClosedJaxpr)) for part in parts)


def _is_narrow_float(dtype: Any) -> bool:
    return bool(jax.numpy.issubdtype(dtype, jax.numpy.floating)) and dtype.itemsize <= 4


def _is_number(dtype: Any) -> bool:
    kinds = (jax.numpy.number, jax.numpy.bool_)
    return any(jax.numpy.issubdtype(dtype, kind) for kind in kinds)


def _constant(literal: Any) -> Constant:
    return Constant(np.asarray(literal.val).item(), literal.aval.dtype)


def _operation(eqn: Any, operands: tuple[Any, ...], dtype: Any) -> Any:
    """The operation that an equation becomes, or what its value is without one."""
    name = eqn.primitive.name
    # Programs broadcast by themselves, and optimizers raise to the power of one.
    if name not in PRIMITIVES or (name == "integer_pow" and eqn.params["y"] == 1):
        return operands[0]
    params = tuple(sorted(eqn.params.items(), key=lambda item: item[0]))
    if all(isinstance(x, Constant) for x in operands):
        with _sharding.concrete():
            numbers = [jax.numpy.asarray(x.value, x.dtype) for x in operands]
            return Constant(np.asarray(eqn.primitive.bind(*numbers, **eqn.params)).item(), dtype)
    return Operation(eqn.primitive, params, operands, dtype)


def _run(eqn: Any, operands: list[Any]) -> list[Any]:
    results = eqn.primitive.bind(*operands, **eqn.params)
    return list(results) if eqn.primitive.multiple_results else [results]
