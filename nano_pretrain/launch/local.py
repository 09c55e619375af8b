"""Start the ranks of a run on this machine and return how they ended."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from nano_pretrain.launch.heeding import heeding
from nano_pretrain.launch.supervise import Cause, End, Outcome, Supervisor
from nano_pretrain.recipe.errors import EXIT_USER_ERROR, UserError

SHOWN_LINES = 20
SHOWN_RANKS = 3
_TAIL_BYTES = 65_536

_FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR1: signal.SIGUSR1,
    # The terminal is gone. A trainer knows SIGTERM as a request to stop; SIGHUP would kill it.
    signal.SIGHUP: signal.SIGTERM,
}


def launch_local(
    command: Sequence[str],
    ranks: int,
    *,
    grace_seconds: float,
    log_dir: Path,
    threads_per_rank: int | None,
    environment: Mapping[str, str],
) -> int:
    """Run `ranks` processes of `command` until all have ended.

    Rank 0 writes to this process's stdout and stderr, every other rank is appended to `log_dir`/rank-N.log. SIGTERM,
    SIGINT, SIGUSR1 and the loss of the terminal are passed on to every rank, each once; ranks still there after
    `grace_seconds` are killed. When a rank is gone the others get a few seconds to end by themselves. Call it in the
    main thread; the signal handlers of this process are put back at the end.

    Args:
        command: program and arguments; each rank gets the variables that torch's `env://` rendezvous reads.
        ranks: processes to start.
        grace_seconds: time for a checkpoint between a stop request and the end.
        log_dir: directory of the logs, made when it is missing.
        threads_per_rank: OMP_NUM_THREADS; None divides the cores this process may use.
        environment: variables of the ranks beside those of this process.

    Returns:
        0 all are done; 75 they stopped on request; 2 the user's input is wrong; 1 anything else. What the rank that
        failed for itself says counts, not what its peers say.

    Raises:
        UserError: the log directory cannot be written.
    """
    logs = _open_logs(log_dir, ranks)
    lengths = [log.stat().st_size if log else 0 for log in logs]
    with _stop_requests() as requests:
        from nano_pretrain.launch.ranks import running_ranks

        threads = threads_per_rank or max(1, len(os.sched_getaffinity(0)) // ranks)
        with running_ranks(command, logs, threads, environment) as processes:
            outcome = Supervisor(processes, requests, grace_seconds).run()
    _explain(outcome, logs, lengths)
    return outcome.code


def _open_logs(log_dir: Path, ranks: int) -> list[Path | None]:
    """Per rank the log, which then exists; None for rank 0."""
    logs = [log_dir / f"rank-{rank}.log" for rank in range(1, ranks)]
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        for log in logs:
            log.touch()
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror}); choose another run.dir") from error
    return [None, *logs]


@contextmanager
def _stop_requests() -> Iterator[deque[signal.Signals]]:
    """Collect signals that ask the ranks to stop, from before the first of them starts."""
    requests: deque[signal.Signals] = deque()

    def note(number: int, _frame: FrameType | None) -> None:
        requests.append(_FORWARDED[signal.Signals(number)])

    # nohup promises that SIGHUP does nothing.
    heeded = [number for number in _FORWARDED if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    with heeding(heeded, note):
        yield requests


def _explain(outcome: Outcome, logs: Sequence[Path | None], lengths: Sequence[int]) -> None:
    """Say on stderr who failed, first of all the rank to blame, unless rank 0 has already told the user."""
    failure = outcome.failure
    if failure is None or (failure.code == EXIT_USER_ERROR and (0, EXIT_USER_ERROR) in _codes(outcome)):
        return
    others = [end for end in outcome.ends if end.failed and end is not failure]
    for end in [failure, *others][:SHOWN_RANKS]:
        _show(end, logs[end.rank], lengths[end.rank])
    fallen = sorted(end.rank for end in outcome.ends if end.cause is Cause.PEER_GONE)
    if fallen:
        print(f"launch: ended with it: rank {', '.join(map(str, fallen))}", file=sys.stderr)


def _codes(outcome: Outcome) -> set[tuple[int, int]]:
    return {(end.rank, end.code) for end in outcome.ends}


def _show(end: End, log: Path | None, start: int) -> None:
    place = f"the end of {log}:" if log else "its output is above"
    print(f"launch: rank {end.rank} {_describe(end)}; {place}", file=sys.stderr)
    if log:
        print(_tail(log, start), file=sys.stderr)


def _describe(end: End) -> str:
    if end.cause is Cause.GRACE_OVER:
        return "did not stop within launch.grace_seconds and was killed"
    if end.code < 0:
        hint = "; out of memory?" if end.code == -signal.SIGKILL else ""
        return f"was killed by signal {-end.code} ({signal.strsignal(-end.code)}{hint})"
    return f"failed with exit code {end.code}"


def _tail(log: Path, start: int) -> str:
    """The last lines that were written after byte `start`."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-SHOWN_LINES:]) or "  (nothing was written)"
