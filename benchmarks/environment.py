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
