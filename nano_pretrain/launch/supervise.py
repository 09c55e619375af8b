"""Watch ranks until the last one has ended: forward stop requests, end the hopeless, tell who failed first."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from math import inf
from subprocess import Popen

from nano_pretrain.recipe.errors import EXIT_CONTINUE, EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR

POLL_SECONDS = 0.05
PEER_SECONDS = 5.0
"""How long the other ranks may live on when one is gone: time to report for themselves what is wrong with all of them.
After that they wait for the lost one in a collective."""


class Cause(Enum):
    """Why a rank ended."""

    ITSELF = auto()
    """It exited, or something outside this launcher killed it."""
    ON_REQUEST = auto()
    """It died of a signal that was forwarded to it."""
    GRACE_OVER = auto()
    """Killed here: it had not stopped within the grace time."""
    PEER_GONE = auto()
    """Killed here: another rank was gone."""


@dataclass(frozen=True)
class End:
    """How one rank ended; `code` is its exit code, negative for the number of the signal that killed it."""

    rank: int
    code: int
    cause: Cause

    @property
    def failed(self) -> bool:
        """Whether the rank failed, as opposed to being done, stopping on request or falling with another."""
        if self.cause is Cause.ITSELF:
            return self.code not in (EXIT_DONE, EXIT_CONTINUE)
        return self.cause is Cause.GRACE_OVER


@dataclass(frozen=True)
class Outcome:
    """How all ranks ended, in that order."""

    ends: tuple[End, ...]

    @property
    def failure(self) -> End | None:
        """The rank to blame: the first that failed, but one that blames the user before one that merely crashed.

        A rank that loses its peer may well end before the peer does; it never ends with the code of a user error.
        """
        failures = [end for end in self.ends if end.failed]
        if not failures or failures[0].code < 0:
            return next(iter(failures), None)
        return next((end for end in failures if end.code == EXIT_USER_ERROR), failures[0])

    @property
    def code(self) -> int:
        """Exit code of the launch."""
        failure = self.failure
        if failure is not None:
            return EXIT_USER_ERROR if failure.code == EXIT_USER_ERROR else EXIT_FAILED
        return EXIT_CONTINUE if any(end.code != EXIT_DONE for end in self.ends) else EXIT_DONE


class Supervisor:
    """Waits for ranks.

    Args:
        ranks: rank -> process, each the leader of its own session.
        requests: signals to forward; handlers append to it while `run` waits.
        grace_seconds: time between the first request and the end of the ranks that are still there.
    """

    def __init__(
        self, ranks: Mapping[int, Popen[bytes]], requests: deque[signal.Signals], grace_seconds: float
    ) -> None:
        self._running = dict(ranks)
        self._requests = requests
        self._grace_seconds = grace_seconds
        self._forwarded: set[int] = set()
        self._killed: dict[int, Cause] = {}
        self._grace_ends = inf
        self._peers_end = inf
        self._ends: list[End] = []

    def run(self) -> Outcome:
        """Return when every rank has ended."""
        while self._running:
            self._forward_requests()
            self._collect()
            if time.monotonic() >= min(self._grace_ends, self._peers_end):
                self._kill_running()
            time.sleep(POLL_SECONDS)
        return Outcome(tuple(self._ends))

    def _forward_requests(self) -> None:
        while self._requests:
            request = self._requests.popleft()
            self._forwarded.add(request)
            self._grace_ends = min(self._grace_ends, time.monotonic() + self._grace_seconds)
            for process in self._running.values():
                process.send_signal(request)

    def _collect(self) -> None:
        ended = {rank: code for rank, process in self._running.items() if (code := process.poll()) is not None}
        # Of ranks that end at the same time, one that was killed cannot be the victim of one that exited.
        for rank in sorted(ended, key=lambda rank: ended[rank] >= 0):
            del self._running[rank]
            end = End(rank, ended[rank], self._cause(rank, ended[rank]))
            self._ends.append(end)
            if end.failed or end.cause is Cause.ON_REQUEST:
                self._peers_end = min(self._peers_end, time.monotonic() + PEER_SECONDS)

    def _cause(self, rank: int, code: int) -> Cause:
        if -code in self._forwarded:
            return Cause.ON_REQUEST
        return self._killed.get(rank, Cause.ITSELF) if code == -signal.SIGKILL else Cause.ITSELF

    def _kill_running(self) -> None:
        cause = Cause.PEER_GONE if self._peers_end <= self._grace_ends else Cause.GRACE_OVER
        for rank, process in self._running.items():
            self._killed.setdefault(rank, cause)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
