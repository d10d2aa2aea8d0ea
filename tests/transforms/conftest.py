"""Quick compilation for every module here."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def always_quick(quick_compilation):
    """Asked for by every test."""


@pytest.fixture
def full_compilation(quick_compilation):
    """For tests that look at the compiled program."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
