"""A bar of bytes on stderr, and how fast they were."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextmanager
def timed_bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives what takes the bytes that are done since it was called last; says at the end how fast they were.

    Args:
        text: what is done.
        total: bytes in all.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    began = time.perf_counter()
    with Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stderr)) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.advance(task, done)
    seconds = time.perf_counter() - began
    print(f"{text}: {total / 1e9:,.2f} GB in {seconds:,.1f} s, {total / 1e9 / max(seconds, 1e-9):.2f} GB/s")
