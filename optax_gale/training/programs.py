"""A compiled program as XLA describes it: instructions in order, and where their results lie."""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from optax_gale.training.wire import Message

_HOST_MEMORY = 5  # XLA's number of that memory space


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      id: unique in the program.
      opcode: what it does, such as ``fusion``.
      op_name: the JAX operation that it came from, and the transformations around that.
      operands: ids of what it reads.
      called: ids of the computations that it runs.
      number: of a ``get-tuple-element``, which element; of a ``parameter``, which one.
    """

    id: int
    opcode: str
    op_name: str
    operands: tuple[int, ...]
    called: tuple[int, ...]
    number: int


class Computation(NamedTuple):
    """Instructions in the order in which they run.

    Attributes:
      instructions: all of them.
      root: id of the one that makes the result.
    """

    instructions: tuple[Instruction, ...]
    root: int


class Buffer(NamedTuple):
    """An array that the program makes, in one of the temporary allocations.

    Attributes:
      allocation: which one.
      offset: bytes from its beginning.
      size: bytes.
    """

    allocation: int
    offset: int
    size: int


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      computations: by id.
      entry: id of the one that the program is.
      buffers: temporary buffers by id.
      defined: ids of the buffers that an instruction makes, with their places in its result.
      is_placed: whether the compiler told where buffers lie; if not, each has an allocation of its
        own, also what the compiler puts in another's place.
    """

    computations: Mapping[int, Computation]
    entry: int
    buffers: Mapping[int, Buffer]
    defined: Mapping[int, tuple[tuple[tuple[int, ...], int], ...]]
    is_placed: bool = True


