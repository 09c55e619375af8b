"""Several commands at a time, each in a process that ends with this one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nano_pretrain.launch.parent import LAUNCHER_PID
from nano_pretrain.recipe.errors import EXIT_DONE, EXIT_FAILED

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """A `train` command, and the file that its output is appended to."""

    name: str
    command: tuple[str, ...]
    log: Path


def run_jobs(jobs: Sequence[Job], at_once: int, show: Callable[[int], None]) -> None:
    """Run all of them; if one fails, or an exception comes, those that run are asked to stop and waited for.

    Call it in the main thread: trainers that it starts end with this thread, even if it is killed.

    Args:
        jobs: what to run, in this order.
        at_once: jobs at a time.
        show: told again and again how many jobs have not ended.

    Raises:
        SystemExit: a job failed, which has been said.
    """
    waiting, running = deque(jobs), dict[Job, subprocess.Popen[bytes]]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.popleft()
                running[job] = start(job)
            time.sleep(POLL_SECONDS)
            drop_ended(running)
            show(len(waiting) + len(running))
    finally:
        stop(running)


def start(job: Job) -> subprocess.Popen[bytes]:
    """A process of a job; a trainer takes this process for its launcher, and does not outlive it."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a") as out:
        environment = {**os.environ, LAUNCHER_PID: str(os.getpid())}
        return subprocess.Popen(job.command, stdout=out, stderr=subprocess.STDOUT, env=environment)


def drop_ended(running: dict[Job, subprocess.Popen[bytes]]) -> None:
    """Take jobs that have ended off the list.

    Raises:
        SystemExit: one failed; stderr says so.
    """
    for job, process in list(running.items()):
        if (code := process.poll()) is None:
            continue
        del running[job]
        if code != EXIT_DONE:
            said = job.log.read_text(errors="replace").splitlines()
            print(f"{job.name} ended with code {code}: {said[-1] if said else ''} ({job.log})", file=sys.stderr)
            raise SystemExit(code if code > 0 else EXIT_FAILED)


def stop(running: dict[Job, subprocess.Popen[bytes]]) -> None:
    """Ask jobs to stop, and wait until they have."""
    for process in running.values():
        process.terminate()
    if running:
        print(f"waiting for {', '.join(job.name for job in running)} to stop", file=sys.stderr)
    for process in running.values():
        process.wait()
