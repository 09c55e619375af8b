"""Files of a run's directory: one trainer at a time, whole or absent, and nothing past the checkpoint."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from nano_pretrain.recipe.errors import UserError

LOCK = ".lock"
STREAMS = ("metrics.jsonl", "validation.jsonl")
"""Files with one line per event, in the order of the consumed tokens."""


@contextmanager
def only_trainer(run_dir: Path) -> Iterator[None]:
    """Hold the directory; the kernel lets go of it whatever ends this process.

    Raises:
        UserError: another trainer holds it, or it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / LOCK).open("a+")
    except OSError as error:
        problem = f"cannot write {error.filename} ({error.strerror})"
        raise UserError(f"run.dir: {problem}; choose another run.dir") from error
    with lock:
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
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"run.dir: the disk is full, {error.filename or 'a file'} was not written; free space and run again"
        ) from error


def check_not_held(run_dir: Path) -> None:
    """Refuse a directory in which a trainer is at work; leaves nothing behind.

    Raises:
        UserError: another trainer holds it.
    """
    if (run_dir / LOCK).exists():
        with (run_dir / LOCK).open() as lock:
            _hold(lock, run_dir)


def _hold(lock: TextIO, run_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        raise UserError(
            f"run.name: another trainer (process {holder}) is running in {run_dir}; "
            "wait for it or choose another run.name"
        ) from None


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old content or the new."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """`write_whole` for a JSON document."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Add one JSON line."""
    with path.open("a") as stream:
        stream.write(json.dumps(content) + "\n")


def truncate_streams(run_dir: Path, tokens: int) -> None:
    """Drop every line past `tokens` consumed tokens, and a torn last one."""
    for name in STREAMS:
        path = run_dir / name
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _tokens_of(line) <= tokens]
            write_whole(path, "".join(f"{line}\n" for line in kept))


def _tokens_of(line: str) -> float:
    try:
        return float(json.loads(line)["tokens"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
