"""A checkpoint's list of files with sizes and hashes, and which checkpoints of a run are whole; imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nano_pretrain.checkpoint.checksum import file_checksum
from nano_pretrain.data.record import Record
from nano_pretrain.recipe.errors import UserError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and checksum of one file."""

    size: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds and who wrote it.

    Args:
        tokens: tokens consumed, the checkpoint's clock.
        step: optimizer steps taken.
        layout: tensor, pipeline, context and data-parallel sizes that wrote it, and whether the optimizer was sharded.
        versions: packages that wrote it.
        corpus: fingerprint of the corpus it was trained on.
        files: every other file, by name.
        shards: what of that corpus must stay when shards are added, see `data.record`; None where it is not known.
        weights_only: whether it holds a model that was trained elsewhere, and neither optimizer state nor a corpus.
    """

    tokens: int
    step: int
    layout: dict[str, Any]
    versions: dict[str, str]
    corpus: str
    files: dict[str, FileEntry]
    shards: Record | None = None
    weights_only: bool = False

    def write(self, directory: Path) -> None:
        """Write to `directory`/manifest.json."""
        (directory / MANIFEST).write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest, or None where there is none that can be read and belongs to a checkpoint of this name."""
    try:
        content = json.loads((directory / MANIFEST).read_text())
        files = {name: FileEntry(**entry) for name, entry in content.pop("files").items()}
        manifest = Manifest(files=files, **content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    counts = isinstance(manifest.tokens, int) and isinstance(manifest.step, int)
    return manifest if counts and str(manifest.tokens) == directory.name else None


def checkpoints_directory(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints that have got their name, whole or damaged since, newest first."""
    found = [path for path in checkpoints_directory(run_dir).glob("*") if re.fullmatch("[0-9]+", path.name)]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints whose files are all there in full length, newest first; content is verified when one is loaded."""
    return [path for path in all_checkpoints(run_dir) if _has_every_file(path)]


def _has_every_file(path: Path) -> bool:
    manifest = read_manifest(path)
    return manifest is not None and all(_size(path / name) == entry.size for name, entry in manifest.files.items())


def newest_tokens(run_dir: Path) -> int | None:
    """Consumed tokens of the newest whole checkpoint."""
    whole = whole_checkpoints(run_dir)
    return int(whole[0].name) if whole else None


def whole_checkpoint(run_dir: Path, tokens: int | None, field: str) -> Path:
    """The checkpoint at `tokens`, or the newest, by its name and the sizes of its files.

    Args:
        run_dir: directory of the run.
        tokens: consumed tokens, or None for the newest.
        field: of the recipe that says so, for the message.

    Raises:
        UserError: there is none.
    """
    whole = {int(path.name): path for path in whole_checkpoints(run_dir)}
    if not whole:
        raise UserError(f"{checkpoints_directory(run_dir)}: no whole checkpoint; train the run first")
    if tokens is not None and tokens not in whole:
        listed = ", ".join(map(str, sorted(whole)))
        raise UserError(f"{field}: no whole checkpoint at {tokens} tokens; choose one of {listed}")
    return whole[max(whole) if tokens is None else tokens]


def file_entries(directory: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Size and hash of the named files."""
    return {name: FileEntry((directory / name).stat().st_size, file_checksum(directory / name)) for name in names}


def damaged_files(directory: Path, names: Iterable[str], manifest: Manifest) -> list[str]:
    """Those of the named files that are missing or whose content is not what the manifest says."""
    return [name for name in names if not _is_as_listed(directory / name, manifest.files[name])]


def _is_as_listed(path: Path, entry: FileEntry) -> bool:
    return _size(path) == entry.size and file_checksum(path) == entry.xxh3


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
