"""The jobs of --multirun, one after the other."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from nano_pretrain.launch.heeding import heeding
from nano_pretrain.recipe.errors import EXIT_CONTINUE, EXIT_DONE, EXIT_FAILED

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_POLL_SECONDS = 0.1


def run_in_turn(commands: Sequence[Sequence[str]]) -> int:
    """Run each command to its end; a request to stop is passed on to the one that runs, and none is started after it.

    Call it in the main thread; the signal handlers of this process are put back at the end.

    Returns:
        The largest exit code; a job that a signal killed counts as failed.
    """
    codes = [EXIT_DONE]
    with _stop_requests() as requests:
        for command in commands:
            if requests or codes[-1] == EXIT_CONTINUE:
                codes.append(EXIT_CONTINUE)
                break
            codes.append(_run(command, requests))
    return max(codes)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Signals that ask to stop, noted from before the first job starts until the last has ended."""
    requests: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        requests.append(number)

    with heeding(_STOP, note):
        yield requests


def _run(command: Sequence[str], requests: Sequence[int]) -> int:
    # A session of its own: Ctrl-C of the terminal reaches the job once, from here.
    with subprocess.Popen(command, start_new_session=True) as process:
        code, passed_on = None, 0
        while code is None:
            for number in requests[passed_on:]:
                process.send_signal(number)
                passed_on += 1
            code = _code(process)
    return EXIT_FAILED if code < 0 else code


def _code(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code, or None when the process still runs after a moment.

    A wait without end would never see a signal that was noted just before it began.
    """
    try:
        return process.wait(timeout=_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None
