"""Memory of weights and optimizer state of LLaMA, from shapes alone.

python -m benchmarks.memory --size 7b --ranks 128 1024 --out benchmarks/results
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tyro

import optax_gale
from benchmarks.environment import store
from examples.flax_llama.model import Llama
from examples.flax_llama.sizes import get_size

GIB = 1024**3


@dataclasses.dataclass(frozen=True)
class Config:
    """What to tabulate."""

    size: str = "7b"
    """Model size."""
    ranks: tuple[int, ...] = (128, 1024)
    """Ranks of the subspaces."""
    out: Path = Path("benchmarks/results")
    """Where the results go."""


def optimizers(ranks: tuple[int, ...], dtype: jnp.dtype) -> dict[str, optax.GradientTransformation]:
    """AdamW, GaLore (moments and projector in the weights' dtype, as galore-torch), and GALE."""
    table: dict[str, optax.GradientTransformation] = {
        "AdamW": optax.adamw(1e-3),
        "AdamW, moments in int8": optax_gale.quantize_states(optax.adamw(1e-3)),
    }
    for rank in ranks:
        table[f"GaLore (SVD), r = {rank}"] = optax_gale.gale_adamw(
            1e-3, rank, range_finder="svd", side="short", projector_dtype=dtype
        )
        table[f"GALE, r = {rank}"] = optax_gale.gale_adamw(1e-3, rank)
        table[f"GALE, r = {rank}, projector in {dtype.name}"] = optax_gale.gale_adamw(
            1e-3, rank, projector_dtype=dtype
        )
        for projector in ("int8", "int4"):
            table[f"GALE, r = {rank}, moments in int8, projector in {projector}"] = (
                optax_gale.gale_adamw(1e-3, rank, state_dtype="int8", projector_dtype=projector)
            )
        table[f"GALE, r = {rank}, side='long'"] = optax_gale.gale_adamw(1e-3, rank, side="long")
        table[f"GALE-Muon, r = {rank}"] = optax_gale.gale_muon(1e-3, rank)
    return table


def main(config: Config) -> None:
    """Tabulates and stores."""
    size = get_size(config.size)
    rows = []
    for dtype in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        model = Llama(size, dtype=dtype, param_dtype=dtype)
        tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
        for name, tx in optimizers(config.ranks, dtype).items():
            if "projector in float32" in name:
                continue  # the default
            report = optax_gale.memory_report(tx, params)
            arrays = jax.tree.leaves(jax.eval_shape(tx.init, params))
            assert report.state == sum(x.size * x.dtype.itemsize for x in arrays)
            rows.append(
                {
                    "weights dtype": dtype.name,
                    "optimizer": name,
                    "weights": report.weights,
                    "moments": report.moments,
                    "projectors": report.projectors,
                    "total": report.total,
                }
            )
    lines = [
        f"LLaMA-{config.size.upper()}, GiB.",
        "",
        "| weights | optimizer | weights | moments | projectors | total |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = [f"{row[k] / GIB:.2f}" for k in ("weights", "moments", "projectors", "total")]
        lines.append(" | ".join(["| " + row["weights dtype"], row["optimizer"], *sizes]) + " |")
    store(config.out / f"memory_{config.size}", lines, rows=rows)
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Config))