def compiled(step: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The compiled program of a jitted function and what to call it with, or of any later stage.

    Raises:
      TypeError: if it is something else, or has its arguments already and is given some.
    """
    if isinstance(step, (jax.stages.Traced, jax.stages.Lowered, jax.stages.Compiled)):
        if args or kwargs:
            raise TypeError(
                "a traced, lowered or compiled step has its arguments already: give it without any"
            )
    elif hasattr(step, "lower"):
        step = step.lower(*args, **kwargs)
    else:
        raise TypeError(
            "`step` must be a function of jax.jit: a jitted or compiled function, got "
            f"{type(step).__name__}: {step!r}"
        )
    step = step.lower() if isinstance(step, jax.stages.Traced) else step
    return step.compile() if isinstance(step, jax.stages.Lowered) else step


def read(compiled: Any) -> Program | None:
    """Reads what a compiled JAX function says about itself.

    Args:
      compiled: of ``jax.jit(f).lower(...).compile()``.

    Returns:
      The program, or None where the backend does not describe it, or in another way.
    """
    try:
        (module,) = compiled.runtime_executable().hlo_modules()
        assignment = compiled.memory_analysis().serialized_buffer_assignment_proto
        return parse(module.as_serialized_hlo_module_proto(), assignment)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        # None of this is a public promise of JAX's, and of a backend's even less.
        return None


def parse(module: bytes, assignment: bytes) -> Program:
    """Parses XLA's ``HloModuleProto`` and ``BufferAssignmentProto``.

    The second may be empty, as for JAX's GPU plugin: buffers are then what instructions make, by
    their shapes.

    Raises:
      ValueError: if they are something else, or the module is not scheduled.
    """
    proto = Message(module)
    order = {entry.number(1): entry.message(2).numbers(1) for entry in proto.message(7).messages(1)}
    computations = {
        computation.number(5): Computation(
            _scheduled(
                [_instruction(i) for i in computation.messages(2)],
                order.get(computation.number(5)),
            ),
            computation.number(6),
        )
        for computation in proto.messages(3)
    }
    entry = proto.number(6)
    if entry not in computations or entry not in order:
        raise ValueError("the program has no order of execution")
    if assignment:
        return Program(computations, entry, *_buffers(Message(assignment)))
    return Program(computations, entry, *_results(proto, order.keys()), is_placed=False)


def _instruction(proto: Message) -> Instruction:
    opcode = proto.text(2)
    return Instruction(
        proto.number(35),
        opcode,
        proto.message(7).text(2),
        tuple(proto.numbers(36)),
        tuple(proto.numbers(38)),
        proto.number(9) if opcode == "parameter" else proto.number(13),
    )


def _scheduled(instructions: list[Instruction], order: list[int] | None) -> tuple[Instruction, ...]:
    if order is None:  # of a fusion, say, which makes no buffers inside
        return tuple(instructions)
    by_id = {instruction.id: instruction for instruction in instructions}
    if not by_id.keys() >= set(order):
        raise ValueError("the order names instructions that are not there")
    return tuple(by_id[i] for i in order)


def _buffers(
    assignment: Message,
) -> tuple[dict[int, Buffer], dict[int, tuple[tuple[tuple[int, ...], int], ...]]]:
    buffers = {}
    for allocation in assignment.messages(3):
        thread_local, parameter, lives_out, constant = map(allocation.number, (3, 5, 7, 12))
        if thread_local or parameter or lives_out or constant:
            continue
        if allocation.number(8) == _HOST_MEMORY:
            continue
        for assigned in allocation.messages(9):
            buffers[assigned.number(1)] = Buffer(
                allocation.number(1), assigned.number(2), assigned.number(3)
            )
    defined: dict[int, tuple[tuple[tuple[int, ...], int], ...]] = {}
    for logical in assignment.messages(1):
        if logical.number(1) in buffers:
            place = logical.message(3)
            defined[place.number(4)] = (
                *defined.get(place.number(4), ()),
                (tuple(place.numbers(3)), logical.number(1)),
            )
    return buffers, defined


# Instructions whose result lies where their operands do, or where something else is kept.
_MAKES_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"}
_MAKES_NOTHING |= {"conditional", "optimization-barrier", "opt-barrier", "add-dependency", "domain"}
_MAKES_NOTHING |= {"after-all", "partition-id", "replica-id"}
_IN_PLACE = {"dynamic-update-slice", "scatter", "select-and-scatter"}

# Bytes of an element by XLA's number of its type; four bits take a byte, tokens and tuples none.
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 2, 8: 4, 9: 8, 10: 2, 11: 4, 12: 8, 13: 0, 14: 0}
_SIZES |= {15: 8, 16: 2, 17: 0, 18: 16}


def _results(
    proto: Message, scheduled: Collection[int]
) -> tuple[dict[int, Buffer], dict[int, tuple[tuple[tuple[int, ...], int], ...]]]:
    """What the instructions of scheduled computations make."""
    computations = {c.number(5): c.messages(2) for c in proto.messages(3)}
    shapes = {i.number(35): i.message(3) for c in computations.values() for i in c}
    buffers: dict[int, Buffer] = {}
    defined: dict[int, tuple[tuple[tuple[int, ...], int], ...]] = {}
    for instruction in (i for number in scheduled for i in computations[number]):
        opcode = instruction.text(2)
        aliases = instruction.messages(74)  # of a call into a library
        if opcode in _MAKES_NOTHING or opcode.endswith(("-update", "-done")) or aliases:
            continue
        # An update in part lies on an operand of its form.
        parts = computations[instruction.numbers(38)[0]] if opcode == "fusion" else [instruction]
        in_place = any(part.text(2) in _IN_PLACE for part in parts)
        free = [_form(shapes[i]) for i in instruction.numbers(36)] if in_place else []
        made = []
        for place, shape in _arrays(instruction.message(3)):
            if _form(shape) in free:
                free.remove(_form(shape))
            elif size := _bytes_of(shape):
                made.append((place, len(buffers)))
                buffers[len(buffers)] = Buffer(len(buffers), 0, size)
        defined[instruction.number(35)] = tuple(made)
    return buffers, defined


def _arrays(
    shape: Message, place: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[int, ...], Message]]:
    elements = shape.messages(4)
    if not elements:
        yield place, shape
    for i, element in enumerate(elements):
        yield from _arrays(element, (*place, i))


def _form(shape: Message) -> tuple[int, ...]:
    return (shape.number(2), *shape.numbers(3))


def _bytes_of(shape: Message) -> int:
    if shape.message(5).number(8) == _HOST_MEMORY:
        return 0
    return _SIZES.get(shape.number(2), 1) * math.prod(shape.numbers(3))
