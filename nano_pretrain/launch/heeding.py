"""Signal handlers for a while."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def heeding(numbers: Iterable[int], note: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Call `note` for these signals; the handlers of before are put back at the end. For the main thread."""
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
