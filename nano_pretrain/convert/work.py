"""A directory that is filled under another name, goes on after a kill with the next file, and is renamed when whole."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nano_pretrain.checkpoint.checksum import file_checksum
from nano_pretrain.checkpoint.files import sync, write_json
from nano_pretrain.checkpoint.manifest import FileEntry
from nano_pretrain.recipe.errors import RunError, UserError

JOURNAL = "conversion.json"


class Work:
    """The files of a conversion that are whole, and what they are converted from.

    Args:
        final: the directory that comes of it.
        identity: what decides on its content; of another one nothing is kept.

    Attributes:
        directory: where its files are written until then.
        kept: how many files an interrupted conversion has left.

    Raises:
        UserError: another process is at work there.
    """

    def __init__(self, final: Path, identity: Mapping[str, Any]) -> None:
        self._final = final
        self._identity = dict(identity)
        self.directory = final.with_name(f".converting-{final.name}")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock()
        self._files = self._left()
        self.kept = len(self._files)
        for path in self.directory.iterdir():
            if path.name not in {*self._files, JOURNAL}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def has(self, name: str) -> bool:
        """Whether a file is there in full."""
        return name in self._files

    def add(self, name: str, entry: FileEntry, rest: Any = None) -> None:
        """Note that a file is whole and durable.

        Args:
            name: of the file.
            entry: its size and checksum.
            rest: what else is to be known of it, as JSON can hold it.
        """
        self._files[name] = {"entry": asdict(entry), "rest": rest}
        self._write(verified=False)

    def rest(self, name: str) -> Any:
        """What else is known of a file."""
        return self._files[name]["rest"]

    def entries(self) -> dict[str, FileEntry]:
        """Size and checksum of each file."""
        return {name: FileEntry(**file["entry"]) for name, file in self._files.items()}

    def finish(self, verified: bool) -> None:
        """Note all other files that are there, made durable.

        Args:
            verified: whether the conversion was compared with its origin.
        """
        for path in sorted(self.directory.rglob("*")):
            name = str(path.relative_to(self.directory))
            if path.is_file() and name not in {*self._files, JOURNAL}:
                sync(path)
                entry = FileEntry(path.stat().st_size, file_checksum(path))
                self._files[name] = {"entry": asdict(entry), "rest": None}
        self._write(verified)
        sync(self.directory / JOURNAL)

    def forget(self) -> None:
        """Let the next conversion begin anew: what is there is wrong."""
        (self.directory / JOURNAL).unlink(missing_ok=True)

    def publish(self) -> None:
        """Give the directory its name, in the place of one that was there."""
        sync(self.directory)
        remove_replaced(self._final)
        if self._final.exists():
            self._final.rename(_replaced(self._final))
        self.directory.rename(self._final)
        sync(self._final.parent)
        remove_replaced(self._final)

    def _write(self, verified: bool) -> None:
        content = {"identity": self._identity, "verified": verified, "files": self._files}
        write_json(self.directory / JOURNAL, content)

    def _lock(self) -> None:
        self._held = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.directory}: another conversion is at work there; wait for it") from error

    def _left(self) -> dict[str, Any]:
        """Files of an interrupted conversion of the same, in full length."""
        found = read_journal(self.directory)
        if found is None or found["identity"] != self._identity:
            return {}
        there = {path.name: path.stat().st_size for path in self.directory.iterdir()}
        return {name: file for name, file in found["files"].items() if there.get(name) == file["entry"]["size"]}


@contextmanager
def forgotten_if_wrong(work: Work) -> Iterator[None]:
    """Around a verification: what it finds wrong is not gone on with."""
    try:
        yield
    except RunError:
        work.forget()
        raise


def remove_replaced(final: Path) -> None:
    """Remove the directory whose place another one took, also when that was killed before it could."""
    shutil.rmtree(_replaced(final), ignore_errors=True)


def _replaced(final: Path) -> Path:
    return final.with_name(f".replaced-{final.name}")


def read_journal(directory: Path) -> dict[str, Any] | None:
    """What a directory was converted from, and its files; None where it is not one of ours."""
    try:
        found = json.loads((directory / JOURNAL).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    kinds = {"files": dict, "identity": dict, "verified": bool}
    known = isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in kinds.items())
    return found if known else None
