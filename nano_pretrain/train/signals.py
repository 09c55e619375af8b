"""Stop requests: SIGTERM, SIGINT and SIGUSR1 set a flag that the ranks agree on between steps."""

from __future__ import annotations

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether this rank was asked to stop.

    A second SIGINT falls through to Python's default, so that an impatient Ctrl-C ends a run that hangs.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def listen(self) -> None:
        """Install the handlers; call it from the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        if os.environ.get("RANK", "0") == "0":
            again = " (Ctrl-C again: at once, without)" if number == signal.SIGINT else ""
            # Not print: a handler may interrupt one.
            os.write(2, f"{self.signal_name}: stopping after this step with a checkpoint{again}\n".encode())
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
