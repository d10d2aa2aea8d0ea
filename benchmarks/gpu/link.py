"""The link between devices: how fast collectives of a large array run over it.

Bus bandwidth is what each device sends by the ring algorithm (`optax_gale.traffic_report`), divided
by the time: the number to compare with the link's own, whatever the collective and the devices.

    python -m benchmarks.gpu.link --devices 2
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_gale
from benchmarks.gpu import timing
from benchmarks.gpu.store import Row
from examples.flax_llama.tables import markdown

_AXIS = "devices"
_MIB = 2**20

# What each device calls, and whether it begins with the whole array or its part of it.
_COLLECTIVES: Mapping[str, tuple[Callable[[jax.Array], jax.Array], bool]] = {
    "all-reduce": (lambda x: jax.lax.psum(x, _AXIS), True),
    "all-gather": (lambda x: jax.lax.all_gather(x, _AXIS, tiled=True), False),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, _AXIS, tiled=True), True),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to send."""

    devices: int = 2
    """Devices that take part: the first ones."""
    mib: tuple[int, ...] = (1024, 64)
    """MiB of the whole bfloat16 array."""


def measure(devices: int, mib: int, collective: str) -> Row:
    """Times one collective.

    Args:
      devices: how many take part.
      mib: MiB of the whole array: before a reduce-scatter, after an all-gather.
      collective: its name.
    """
    call, begins_whole = _COLLECTIVES[collective]
    mesh = jax.make_mesh((devices,), (_AXIS,), (AxisType.Auto,), devices=jax.devices()[:devices])
    each = mib * _MIB // jnp.bfloat16.dtype.itemsize // (1 if begins_whole else devices)
    results = P(_AXIS) if collective == "reduce-scatter" else P()
    # JAX does not know of a gathered array that it is the same everywhere.
    mapped = jax.shard_map(call, mesh=mesh, in_specs=P(_AXIS), out_specs=results, check_vma=False)
    spread = NamedSharding(mesh, P(_AXIS))
    x = jax.jit(lambda: jnp.ones(devices * each, jnp.bfloat16), out_shardings=spread)()
    program = jax.jit(mapped).lower(x).compile()
    seconds = timing.repeated(lambda: program(x), 10)
    sent = optax_gale.traffic_report(program).sent
    row: Row = {"collective": collective, "devices": devices, "mib": mib, "ms": 1e3 * seconds}
    return {**row, "sent": sent, "bytes_per_second": sent / seconds}


def bandwidth(link: Sequence[Row], devices: int, collective: str) -> float | None:
    """Bytes a second of a collective of the largest array; of the slowest if it was not measured.

    Args:
      link: measurements.
      devices: how many take part.
      collective: its name.

    Returns:
      The bus bandwidth; None where no collective of so many devices was measured.
    """
    there = [row for row in link if row["devices"] == devices]
    largest = max((row["mib"] for row in there), default=0)
    rates = {r["collective"]: r["bytes_per_second"] for r in there if r["mib"] == largest}
    return rates.get(collective, min(rates.values(), default=None))


def table(link: Sequence[Row]) -> str:
    """One row a measurement."""
    header = ["collective", "devices", "MiB", "ms", "bus bandwidth, GB/s"]
    lines = []
    for row in link:
        numbers = (row["ms"], row["bytes_per_second"] / 1e9)
        asked = (row["collective"], str(row["devices"]), str(row["mib"]))
        lines.append([*asked, *(f"{x:.3g}" for x in numbers)])
    return markdown(header, lines)


def main(config: Config) -> None:
    """Measures and prints: a table, and the same as JSON in the last line.

    Raises:
      SystemExit: if there are not as many devices.
    """
    if not 1 < config.devices <= jax.device_count():
        raise SystemExit(
            f"--devices must be from 2 to the {jax.device_count()} that there are, got "
            f"{config.devices}"
        )
    link: list[dict[str, Any]] = [
        measure(config.devices, mib, collective)
        for mib in config.mib
        for collective in _COLLECTIVES
    ]
    print(table(link))
    print(json.dumps(link))


if __name__ == "__main__":
    main(tyro.cli(Config))
