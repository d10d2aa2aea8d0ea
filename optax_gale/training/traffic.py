"""What a compiled program sends between devices: the collectives in it, and how often they run."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

from optax_gale.training import programs

Kind = Literal["all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"]

_KINDS = "|".join(get_args(Kind))
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS})(-start)?\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLS = re.compile(r"(?:body|condition|to_apply|calls|called_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)"
)
_AWAITED = re.compile(r" async-(?:update|done)\(")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)(?:e\d+m\d+\w*)?\[([\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_AXIS_OF_MESH = re.compile(r"'([^']*)'=(\d+)")
_AXIS_OF_GROUP = re.compile(r"'([^']*)'(?::\(\d+\)(\d+))?")  # whole, or (steps)size of a part
_EVERYBODY = re.compile(r"replica_groups=\{\}")


class Collective(NamedTuple):
    """A collective of a program.

    Attributes:
      kind: what it does.
      elements: of every array that it moves, whole: before a reduce-scatter, after an all-gather.
        Of an all-to-all and a permutation, of the part that a device has.
      size: bytes of all of them.
      group: devices that take part together.
      times: how often it runs in a step.
      in_branch: whether it runs only in one branch of a conditional, as a refresh does; in a loop,
        ``times`` then takes the branch for one of every turn.
    """

    kind: Kind
    elements: tuple[int, ...]
    size: int
    group: int
    times: int
    in_branch: bool

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step, by the ring algorithm.

        ``(n - 1) / n`` of what it moves, with n devices; an all-reduce is a reduce-scatter and an
        all-gather, twice as much. What NCCL sends may be less where a switch adds up.
        """
        once = self.size * (self.group - 1) / self.group
        if self.kind == "collective-permute":
            once = float(self.size)
        return self.times * once * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class TrafficReport:
    """The traffic of a step.

    Attributes:
      collectives: all collectives of the program.
    """

    collectives: tuple[Collective, ...]

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step, at least: what no conditional decides about."""
        return sum(c.sent for c in self.collectives if not c.in_branch)

    @property
    def sent_at_most(self) -> float:
        """Bytes that each device sends, at most: every branch is taken, in every turn of a loop."""
        return sum(c.sent for c in self.collectives)

    @property
    def largest(self) -> int:
        """Elements of the largest array that is moved; 0 where nothing is."""
        return max((n for c in self.collectives for n in c.elements), default=0)


def traffic_report(step: Any, *args: Any, **kwargs: Any) -> TrafficReport:
    """Reports what a step sends between devices, from the compiled program.

    Args:
      step: a compiled function, or a jitted one and in ``args`` and ``kwargs`` what to call it
        with, arrays or shapes that say where they lie.
      *args: of a function that is not compiled.
      **kwargs: likewise.

    Returns:
      The report. Loops whose number of turns XLA does not know count once.

    Raises:
      TypeError: if ``step`` is neither, or is compiled and given arguments.
      NotImplementedError: if XLA names the devices of a collective in a way not known here.

    Example:
      >>> import jax, jax.numpy as jnp, optax_gale
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> x = jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=NamedSharding(mesh, P("data")))
      >>> report = optax_gale.traffic_report(jax.jit(lambda x: jnp.sum(x, axis=0)), x)
      >>> report.largest <= 8
      True
    """
    return TrafficReport(tuple(collectives(programs.compiled(step, args, kwargs).as_text())))


def collectives(text: str) -> list[Collective]:
    """The collectives of a program, given as XLA's text."""
    entry, bodies = _computations(text)
    devices = re.search(r"num_partitions=(\d+)", text)
    replicas = re.search(r"replica_count=(\d+)", text)
    everybody = max(int(m[1]) if m else 1 for m in (devices, replicas))
    found: dict[Collective, int] = defaultdict(int)
    for line, times, in_branch in _lines(entry, bodies, 1, False):
        match = _COLLECTIVE.search(line)
        if match:
            found[_collective(line, match, everybody, in_branch)] += times
    return [c._replace(times=times) for c, times in found.items()]


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """Name of the entry, and the lines of every computation."""
    entry, name = "", ""
    bodies: dict[str, list[str]] = {}
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:
            bodies[name].append(line)
    return entry, bodies


def _lines(
    name: str, bodies: dict[str, list[str]], times: int, in_branch: bool
) -> Iterator[tuple[str, int, bool]]:
    """Every instruction that runs, how often, and whether in a branch."""
    for line in bodies.get(name, ()):
        yield line, times, in_branch
        if _AWAITED.search(line):  # what has been started may be named here again
            continue
        trips = _TRIPS.search(line)
        inner = times * (int(trips[1]) if trips else 1)
        for called in _CALLS.findall(line):
            yield from _lines(called, bodies, inner, in_branch)
        for branches in _BRANCHES.findall(line):
            for branch in filter(None, re.split(r"[,\s%]+", ",".join(branches))):
                yield from _lines(branch, bodies, inner, True)


def _collective(line: str, match: "re.Match[str]", everybody: int, in_branch: bool) -> Collective:
    kind: Any = match[2]
    group = _group(line, everybody)
    arrays = _ARRAY.findall(_results(match[1], kind, started=match[3] is not None))
    whole = group if kind == "reduce-scatter" else 1
    elements = [whole * math.prod(map(int, filter(None, dims.split(",")))) for *_, dims in arrays]
    bits = [int(number or 8) for _, number, _ in arrays]
    size = sum(n * b // 8 for n, b in zip(elements, bits, strict=True))
    if kind == "all-to-all":  # one array, whose parts may be results of their own
        elements = [sum(elements)]
    return Collective(kind, tuple(elements), size, group, 1, in_branch)


def _results(types: str, kind: Kind, *, started: bool) -> str:
    """Of the types that an instruction makes, those of its results: not of operands kept alive."""
    if not started or not types.startswith("("):
        return types
    parts, depth, begin = [], 0, 1
    for i, letter in enumerate(types):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(types[begin:i])
            begin = i + 1
            if depth == 0:
                break
    # Sums that are started may be several, without their operands, which would be a tuple.
    if kind == "all-reduce" and not parts[0].startswith("("):
        return types
    return parts[1] if len(parts) > 1 else types


def _group(line: str, everybody: int) -> int:
    """Devices that take part together, in any of the ways that XLA writes them."""
    listed, iota, mesh = (of.search(line) for of in (_LISTED, _IOTA, _MESH))
    if iota:
        return int(iota[2])
    if listed and listed[1]:
        return len(listed[1].split(","))
    if mesh:
        sizes = dict(_AXIS_OF_MESH.findall(mesh[1]))
        parts = [int(part or sizes.get(a, 0)) for a, part in _AXIS_OF_GROUP.findall(mesh[2])]
        if len(parts) == len(mesh[2].split(",")) and all(parts):
            return math.prod(parts)
    if "replica_groups=" in line and not _EVERYBODY.search(line):
        raise NotImplementedError(
            "traffic_report cannot read which devices take part in this collective; XLA writes "
            f"them in a way that this version of optax_gale does not know: {line.strip()}"
        )
    return everybody
