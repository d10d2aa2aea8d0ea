"""What a measurement was made on, and where it is kept."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
import optax

import optax_gale

MOST_MEMORY = 0.95  # of a device's, the rest of which CUDA needs


def describe() -> dict[str, str]:
    """Device, versions and commit; where there is no repository, OPTAX_GALE_COMMIT says which."""
    commit = os.environ.get("OPTAX_GALE_COMMIT") or _commit()
    return {
        "device": jax.devices()[0].device_kind,
        "devices": str(jax.device_count()),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "optax": optax.__version__,
        "optax_gale": optax_gale.__version__,
        "commit": commit,
    }


def preallocated(share: float | None) -> dict[str, str]:
    """The variables of a process whose allocator takes a share of the GPU's memory at once.

    One that grows piece by piece leaves gaps, and counts them.
    """
    ours = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
    variables = {name: value for name, value in os.environ.items() if name not in ours}
    variables["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
    if share is not None:  # where there is a GPU
        variables["XLA_CLIENT_MEM_FRACTION"] = f"{share:.6f}"
    return variables


def store(stem: Path, lines: Sequence[str], **record: Any) -> None:
    """Writes a table to ``stem.md``, and a record with the environment to ``stem.json``."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    record = {"environment": describe(), **record}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=2, default=str) + "\n")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        return ""
