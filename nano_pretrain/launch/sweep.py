"""The jobs of --multirun, one after the other."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from types import FrameType

from nano_pretrain.recipe.errors import EXIT_CONTINUE, EXIT_DONE, EXIT_FAILED

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def run_in_turn(commands: Sequence[Sequence[str]]) -> int:
    """Run each command to its end; a request to stop is passed on to the one that runs, and none is started after it.

    Returns:
        The largest exit code; a job that a signal killed counts as failed.
    """
    codes = [EXIT_DONE]
    for command in commands:
        codes.append(_run(command))
        if codes[-1] == EXIT_CONTINUE:
            break
    return max(codes)


def _run(command: Sequence[str]) -> int:
    # A session of its own: Ctrl-C of the terminal reaches the job once, from here.
    with subprocess.Popen(command, start_new_session=True) as process:

        def forward(number: int, frame: FrameType | None) -> None:
            process.send_signal(number)

        previous = {number: signal.signal(number, forward) for number in _STOP}
        try:
            code = process.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    return EXIT_FAILED if code < 0 else code
