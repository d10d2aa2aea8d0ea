"""What the tests of whole steps share."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def always_quick(quick_compilation):
    """Asked for by every test."""
