"""Files of a run's directory: one trainer at a time, whole or absent, and nothing past the checkpoint."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from nano_pretrain.checkpoint.files import write_whole
from nano_pretrain.recipe.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCK = ".lock"
STREAMS = ("metrics.jsonl", "validation.jsonl", "fp8.jsonl", "evaluation.jsonl", "harness.jsonl")
"""Files with one line per event, in the order of the consumed tokens."""


@contextmanager
def only_trainer(run_dir: Path) -> Iterator[None]:
    """Hold the directory; the kernel lets go of it whatever ends this process.

    A record lock (fcntl(2)): unlike flock's it is not shared with forked children, which may outlive a killed trainer.

    Raises:
        UserError: another trainer holds it, or it cannot be written.
    """
    with _open_lock(run_dir) as lock:
        _hold(lock, run_dir)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextmanager
def full_disk_is_the_users_to_mend() -> Iterator[None]:
    """Turn "no space left on device" into a line that says what to do.

    Raises:
        UserError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(
            f"run.dir: the disk is full, {error.filename or 'a file'} was not written; free space and run again"
        ) from error


def check_not_held(run_dir: Path) -> None:
    """Refuse a directory in which a trainer is at work; leaves nothing behind.

    Raises:
        UserError: another trainer holds it, or it cannot be written.
    """
    if (run_dir / LOCK).exists():
        with _open_lock(run_dir) as lock:
            _hold(lock, run_dir)


def _open_lock(run_dir: Path) -> TextIO:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return (run_dir / LOCK).open("a+")
    except OSError as error:
        problem = f"cannot write {error.filename} ({error.strerror})"
        raise UserError(f"run.dir: {problem}; choose another run.dir") from error


def _hold(lock: TextIO, run_dir: Path) -> None:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        raise UserError(
            f"run.name: another trainer (process {holder}) is running in {run_dir}; "
            "wait for it or choose another run.name"
        ) from None


def truncate_streams(run_dir: Path, tokens: int) -> None:
    """Drop every line past `tokens` consumed tokens, and a torn last one."""
    for name in STREAMS:
        path = run_dir / name
        if path.exists():
            kept = [line for line in path.read_text(errors="replace").splitlines() if _tokens_of(line) <= tokens]
            write_whole(path, "".join(f"{line}\n" for line in kept))


def _tokens_of(line: str) -> float:
    try:
        return float(json.loads(line)["tokens"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
