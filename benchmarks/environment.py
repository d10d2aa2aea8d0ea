"""What a measurement was made on."""

import platform
import subprocess

import jax
import jaxlib
import optax

import optax_gale


def describe() -> dict[str, str]:
    """Device, versions and commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
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
