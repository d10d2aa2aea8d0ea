"""What lies in a compiled program's temporary memory at the moment when it is fullest."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from optax_gale.training.programs import Buffer, Instruction, Program

Kind = Literal["gradients", "activations", "work"]

# The buffers that each place of a result, which may be a tuple of tuples, can be.
_Places = dict[tuple[int, ...], frozenset[int]]

# A `jax.named_scope` for gradients that no transformation of JAX's names, such as sums of them.
SCOPE = "gradients"

_ANYWHERE = (-1,)  # the place of a buffer that may be in any element of a tuple
_FORWARDS = {"tuple", "get-tuple-element", "bitcast", "parameter"}
_PASSES = {"optimization-barrier", "opt-barrier", "add-dependency", "domain"}
_RUNS = {"while", "conditional", "call"}


class Fullest(NamedTuple):
    """The moment when most temporary memory is in use.

    Attributes:
      gradients: bytes of what the backward pass made and the optimizer will read.
      activations: bytes of what the forward pass made, or the backward pass made again.
      work: bytes of everything else that is alive.
    """

    gradients: int
    activations: int
    work: int

    @property
    def total(self) -> int:
        """Bytes that are alive."""
        return self.gradients + self.activations + self.work


def fullest(program: Program) -> Fullest:
    """Finds the moment, and sorts what is alive then by the operations that made it.

    Buffers that lie on each other, as those of an update in place do, count once.
    """
    flow = _Flow(program)
    scope, returned = flow.follow(program.entry, [])
    if not program.is_placed:  # what is returned is no temporary
        results = _all(returned)
        spans = {b: span for b, span in scope.spans.items() if b not in results}
        scope = scope._replace(spans=spans)
    _, alive = _search(program.buffers, scope, frozenset(), (-1, frozenset()))
    sizes = {"gradients": 0, "activations": 0, "work": 0}
    counted: list[Buffer] = []
    for kind in ("gradients", "activations", "work"):
        before = _covered(counted)
        counted.extend(program.buffers[b] for b in alive if flow.kind_of(b) == kind)
        sizes[kind] = _covered(counted) - before
    return Fullest(**sizes)


class _Scope(NamedTuple):
    """Buffers of one run of a computation.

    Attributes:
      spans: the first and last position at which each is alive.
      inner: what the instruction at a position runs.
    """

    spans: dict[int, tuple[int, int]]
    inner: dict[int, list["_Scope"]]


class _Flow:
    """Follows buffers from the instructions that make them to those that read them."""

    def __init__(self, program: Program):
        self._program = program
        self._kinds: dict[int, Kind | None] = {}  # of instructions
        self._makers = {b: i for i, made in program.defined.items() for _, b in made}
        self._read: set[int] = set()
        self._read_by_optimizer: set[int] = set()
        self._reader: dict[int, Kind] = {}  # of a buffer: what first reads it
        self._instructions = {
            i.id: i for c in program.computations.values() for i in c.instructions
        }

    def follow(self, computation_id: int, arguments: Sequence[_Places]) -> tuple[_Scope, _Places]:
        """Follows one run of a computation; returns its scope and the places of its result."""
        computation = self._program.computations[computation_id]
        outside = frozenset(b for places in arguments for b in _all(places))
        results: dict[int, _Places] = {}
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        inner = {}
        for position, instruction in enumerate(computation.instructions):
            operands = [results.get(i, {}) for i in instruction.operands]
            result, scopes = self._result(instruction, operands, arguments)
            results[instruction.id] = result
            if scopes:
                inner[position] = scopes
            for buffer in _all(result):
                first.setdefault(buffer, position)
            if instruction.opcode not in _FORWARDS:
                reader = self._kind(instruction)
                for buffer in {b for places in operands for b in _all(places)}:
                    last[buffer] = position
                    self._read.add(buffer)
                    if reader is not None:
                        self._reader.setdefault(buffer, reader)
                    if reader == "work":
                        self._read_by_optimizer.add(buffer)
        returned = results.get(computation.root, {})
        self._read |= _all(returned)
        last |= dict.fromkeys(_all(returned), len(computation.instructions) - 1)
        spans = {b: (p, last.get(b, p)) for b, p in first.items() if b not in outside}
        return _Scope(spans, inner), returned

    def kind_of(self, buffer: int) -> Kind:
        """What a buffer is."""
        if buffer not in self._read:
            return "work"  # scratch memory of a library's kernel
        kind = self._kind(self._instructions[self._makers[buffer]]) or self._reader.get(buffer)
        if kind == "gradients" and buffer not in self._read_by_optimizer:
            return "work"  # a gradient on its way back through the layers
        return kind or "work"

    def _result(
        self, instruction: Instruction, operands: list[_Places], arguments: Sequence[_Places]
    ) -> tuple[_Places, list[_Scope]]:
        opcode = instruction.opcode
        scopes: list[_Scope] = []
        result: _Places = {}
        if opcode == "parameter" and instruction.number < len(arguments):
            result = arguments[instruction.number]
        elif opcode == "tuple":
            for i, places in enumerate(operands):
                result |= {(i, *place): found for place, found in places.items()}
        elif opcode == "get-tuple-element":
            result = _element(operands[0], instruction.number)
        elif opcode == "bitcast" or opcode in _PASSES:
            result = operands[0] if operands else {}
        elif opcode in _RUNS:
            result, scopes = self._run(instruction, operands)
        elif opcode.endswith(("-start", "-update", "-done")):
            # What runs beside the program holds on to all that it was given.
            held = frozenset(b for places in operands for b in _all(places))
            result = {_ANYWHERE: held} if held else {}
        made = {p: frozenset([b]) for p, b in self._program.defined.get(instruction.id, ())}
        return _joined([result, made]), scopes

    def _run(
        self, instruction: Instruction, operands: list[_Places]
    ) -> tuple[_Places, list[_Scope]]:
        given = [operands] * len(instruction.called)
        if instruction.opcode == "conditional":  # the first operand chooses the branch
            given = [[places] for places in operands[1:]]
        runs = [
            self.follow(called, arguments)
            for called, arguments in zip(instruction.called, given, strict=False)
        ]
        scopes = [scope for scope, _ in runs]
        if instruction.opcode == "while":
            return operands[0], scopes
        returned = _joined(places for _, places in runs)
        if instruction.opcode == "conditional":
            # What a branch makes lies where the conditional's own buffer does.
            kept = {b for places in operands for b in _all(places)}
            returned = {place: found & kept for place, found in returned.items()}
        return returned, scopes

    def _kind(self, instruction: Instruction) -> Kind | None:
        if instruction.id not in self._kinds:
            self._kinds[instruction.id] = None  # in case of a circle
            kind = _kind_of_name(instruction.op_name)
            if kind is None:
                # A copy that the compiler made is what it copies; a constant can be anything.
                operands = [self._instructions[i] for i in instruction.operands]
                kinds = [self._kind(i) for i in operands if i.opcode != "constant"]
                named = [k for k in kinds if k is not None]
                kind = next((k for k in named if k != "work"), named[0] if named else None)
            self._kinds[instruction.id] = kind
        return self._kinds[instruction.id]


def _kind_of_name(name: str) -> Kind | None:
    """Reads the transformations in a name such as ``jit(step)/transpose(jvp(layer))/mul``."""
    if not name:
        return None
    if "rematted_computation" in name:  # by jax.checkpoint, in the backward pass
        return "activations"
    if "transpose(" in name:
        return "gradients"
    if "jvp(" in name:
        return "activations"
    return "gradients" if f"/{SCOPE}/" in name else "work"


def _search(
    buffers: Mapping[int, Buffer],
    scope: _Scope,
    outside: frozenset[int],
    best: tuple[int, frozenset[int]],
) -> tuple[int, frozenset[int]]:
    """The largest number of bytes alive at any moment of a scope or ``best``, and what is alive."""
    for position, alive in _moments(scope, outside):
        for inner in scope.inner.get(position, []):
            best = _search(buffers, inner, alive, best)
        # The sum, quicker to take, is as much or more: some may lie on each other.
        if sum(buffers[b].size for b in alive) > best[0]:
            covered = _covered(buffers[b] for b in alive)
            if covered > best[0]:
                best = covered, alive
    return best


def _moments(scope: _Scope, outside: frozenset[int]) -> Iterator[tuple[int, frozenset[int]]]:
    """Every position at which something begins or is run, and what is alive there."""
    begins: dict[int, set[int]] = {}
    ends: dict[int, set[int]] = {}
    for buffer, (first, last) in scope.spans.items():
        begins.setdefault(first, set()).add(buffer)
        ends.setdefault(last, set()).add(buffer)
    alive = set(outside)
    for position in sorted({*begins, *ends, *scope.inner}):
        alive |= begins.get(position, set())
        if position in begins or position in scope.inner:
            yield position, frozenset(alive)
        alive -= ends.get(position, set()) - outside


def _covered(buffers: Iterable[Buffer]) -> int:
    """Bytes that at least one of the buffers covers."""
    total, allocation, end = 0, -1, 0
    for buffer in sorted(buffers):
        if buffer.allocation != allocation:
            allocation, end = buffer.allocation, 0
        stop = buffer.offset + buffer.size
        total += max(0, stop - max(end, buffer.offset))
        end = max(end, stop)
    return total


def _element(places: _Places, index: int) -> _Places:
    found = {p[1:]: bs for p, bs in places.items() if p[:1] == (index,)}
    return {**found, _ANYWHERE: places[_ANYWHERE]} if _ANYWHERE in places else found


def _joined(parts: Iterable[_Places]) -> _Places:
    joined: _Places = {}
    for part in parts:
        for place, found in part.items():
            joined[place] = joined.get(place, frozenset()) | found
    return joined


def _all(places: _Places) -> frozenset[int]:
    return frozenset().union(*places.values())
