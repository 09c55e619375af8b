"""Settings and fixtures of all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from nano_pretrain.platform import Platform

# Before torch is imported: test processes share the cores, and idle OpenMP threads spin. A trainer sets its own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Reproducible: the examples follow from the test's own code. No deadline: the first example pays for what is imported.
settings.register_profile("quick", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("quick")


LONGEST = ("train", "distributed", "peers")
"""Directories whose files take tens of seconds each."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: workers that take a file at a time then end together."""
    items.sort(key=lambda item: item.path.parent.name not in LONGEST)


@pytest.fixture(autouse=True)
def denormals_are_kept() -> Iterator[None]:
    """A platform flushes denormals in its process, and hypothesis refuses to draw floats where they are flushed."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Platform]:
    """The platform in this process, with the process groups of one rank."""
    import torch

    from nano_pretrain.parallel.groups import Ranks, process_groups
    from nano_pretrain.platform import current_platform
    from nano_pretrain.recipe.schema import ParallelConfig

    found = current_platform()
    found.prepare(0, threads=1)
    torch.set_flush_denormal(False)
    with process_groups(found, Ranks(0, 1, 0), ParallelConfig(), timeout_seconds=60):
        yield found


@pytest.fixture
def platform(one_rank: Platform) -> Platform:
    """As `one_rank`, with the platform's warning filters, which pytest forgets after each test."""
    from nano_pretrain.platform import current_platform

    current_platform()
    return one_rank
