"""What a projector loses in fewer bits: orthogonality, and the energy that it captures.

For the MLP matrices of LLaMA, gradients with singular values that fall like ``k^-decay``; their
projectors from the default sketch, stored in every precision of ``projector_dtype``. Prints a
Markdown table and stores it with the numbers.

    python -m benchmarks.projector_precision --out benchmarks/results
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from benchmarks.environment import store
from examples.flax_llama.sizes import get_size
from optax_gale import linalg
from optax_gale.quantization import dequantize, quantize
from optax_gale.transforms.subspace import PROJECTOR_BLOCK_SIZE

Row = dict[str, float | str | int]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    sizes: tuple[str, ...] = ("60m", "350m", "1b")
    """Models; the rank is a quarter of their width."""
    decay: float = 0.7
    """Exponent of the singular values."""
    out: Path = Path("benchmarks/results")
    """Where the results go."""


def gradient(m: int, n: int, decay: float) -> jax.Array:
    """A random matrix whose singular values fall like a power of their number."""
    left, right = jax.random.split(jax.random.key(0))
    values = jnp.arange(1.0, m + 1) ** -decay
    return (jax.random.normal(left, (m, m)) * values) @ jax.random.normal(right, (m, n))


def stored(p: jax.Array, dtype: str) -> tuple[jax.Array, float]:
    """The projector as it is read from a precision, in float32, and its bytes a number."""
    if dtype in ("int8", "int4"):
        q = quantize(p, "int8" if dtype == "int8" else "int4", block_size=PROJECTOR_BLOCK_SIZE)
        return dequantize(q), q.nbytes / p.size
    return p.astype(dtype).astype(jnp.float32), jnp.dtype(dtype).itemsize


def measure(m: int, n: int, rank: int, decay: float) -> list[Row]:
    """One row a precision."""
    g = gradient(m, n, decay)
    p = linalg.range_finder(jax.random.key(1), g, rank, align=True)
    best, exact = linalg.captured_energy(p, g), _projected(p, g)
    rows: list[Row] = []
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        x, size = stored(p, dtype)
        gram = linalg.einsum("dr,ds->rs", x, x) - jnp.eye(rank)
        span = linalg.orthonormalize(x)  # the energy is that of what it spans
        rows.append(
            {
                "m": m,
                "n": n,
                "rank": rank,
                "dtype": dtype,
                "bytes a number": size,
                "orthogonality": float(jnp.linalg.norm(gram, 2)),
                "energy": float(linalg.captured_energy(span, g) / best),
                "projection": float(jnp.linalg.norm(_projected(x, g) - exact))
                / float(jnp.linalg.norm(exact)),
            }
        )
    return rows


def _projected(p: jax.Array, g: jax.Array) -> jax.Array:
    return linalg.einsum("dr,rn->dn", p, linalg.einsum("dr,dn->rn", p, g))


def main(config: Config) -> None:
    """Measures and stores."""
    rows: list[Row] = []
    lines = [
        "| gradient | rank | projector | bytes a number | \\|\\|PᵀP − I\\|\\| | captured energy "
        "| error of P PᵀG |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in config.sizes:
        size = get_size(name)
        for row in measure(size.hidden, size.intermediate, size.hidden // 4, config.decay):
            rows.append(row)
            lines.append(
                f"| {row['m']} × {row['n']} | {row['rank']} | {row['dtype']} "
                f"| {row['bytes a number']:.3f} | {row['orthogonality']:.1e} "
                f"| {row['energy']:.4f} | {row['projection']:.4f} |"
            )
            print(lines[-1], flush=True)
    store(config.out / "projector_precision", lines, config=dataclasses.asdict(config), rows=rows)
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Config))
