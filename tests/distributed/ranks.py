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
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.preloaded"])
HOST = "127.0.0.1"


class RanksFailedError(AssertionError):
    """What went wrong on which ranks, the first one first."""


@dataclass
class _Rank:
    number: int
    process: ForkServerProcess
    answers: Connection
    output: Path

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

    os.setsid()
    os.environ.update(environment)
    with output.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    faulthandler.dump_traceback_later(timeout, exit=True, file=2)
    torch.set_num_threads(1)
    # The checkpoint writer starts a process that would import the main module, that is pytest, again.
    sys.modules["__main__"] = ModuleType("__main__")
    function, args = work
    try:
        answer: tuple[bool, Any] = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(answer))
    sender.close()


def _results(ranks: Sequence[_Rank], deadline: float) -> list[Any]:
    """Collect the answers in the order in which they come; after the first failure, the others have two seconds."""
    results: dict[int, Any] = {}
    failures: list[str] = []
    waiting = {rank.answers: rank for rank in ranks}
    while waiting and time.monotonic() < deadline:
        for connection in wait(list(waiting), max(0.0, deadline - time.monotonic())):
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            good, answer = _answer(rank)
            if good:
                results[rank.number] = answer
                continue
            failures.append(f"rank {rank.number} of {len(ranks)}:\n{answer}")
            deadline = min(deadline, time.monotonic() + 2)
    if failures or waiting:
        silent = [f"rank {rank.number}: still running\n{_said(rank)}" for rank in waiting.values()]
        raise RanksFailedError("\n\n".join([*failures, *silent]))
    return [results[rank.number] for rank in ranks]


def _answer(rank: _Rank) -> tuple[bool, Any]:
    try:
        good, answer = pickle.loads(rank.answers.recv_bytes())
    except EOFError:
        rank.process.join(1)
        return False, f"died, exit code {rank.process.exitcode}, without an answer\n{_said(rank)}"
    return good, answer if good else f"{answer}{_said(rank)}"


def _said(rank: _Rank) -> str:
    text = rank.output.read_text(errors="replace") if rank.output.exists() else ""
    return f"--- output of rank {rank.number} ---\n{text[-8000:]}" if text else ""
