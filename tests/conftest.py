"""Devices for the whole suite: 8 CPU devices, or the GPU where OPTAX_GALE_GPU=1 asks for it."""

import os
from importlib.metadata import version

# Factorisations of small matrices gain nothing from threads, and OpenBLAS's would spin against
# XLA's and against the other test processes. Read when SciPy, which JAX imports, is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if version("jaxlib").startswith("0.10."):
    # The other code generator takes several times as long, and compiling is nearly all that these
    # tests do. Later releases leave no choice. In front, so that the caller's own flags win.
    flags = ("--xla_cpu_use_fusion_emitters=false", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = " ".join(flags)

import jax
import pytest

if not os.environ.get("OPTAX_GALE_GPU"):
    # Set here rather than in the environment: a plugin may have imported JAX already.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_modifyitems(items):
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU (run with OPTAX_GALE_GPU=1 on one)")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module")
def quick_compilation():
    """For small numbers, on which XLA's optimisations cost more than they save."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
