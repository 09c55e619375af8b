"""What the operating system does with this process and its children when a parent dies; imports no torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from functools import cache

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends, even of SIGKILL; only on Linux.

    Raises:
        OSError: the kernel refused the request.

    Source: prctl(2), PR_SET_PDEATHSIG.
    """
    _death_signal()()


@cache
def children_end_with_this_process() -> None:
    """Let processes that this one forks from now on end with it; its main thread has to fork them.

    megatron-core's checkpoint writer forks. A writer whose rank was killed waits for it for ever, with all memory and
    files of the rank. Programs that are started with `subprocess` are not touched.
    """
    # Looked up before a fork: in the child of a process with threads nobody may be left to release the loader's lock.
    request = _death_signal()
    parents: list[int] = []

    def in_child() -> None:
        request()
        # The parent may have died before the request was in place.
        if os.getppid() != parents[-1]:
            os._exit(1)

    os.register_at_fork(before=lambda: parents.append(os.getpid()), after_in_child=in_child)


def _death_signal() -> Callable[[], None]:
    if sys.platform != "linux":
        return lambda: None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def request() -> None:
        if prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")

    return request
