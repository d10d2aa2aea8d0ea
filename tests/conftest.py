"""Devices for the whole suite: 8 CPU devices, or the GPU where OPTAX_GALE_GPU=1 asks for it."""

import gc
import os
from contextlib import contextmanager, nullcontext
from importlib.metadata import version

# Factorisations of small matrices gain nothing from threads, and OpenBLAS's would spin against
# XLA's and against the other test processes. Read when SciPy, which JAX imports, is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The size of XLA's thread pool, otherwise that of the devices below: programs on all of them would
# then hold all threads, and LAPACK's batches wait for more. Read when JAX's client is made.
os.environ.setdefault("NPROC", "32")

if version("jaxlib").startswith("0.10."):
    # The other code generator takes several times as long, and compiling is nearly all that these
    # tests do. Later releases leave no choice. A program in one piece, rather than in 32 for as
    # many threads, costs up to a sixth less. In front, so that the caller's own flags win.
    flags = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
    os.environ["XLA_FLAGS"] = " ".join((*flags, os.environ.get("XLA_FLAGS", "")))

import jax
import pytest

if not os.environ.get("OPTAX_GALE_GPU"):
    # Set here rather than in the environment: a plugin may have imported JAX already.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)


@pytest.hookimpl(tryfirst=True)  # before `-m` looks
def pytest_collection_modifyitems(config, items):
    unknown = {}
    for item in items:
        quick = item.get_closest_marker("quick")
        if quick is None:
            continue
        test = item.nodeid.partition("[")[0]
        unknown.setdefault(test, {*quick.args}).discard(item.callspec.id)
        if item.callspec.id not in quick.args:
            item.add_marker(pytest.mark.slow)
    wrong = {test: ids for test, ids in unknown.items() if ids}
    if wrong and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"marked quick, but there is no such parametrization: {wrong}")
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU (run with OPTAX_GALE_GPU=1 on one)")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish():
    # What is imported by now stays: the collector, which JAX's tracing keeps busy, may pass it by.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)


@contextmanager
def compiling_quickly():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def quick_compilation():
    """For small numbers, on which XLA's optimisations cost more than they save."""
    with compiling_quickly():
        yield


class QuickDocstrings:
    """Quick compilation for the examples in docstrings, which fixtures from here do not reach."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        with compiling_quickly() if isinstance(item, pytest.DoctestItem) else nullcontext():
            return (yield)


def pytest_configure(config):
    config.pluginmanager.register(QuickDocstrings())


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Compiles what several tests have in common once: compiling is most of what they do.

    All processes of a run share it. The value is the environment for those that tests start.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of one process lies in that of the run
    options = {
        "jax_compilation_cache_dir": str(folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield {name.upper(): str(value) for name, value in options.items()}
    for name, value in before.items():
        jax.config.update(name, value)
