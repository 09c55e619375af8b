"""Rank processes through torch.distributed.elastic. Imports torch: `local` imports this module when it starts ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SubprocessContext, start_processes
from torch.distributed.elastic.utils.distributed import create_c10d_store

from nano_pretrain.launch.parent import LAUNCHER_PID

_HOST = "127.0.0.1"
_ELASTIC_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"


@contextmanager
def running_ranks(
    command: Sequence[str], logs: Sequence[Path | None], threads: int, environment: Mapping[str, str]
) -> Iterator[dict[int, Popen[bytes]]]:
    """Start one process of `command` per entry of `logs`, and kill what is left of them at the end of the context.

    Each process leads a session of its own, so a Ctrl-C of the terminal reaches the launcher only. The rendezvous store
    lives in the launcher (as it does under torchrun): its port is bound before any rank is told of it.

    Args:
        command: program and arguments.
        logs: per rank the file its stdout and stderr are appended to; None leaves both as they are here.
        threads: OMP_NUM_THREADS of each rank.
        environment: variables added to this process's own.

    Yields:
        rank -> process.
    """
    store = create_c10d_store(is_server=True, server_addr=_HOST, server_port=0, wait_for_workers=False)
    variables = {
        rank: {**environment, **_rank_environment(rank, len(logs), threads, store.port)} for rank in range(len(logs))
    }
    with _signals_left_alone():
        context = start_processes(
            name="rank",
            entrypoint="/bin/sh",
            args={rank: _shell_arguments(command, log) for rank, log in enumerate(logs)},
            envs=variables,
            logs_specs=_OutputOfTheShell(),
        )
    if not isinstance(context, SubprocessContext):
        raise TypeError(f"torch.distributed.elastic started a {type(context).__name__} for a program")
    try:
        yield {rank: handler.proc for rank, handler in context.subprocess_handlers.items()}
    finally:
        context.close(signal.SIGKILL)


def _rank_environment(rank: int, ranks: int, threads: int, port: int) -> dict[str, str]:
    """What torch's `env://` rendezvous and megatron-core read, and whose death ends the rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": str(threads),
        LAUNCHER_PID: str(os.getpid()),
        # A log must hold the last words of a rank that is killed.
        **({"PYTHONUNBUFFERED": "1"} if rank else {}),
    }


def _shell_arguments(command: Sequence[str], log: Path | None) -> tuple[str, ...]:
    """Arguments of a shell that becomes `command`: elastic itself would truncate the log of the run's last launch."""
    if log is None:
        return ("-c", 'exec "$@"', "rank", *command)
    return ("-c", 'exec "$@" >>"$0" 2>&1', str(log), *command)


class _OutputOfTheShell(LogsSpecs):
    """Elastic redirects nothing and writes no files."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        nowhere = dict.fromkeys(envs, "")
        return LogsDest(stdouts=nowhere, stderrs=nowhere, error_files=nowhere)

    @property
    def root_log_dir(self) -> str:
        return ""


@contextmanager
def _signals_left_alone() -> Iterator[None]:
    """Keep elastic from replacing the launcher's signal handlers by ones that raise.

    The variable is what torchrun's --signals-to-handle sets; it cannot be empty, so SIGQUIT is given and put back.
    """
    set_before = os.environ.get(_ELASTIC_SIGNALS)
    on_quit = signal.getsignal(signal.SIGQUIT)
    os.environ[_ELASTIC_SIGNALS] = signal.SIGQUIT.name
    try:
        yield
    finally:
        signal.signal(signal.SIGQUIT, on_quit)
        if set_before is None:
            del os.environ[_ELASTIC_SIGNALS]
        else:
            os.environ[_ELASTIC_SIGNALS] = set_before
