"""Reading the tensors of a Hugging Face checkpoint: safetensors, one file or several with an index."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from nano_pretrain.checkpoint.checksum import file_checksum
from nano_pretrain.checkpoint.manifest import FileEntry
from nano_pretrain.convert.safetensors_file import DTYPES
from nano_pretrain.convert.work import JOURNAL, read_journal
from nano_pretrain.recipe.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PREFIX, PREFIX_IN_TRANSFORMERS = "backbone.", "model."
OPEN_FILES = 2
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.nemo")


class HfReader:
    """Tensors of a checkpoint by the names of the table; nothing of it is executed or unpickled.

    Args:
        directory: of the checkpoint.

    Attributes:
        directory: see above.
        shapes: shape of each tensor.
        files: names of its safetensors files.

    Raises:
        UserError: there is no such checkpoint, or a file is missing, truncated or no safetensors file; also when a
            tensor is read of a file that is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        weight_map = _weight_map(directory)
        self.files = sorted(set(weight_map.values())) or [SINGLE]
        self._exported = _exported(directory)
        self._check = cache(self._check_file)
        self._open = lru_cache(OPEN_FILES)(self._open_file)
        self._places: dict[str, tuple[str, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for file in self.files:
            self._read_header(file, weight_map)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._dtypes[name]

    def rows(self, name: str, start: int, count: int) -> Tensor:
        """Rows [start, start + count) of a tensor."""
        file, stored = self._places[name]
        self._check(file)
        rows: Tensor = self._open(file).get_slice(stored)[start : start + count]
        return rows

    def identity(self) -> list[list[Any]]:
        """Name, size, time of the last change and, where `export` has left it, checksum of each file."""
        known = [(file, (self.directory / file).stat()) for file in self.files]
        return [[file, found.st_size, found.st_mtime_ns, self._checksum(file)] for file, found in known]

    def _check_file(self, file: str) -> None:
        """Compare a file with the checksum that `export` has left beside it, if any, before its tensors are read."""
        path, checksum = self.directory / file, self._checksum(file)
        if checksum is not None and file_checksum(path) != checksum:
            raise UserError(f"{path}: damaged, {JOURNAL} beside it has another checksum; fetch or export it again")

    def _checksum(self, file: str) -> str | None:
        return self._exported[file].xxh3 if file in self._exported else None

    def _open_file(self, file: str) -> Any:
        with (self.directory / file).open("rb") as stream:
            # It is mapped, and page faults alone read it slowly.
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        return safe_open(str(self.directory / file), framework="pt")

    def _read_header(self, file: str, weight_map: Mapping[str, str]) -> None:
        path = self.directory / file
        try:
            opened = self._open_file(file)
        except FileNotFoundError:
            raise UserError(f"{path}: missing, the index names it; fetch the checkpoint again") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated or no safetensors file ({error}); fetch it again") from error
        for stored in opened.keys():  # noqa: SIM118 - it is no mapping
            entry = opened.get_slice(stored)
            name = canonical(stored)
            if name in self._places:
                raise UserError(f"{path}: tensor {stored} is there twice, also as {self._places[name][1]}; remove one")
            self._places[name] = (file, stored)
            self.shapes[name] = tuple(entry.get_shape())
            self._dtypes[name] = _dtype(path, stored, entry.get_dtype())
        there = {name for name, (place, _) in self._places.items() if place == file}
        named = {canonical(name) for name, place in weight_map.items() if place == file}
        for name in sorted(named - there):
            raise UserError(f"{path}: has no tensor {name}, which the index says it has; fetch it again")
        for name in sorted(there - named if weight_map else ()):
            raise UserError(f"{path}: has a tensor {name}, which the index does not say it has; fetch both again")


def _exported(directory: Path) -> dict[str, FileEntry]:
    """Size and checksum of each file, where `export` has left them."""
    journal = read_journal(directory)
    if journal is None and not (directory / JOURNAL).exists():
        return {}
    try:
        return {name: FileEntry(**file["entry"]) for name, file in (journal or {})["files"].items()}
    except (KeyError, TypeError) as error:
        raise UserError(f"{directory / JOURNAL}: damaged; fetch or export the checkpoint again") from error


def canonical(name: str) -> str:
    """A tensor's name in the table: transformers >= 5 may save `backbone.` as `model.`."""
    return PREFIX + name.removeprefix(PREFIX_IN_TRANSFORMERS) if name.startswith(PREFIX_IN_TRANSFORMERS) else name


def read_tokenizer(path: Path, field: str) -> Tokenizer:
    """A tokenizer.json.

    Args:
        path: of the file.
        field: of the recipe that says where it is, for the message.

    Raises:
        UserError: it is damaged.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises no other class.
        raise UserError(f"{field}: {path} is damaged or no tokenizer ({error}); bring it back") from error


def _dtype(path: Path, name: str, stored: str) -> torch.dtype:
    known = {text: dtype for dtype, text in DTYPES.items()}
    if stored not in known:
        raise UserError(f"{path}: tensor {name} is {stored}; convert it to {' or '.join(known)} first")
    return known[stored]


def _weight_map(directory: Path) -> dict[str, str]:
    """From each tensor that the index names to its file; empty for a checkpoint of one file."""
    if (directory / INDEX).exists():
        try:
            weight_map = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{directory / INDEX}: damaged ({error}); fetch it again") from error
        # What is not printable may be no file name at all.
        if outside := [file for file in files.values() if Path(file).name != file or not file.isprintable()]:
            raise UserError(f"{directory / INDEX}: names {outside[0]!r}, which is not beside it; fetch it again")
        return files
    if (directory / SINGLE).exists():
        return {}
    others = [path.name for pattern in _OTHER_FORMATS for path in directory.glob(pattern)]
    hint = f"; {others[0]} is a pickle, which is never loaded: convert it to safetensors" if others else ""
    raise UserError(f"hf.path: no {SINGLE} and no {INDEX} in {directory}{hint}")
