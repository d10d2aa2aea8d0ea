"""What a measurement was made on."""

import os
import platform
import subprocess

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


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        return ""
