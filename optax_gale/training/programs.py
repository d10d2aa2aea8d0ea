"""A compiled program as XLA describes it: instructions in order, and where their results lie."""

from collections.abc import Mapping
from typing import Any, NamedTuple

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
    """

    computations: Mapping[int, Computation]
    entry: int
    buffers: Mapping[int, Buffer]
    defined: Mapping[int, tuple[tuple[tuple[int, ...], int], ...]]


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
    buffers, defined = _buffers(Message(assignment))
    return Program(computations, entry, buffers, defined)


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
