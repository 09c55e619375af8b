"""Settings of all tests."""

import os

from hypothesis import settings

# Before torch is imported: several test processes share the cores, and idle OpenMP threads spin. A trainer sets its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Reproducible: the examples follow from the test's own code. No deadline: the first example pays for what is imported.
settings.register_profile("quick", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("quick")
