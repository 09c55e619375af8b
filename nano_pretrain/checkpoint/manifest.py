"""A checkpoint's list of files with sizes and hashes, and which checkpoints of a run are whole; imports no torch."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nano_pretrain.checkpoint.checksum import file_checksum
from nano_pretrain.data.record import Record
from nano_pretrain.recipe.acts import HISTORY, read_acts
from nano_pretrain.recipe.errors import UserError

MANIFEST = "manifest.json"
ORIGIN = "imported.json"
"""In a run's directory: where its first weights come from, if they were trained elsewhere."""
IMPORTED = "0"
"""Name of the checkpoint that a run begins with whose weights were trained elsewhere."""


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
        acts: how many recorded acts the run had been told, see `recipe.acts`.
        weights_only: whether it holds a model that was trained elsewhere, and neither optimizer state nor a corpus.
    """

    tokens: int
    step: int
    layout: dict[str, Any]
    versions: dict[str, str]
    corpus: str
    files: dict[str, FileEntry]
    shards: Record | None = None
    acts: int = 0
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
    counts = all(isinstance(count, int) for count in (manifest.tokens, manifest.step, manifest.acts))
    return manifest if counts and str(manifest.tokens) == directory.name else None


def checkpoints_directory(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def unfinished_import(run_dir: Path) -> bool:
    """Whether weights were to be imported, and are not there in full."""
    return (checkpoints_directory(run_dir) / f".converting-{IMPORTED}").exists()


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints that have got their name, whole or damaged since, newest first."""
    found = [path for path in checkpoints_directory(run_dir).glob("*") if re.fullmatch("[0-9]+", path.name)]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints whose files are all there in full length, newest first; content is verified when one is loaded."""
    return [path for path in all_checkpoints(run_dir) if _damage(path) is None]


def _damage(path: Path) -> str | None:
    """The first file of a checkpoint that is not there in full length, and why; None if it is whole."""
    manifest = read_manifest(path)
    if manifest is None:
        return f"{path / MANIFEST} is missing or damaged"
    for name, entry in manifest.files.items():
        if (size := _size(path / name)) != entry.size:
            return f"{path / name} {'is missing' if size < 0 else f'has {size:,} bytes of {entry.size:,}'}"
    return None


def newest_tokens(run_dir: Path) -> int | None:
    """Consumed tokens of the newest whole checkpoint."""
    whole = whole_checkpoints(run_dir)
    return int(whole[0].name) if whole else None


def check_history(run_dir: Path) -> None:
    """Refuse a run whose recorded acts are lost: without them it would go on as if it had read something else.

    Raises:
        UserError: the file has fewer than the newest whole checkpoint knows of, or cannot be read.
    """
    newest = next((read_manifest(path) for path in whole_checkpoints(run_dir)), None)
    there = len(read_acts(run_dir))
    if newest is not None and there < newest.acts:
        raise UserError(
            f"{run_dir / HISTORY}: has {there} of the {newest.acts} changes that the run had been told by "
            f"{newest.tokens:,} tokens; bring it back or choose another run.name"
        )


def whole_checkpoint(run_dir: Path, tokens: int | None, field: str) -> Path:
    """The checkpoint at `tokens`, or the newest, by its name and the sizes of its files.

    Newer ones that are passed over are named on stderr.

    Args:
        run_dir: directory of the run.
        tokens: consumed tokens, or None for the newest.
        field: of the recipe that says so, for the message.

    Raises:
        UserError: there is none; the message names the file that is damaged, if one is.
    """
    damage = {path: _damage(path) for path in all_checkpoints(run_dir)}
    whole = {int(path.name): path for path, found in damage.items() if found is None}
    if not damage:
        raise UserError(f"{checkpoints_directory(run_dir)}: no whole checkpoint; train the run first")
    if not whole:
        newest = next(iter(damage.values()))
        raise UserError(f"{checkpoints_directory(run_dir)}: no whole checkpoint, {newest}; restore that file")
    wanted = max(whole) if tokens is None else tokens
    if wanted not in whole:
        listed = ", ".join(map(str, sorted(whole)))
        why = "".join(f" ({found})" for path, found in damage.items() if int(path.name) == wanted)
        raise UserError(f"{field}: no whole checkpoint at {wanted} tokens{why}; choose one of {listed}")
    for path, found in damage.items():
        if tokens is None and int(path.name) > wanted:
            print(f"{path}: passed over, {found}", file=sys.stderr)
    return whole[wanted]


def file_entries(directory: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Size and hash of the named files."""
    return {name: FileEntry((directory / name).stat().st_size, file_checksum(directory / name)) for name in names}


def damaged_files(directory: Path, names: Iterable[str], manifest: Manifest) -> list[str]:
    """Those of the named files that are missing or whose content is not what the manifest says."""
    return [name for name in names if not is_as_listed(directory / name, manifest.files[name])]


def is_as_listed(path: Path, entry: FileEntry) -> bool:
    """Whether a file has this size and checksum."""
    return _size(path) == entry.size and file_checksum(path) == entry.xxh3


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
