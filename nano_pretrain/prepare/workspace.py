"""The directory a corpus, or what is added to one, is built in: beside its place, one builder at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nano_pretrain.checkpoint.files import sync
from nano_pretrain.recipe.errors import UserError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST})
LOCK_NAME = ".lock"


@contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """Give an empty directory that becomes `target` when the block ends well, and is removed when it does not.

    What a killed run left is removed by the next one; `target` never holds anything that is not whole.

    Raises:
        UserError: another process is building the same corpus, the disk is full, or the place cannot be written.
    """
    with _claimed(target.with_name(f".{target.name}.partial"), target) as partial:
        yield partial
        with _disk_errors_explained(target, FULL | REFUSED):
            # The lock moves with the directory: whoever waits for it finds it gone and starts anew.
            partial.rename(target)
            (target / LOCK_NAME).unlink()


@contextmanager
def annex(target: Path) -> Iterator[Path]:
    """Give an empty directory inside the corpus `target`, on the same disk, that is removed when the block ends.

    Raises:
        UserError: see `workspace`.
    """
    with _claimed(target / ".adding", target) as partial:
        yield partial


def move_in(partial: Path, target: Path, last: str) -> None:
    """Move all files of a directory to their places below `target`, each durable before the file `last` comes.

    Args:
        partial: from `annex`.
        target: the corpus.
        last: the file, directly in both directories, that says what there is: before it is there nothing has changed.

    Raises:
        UserError: the corpus cannot be written.
    """
    files = [path for path in partial.rglob("*") if path.is_file() and path.name not in (LOCK_NAME, last)]
    for path in [*files, partial / last]:
        sync(path)
    places = {path: target / path.relative_to(partial) for path in files}
    with _disk_errors_explained(target, REFUSED):
        for path, place in places.items():
            path.replace(place)
        for directory in {place.parent for place in places.values()}:
            sync(directory)
        (partial / last).replace(target / last)
        sync(target)


@contextmanager
def _claimed(partial: Path, target: Path) -> Iterator[Path]:
    with _disk_errors_explained(target, FULL | REFUSED):
        lock = _claim(partial)
    try:
        with _disk_errors_explained(target, FULL):
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _claim(partial: Path) -> int:
    """Make the directory, lock it for as long as the returned descriptor is open, and empty it."""
    lock_file = partial / LOCK_NAME
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"data.path: another process is preparing {partial}; wait for it") from None
        # Between opening and locking, its owner may have renamed or removed it: then it locks nothing.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock_file.stat()):
                break
        os.close(descriptor)
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry != lock_file:
            entry.unlink()
    return descriptor


@contextmanager
def _disk_errors_explained(target: Path, which: frozenset[int]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in which:
            raise
        if error.errno in FULL:
            raise UserError(f"data.path: no space left for {target}; free some, or choose another data.path") from error
        raise UserError(f"data.path: cannot write {target} ({error.strerror}); choose another data.path") from error
