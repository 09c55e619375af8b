"""Settings of all tests."""

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Before torch is imported: test processes share the cores, and idle OpenMP threads spin. A trainer sets its own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Reproducible: the examples follow from the test's own code. No deadline: the first example pays for what is imported.
settings.register_profile("quick", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def denormals_are_kept() -> Iterator[None]:
    """A platform flushes denormals in its process; hypothesis refuses to draw floats where they are flushed."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
