"""Processes of their own to measure in, and the memory of this one. Imports no torch."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (peak) of this process."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a process that did nothing before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
