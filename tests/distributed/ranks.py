"""Run a function on several ranks, each a process of its own with gloo over loopback.

The processes are forked from a server that has imported torch and megatron-core (unadapted), so that starting one takes
a moment. A rank that fails is shown with its traceback, before those that failed because of it. Nothing hangs: a rank
ends itself after the timeout with the stack of each of its threads, even when the tests are gone.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.preloaded"])
HOST = "127.0.0.1"


class RanksFailedError(AssertionError):
    """What went wrong on which ranks, the first one first."""


@dataclass(frozen=True)
class _Answer:
    """What became of a rank: its result or what went wrong, and when (seconds of the clock that all share)."""

    good: bool
    value: Any
    time: float


@dataclass(frozen=True)
class _Rank:
    number: int
    process: ForkServerProcess
    answers: Connection
    output: Path

    def answer(self) -> _Answer:
        """Its answer, after the pipe or the end of the process has announced it; who dies without one died first."""
        if self.answers.poll():
            with suppress(EOFError):
                answer: _Answer = pickle.loads(self.answers.recv_bytes())
                return answer
        self.process.join(1)
        return _Answer(False, f"died, exit code {self.process.exitcode}, without an answer\n", 0.0)

    def said(self) -> str:
        """The end of its output."""
        text = self.output.read_text(errors="replace") if self.output.exists() else ""
        return f"--- output of rank {self.number} ---\n{text[-8000:]}" if text else ""

    def kill(self) -> None:
        """End the process and those it started: it leads a process group, unless it has only just been forked."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """What `function(*args)` returns on each rank, in the order of the ranks.

    Args:
        function: function of a module, with picklable arguments and result; RANK and the like are in its environment.
        world_size: number of ranks.
        *args: its arguments.
        timeout: seconds after which a rank ends itself.

    Raises:
        RanksFailedError: a rank raised, died or took too long.
    """
    with tempfile.TemporaryDirectory() as directory, _store() as port:
        ranks = [_start(r, world_size, port, Path(directory), (function, args), timeout) for r in range(world_size)]
        try:
            return _results(ranks, time.monotonic() + timeout + 10)
        finally:
            for rank in ranks:
                rank.kill()


@contextmanager
def _store() -> Iterator[int]:
    """The rendezvous store; it lives here, so that its port is bound before a rank is told of it."""
    import torch.distributed as dist

    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    yield store.port
    del store


def _start(number: int, world_size: int, port: int, directory: Path, work: Any, timeout: float) -> _Rank:
    receiver, sender = CONTEXT.Pipe(duplex=False)
    output = directory / f"rank-{number}"
    environment = {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    process = CONTEXT.Process(target=_main, args=(sender, output, environment, work, timeout))
    process.start()
    sender.close()
    return _Rank(number, process, receiver, output)


def _main(sender: Connection, output: Path, environment: dict[str, str], work: Any, timeout: float) -> None:
    """The life of a rank."""
    import torch
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    os.setsid()
    os.environ.update(environment)
    with output.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    faulthandler.dump_traceback_later(timeout, exit=True, file=2)
    torch.set_num_threads(1)
    # megatron-core's checkpoint writer would start a fresh process for its queue, which imports torch again.
    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
    function, args = work
    try:
        answer = _Answer(True, function(*args), time.monotonic())
    except BaseException:
        answer = _Answer(False, traceback.format_exc(), time.monotonic())
    sender.send_bytes(pickle.dumps(answer))
    sender.close()


def _results(ranks: Sequence[_Rank], deadline: float) -> list[Any]:
    """The results, or the failures in the order in which they happened; after the first, ranks have two seconds."""
    answers: dict[int, _Answer] = {}
    while len(answers) < len(ranks) and time.monotonic() < deadline:
        waiting = [rank for rank in ranks if rank.number not in answers]
        # A death shows at the sentinel only: processes that a rank has started hold its pipe open.
        ends = [end for rank in waiting for end in (rank.answers, rank.process.sentinel)]
        ready = wait(ends, max(0.0, deadline - time.monotonic()))
        for rank in waiting:
            if rank.answers in ready or rank.process.sentinel in ready:
                answers[rank.number] = rank.answer()
                if not answers[rank.number].good:
                    deadline = min(deadline, time.monotonic() + 2)
    silent = _Answer(False, "still running\n", float("inf"))
    outcomes = [(answers.get(rank.number, silent), rank) for rank in ranks]
    failures = sorted((outcome for outcome in outcomes if not outcome[0].good), key=lambda outcome: outcome[0].time)
    if failures:
        texts = [f"rank {rank.number} of {len(ranks)}:\n{answer.value}{rank.said()}" for answer, rank in failures]
        raise RanksFailedError("\n\n".join(texts))
    return [answer.value for answer, _ in outcomes]
