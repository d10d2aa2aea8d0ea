"""What each device sends in a step, as `optax_gale.traffic_report` counts it: rings.

XLA inserts the collectives. On simulated devices it adds whole gradients up everywhere and has each
device cut its part out; other backends may scatter the sums, which sends half, and add partial
results before they are sent. So there are two sums: what programs for simulated devices send, which
`checks` compares, and the least that the same layout needs.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from benchmarks.plan.memory import adds_up_whole_tables, looks_up_in_place
from benchmarks.plan.setups import Matrices, Setup, kernels_serve, matrices

What = Literal["weights", "gradients", "activations", "look-up", "projections"]


class Transfer(NamedTuple):
    """Something that is sent.

    Attributes:
      what: it is.
      axes: along which.
      sent: bytes that each device sends.
      least: the same, of a compiler that scatters sums and adds up before it sends.
    """

    what: What
    axes: str
    sent: float
    least: float


class Traffic(NamedTuple):
    """What a step sends.

    Attributes:
      transfers: of a step that keeps its projectors.
      refresh: what one that makes new ones sends besides, about.
    """

    transfers: tuple[Transfer, ...]
    refresh: float

    @property
    def sent(self) -> float:
        """Bytes that each device sends, where gradients are added up everywhere."""
        return sum(t.sent for t in self.transfers)

    @property
    def least(self) -> float:
        """Bytes that each device sends at least."""
        return sum(t.least for t in self.transfers)

    def along(self, axis: str) -> float:
        """Of the least, what goes along an axis alone."""
        return sum(t.least for t in self.transfers if t.axes == axis)


def traffic(setup: Setup) -> Traffic:
    """Predicts what each device sends in a step."""
    parts: tuple[Callable[[Setup], Iterator[Transfer]], ...]
    parts = (_layers, _head, _embedding, _projections)
    if setup.average:
        parts = (_averaged_projections,)
    transfers = (t for part in parts for t in part(setup) if t.sent)
    return Traffic(tuple(transfers), _refresh(setup))


def gathered(size: float, devices: int) -> float:
    """Bytes that each of so many devices sends of an array that they put together."""
    return size * (devices - 1) / devices


def summed(size: float, devices: int) -> float:
    """Bytes that each sends of an array that all add up: scattered sums, gathered."""
    return 2 * gathered(size, devices)


def _gradients(numbers: float, setup: Setup) -> Iterator[Transfer]:
    """Of a matrix that fsdp shares: added up along it, then each part along data."""
    data, fsdp, _ = setup.axes
    size = numbers * setup.weight_bytes
    yield Transfer("gradients", "fsdp", summed(size, fsdp), gathered(size, fsdp))
    yield _plain("gradients", "data", summed(size / fsdp, data))


def _plain(what: What, axes: str, sent: float) -> Transfer:
    """Something that has to be sent as it is."""
    return Transfer(what, axes, sent, sent)


def _layers(setup: Setup) -> Iterator[Transfer]:
    llama, (data, fsdp, tensor) = setup.llama, setup.axes
    numbers = llama.layers * sum(m.numbers for m in matrices(llama)) / tensor
    # Once for the forward pass and once for the backward pass, which also computes layers again.
    both = 2 * gathered(numbers * setup.weight_bytes, fsdp)
    yield _plain("weights", "fsdp", both)
    yield from _gradients(numbers, setup)
    norms = setup.weight_bytes * llama.hidden * (2 * llama.layers + 1)
    yield _plain("gradients", "data,fsdp", summed(norms, data * fsdp))
    stream = summed(setup.compute * setup.tokens * llama.hidden, tensor)
    # Forward: one sum after each half. Backward: one for each product that read the stream, three
    # and two, or for their sum. Computing a layer again needs the first half's once more.
    forward = llama.layers * (3 if setup.remat else 2)
    most, least = forward + 5 * llama.layers, forward + 2 * llama.layers
    yield Transfer("activations", "tensor", most * stream, least * stream)


def _head(setup: Setup) -> Iterator[Transfer]:
    llama, (_, fsdp, tensor) = setup.llama, setup.axes
    numbers = llama.vocab_size * llama.hidden / tensor
    # In parts, each gathers the head in its backward pass, and adds up a gradient of its own.
    parts = setup.chunks
    times = 1 if parts == 1 else parts + 1
    weights = gathered(numbers * setup.weight_bytes, fsdp)
    yield Transfer("weights", "fsdp", times * weights, weights)
    for t in _gradients(numbers, setup):
        yield t._replace(sent=t.sent * (parts if t.axes == "fsdp" else 1))
    stream = summed(setup.compute * setup.tokens * llama.hidden, tensor)
    yield _plain("activations", "tensor", stream)


def _embedding(setup: Setup) -> Iterator[Transfer]:
    """In float32, in which tokens are looked up and gradients of the table added up."""
    llama, (data, fsdp, tensor) = setup.llama, setup.axes
    table = 4 * llama.vocab_size * llama.hidden / tensor
    own = 4 * setup.tokens * llama.hidden
    stream = own * fsdp
    if looks_up_in_place(setup):
        # A sum of which each device needs its own tokens.
        sent = summed(stream, fsdp * tensor)
        least = gathered(stream, fsdp) + summed(own, tensor)
        yield Transfer("look-up", "fsdp,tensor", sent, least)
    else:
        yield _plain("weights", "fsdp", gathered(table, fsdp))
        yield _plain("look-up", "tensor", summed(own, tensor))
    part = summed(table / fsdp, data)
    if adds_up_whole_tables(setup):
        least = gathered(table, fsdp)
        yield Transfer("gradients", "data,fsdp", summed(table, data * fsdp) - part, least)
    else:
        yield _plain("look-up", "fsdp", gathered(stream, fsdp))
    yield _plain("gradients", "data", part)


def _projections(setup: Setup) -> Iterator[Transfer]:
    """What the optimizer sends, in float32: devices share its state, and need some of it whole."""
    for m in _projected(setup):
        yield _along(setup, m, "fsdp", setup.axes[1], setup.axes[2])
        yield _along(setup, m, "tensor", setup.axes[2], setup.axes[1])


def _along(setup: Setup, m: Matrices, axis: str, devices: int, others: int) -> Transfer:
    """Along one axis, of which the other devices along the other axis have parts."""
    rank, share = setup.optimizer.rank, 4 * setup.llama.layers / others
    reduces = axis == m.reduced_over(setup.axes)
    if kernels_serve(setup):  # nothing that could be whole is shared
        sums = summed(share * m.projected(rank), devices) if reduces else 0.0
        return _plain("projections", axis, sums)
    projector = gathered(share * m.projector(rank), devices)
    if not reduces:
        return _plain("projections", axis, projector)
    inside = gathered(share * m.projected(rank), devices)
    # Where gradients were added up whole, each device projects for its part of the other side.
    # Else what they project of their own parts is added up. The updates are gathered after both.
    alone = axis == "fsdp" and others == 1
    most = inside + (projector if alone else 2 * inside)
    return Transfer("projections", axis, most, inside + min(projector, inside))


def _projected(setup: Setup) -> list[Matrices]:
    rank = setup.optimizer.rank
    return [m for m in matrices(setup.llama) if 0 < rank < min(m.rows, m.columns)]


def _averaged_projections(setup: Setup) -> Iterator[Transfer]:
    """Of projected matrices, projections; of the rest, gradients."""
    llama, (data, _, _) = setup.llama, setup.axes
    projected = _projected(setup)
    of_matrices = llama.layers * sum(m.projected(setup.optimizer.rank) for m in projected)
    size = setup.weight_bytes * of_matrices  # in the gradients' dtype
    yield _plain("projections", "data", summed(size, data))
    table = llama.vocab_size * llama.hidden
    others = llama.hidden * (2 * llama.layers + 1) + table
    others += llama.layers * sum(m.numbers for m in matrices(llama) if m not in projected)
    # The table's gradient is cast to the weights' dtype before it is added up.
    rest = (others + table) * setup.weight_bytes
    yield _plain("gradients", "data", summed(rest, data))


def _refresh(setup: Setup) -> float:
    """With one power iteration, 2 r (m + n) numbers a matrix are added up: projections too."""
    rank, (data, fsdp, tensor) = setup.optimizer.rank, setup.axes
    once = setup.llama.layers * sum(m.projected(rank) for m in _projected(setup))
    both = 2 * (once + setup.llama.layers * sum(m.projector(rank) for m in _projected(setup)))
    if setup.average:
        # Products of the sketch are in float32, and the projections that they replace are not sent.
        return summed(4 * both - setup.weight_bytes * once, data)
    return summed(4 * both, fsdp * tensor)
