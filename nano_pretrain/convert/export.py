"""`nano-pretrain export`: a native checkpoint to one that transformers loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from nano_pretrain.checkpoint.checksum import file_checksum
from nano_pretrain.checkpoint.files import write_json
from nano_pretrain.checkpoint.manifest import MANIFEST, FileEntry, checkpoints_directory, is_as_listed, read_manifest
from nano_pretrain.convert.assemble import ASKED_DTYPES, Source, blocks
from nano_pretrain.convert.beside import write_beside
from nano_pretrain.convert.hf_files import INDEX, SINGLE, HfReader
from nano_pretrain.convert.names import Target, hf_tensors
from nano_pretrain.convert.native import NativeReader, open_checkpoint, present
from nano_pretrain.convert.progress import timed_bar
from nano_pretrain.convert.safetensors_file import Stored, stored_bytes, write_safetensors
from nano_pretrain.convert.sides import Sides
from nano_pretrain.convert.verify import prepare_transformers, verify
from nano_pretrain.convert.work import JOURNAL, Work, forgotten_if_wrong, read_journal, remove_replaced
from nano_pretrain.data.shards import TOKENIZER_NAME
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.schema import HfConfig, Recipe

FORMAT = 2
"""Of what `export` writes; an interrupted export of another format is begun again."""


def export(recipe: Recipe, options: HfConfig, run_dir: Path, checkpoint: Path) -> None:
    """Write a checkpoint as a Hugging Face model.

    It is written beside its place, verified and then renamed; an interrupted one goes on with the next file.

    Args:
        recipe: the run's recipe.
        options: where to, in which dtype, in files of which size.
        run_dir: directory of the run.
        checkpoint: one of its whole checkpoints.

    Raises:
        UserError: the checkpoint is damaged or of another model, or the directory holds something else.
        RunError: what was written is not what was read.
    """
    # Where a link leads to.
    final = (Path(options.path) if options.path else run_dir / "hf").resolve()
    if checkpoints_directory(run_dir).resolve() in (final, *final.parents):
        raise UserError(f"hf.path: {final} lies among the run's checkpoints; choose another")
    with present(checkpoint):
        _export(recipe, options, run_dir, checkpoint, final)


def _export(recipe: Recipe, options: HfConfig, run_dir: Path, checkpoint: Path, final: Path) -> None:
    identity = _identity(recipe, options, checkpoint)
    if _is_there(final, identity, options.verify):
        remove_replaced(final)
        print(f"{final}: already exported, nothing to do")
        return
    if options.verify:
        prepare_transformers()
    reader = open_checkpoint(checkpoint, recipe.model)
    work = Work(final, identity)
    files = divided(
        [_stored(target, reader, options.dtype) for target in hf_tensors(recipe.model)], options.file_gigabytes
    )
    if work.kept:
        print(f"{work.directory}: {work.kept} of {len(files)} files are there, going on")
    _write_weights(recipe, work, files, reader)
    embedding = next(iter(files.values()))[0]
    dtype = str(embedding[2]).removeprefix("torch.")
    write_beside(work.directory, recipe, run_dir, int(checkpoint.name), dtype, read_manifest(checkpoint))
    if options.verify:
        with forgotten_if_wrong(work):
            verify(Sides(recipe, HfReader(work.directory), reader, checkpoint, exported=True))
    work.finish(options.verify)
    work.publish()
    print(f"{final}: exported {checkpoint} as {options.dtype}")


def _identity(recipe: Recipe, options: HfConfig, checkpoint: Path) -> dict[str, Any]:
    """What decides on the content of the files."""
    tokenizer = Path(recipe.data.path) / TOKENIZER_NAME
    return {
        "format": FORMAT,
        "made": "export",
        "model": asdict(recipe.model),
        "tokenizer": file_checksum(tokenizer) if tokenizer.is_file() else None,
        "checkpoint": file_checksum(checkpoint / MANIFEST),
        "tokens": int(checkpoint.name),
        "dtype": options.dtype,
        "file_gigabytes": options.file_gigabytes,
    }


def _is_there(final: Path, identity: Mapping[str, Any], verified: bool) -> bool:
    """Whether the place holds this export, every byte of it; another export is replaced.

    Raises:
        UserError: it holds something else, or more.
    """
    found = read_journal(final)
    if found is None or found["identity"].get("made") != "export":
        if final.exists() and (not final.is_dir() or any(final.iterdir())):
            raise UserError(f"hf.path: {final} is there and no export of ours; choose another hf.path or remove it")
        return False
    ours = {Path(name).parts[0] for name in [JOURNAL, *found["files"]]}
    if added := sorted(path.name for path in final.iterdir() if path.name not in ours):
        raise UserError(
            f"hf.path: {final} holds {', '.join(added[:3])} beside the export; move that or choose another hf.path"
        )
    entries = {name: FileEntry(**file["entry"]) for name, file in found["files"].items()}
    as_asked = found["identity"] == identity and found["verified"] >= verified
    return as_asked and all(is_as_listed(final / name, entry) for name, entry in entries.items())


def _stored(target: Target, reader: NativeReader, dtype: str) -> Stored:
    return target.name, target.shape, ASKED_DTYPES.get(dtype) or reader.dtype(target.parts[0].source)


def divided(tensors: Sequence[Stored], file_gigabytes: float) -> dict[str, list[Stored]]:
    """The tensors of each file, in order; a larger tensor than a file has one for itself."""
    groups, size = [list[Stored]()], 0
    for tensor in tensors:
        if groups[-1] and size + stored_bytes(tensor) > file_gigabytes * 1e9:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += stored_bytes(tensor)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": group for n, group in enumerate(groups, 1)}


def _write_weights(recipe: Recipe, work: Work, files: Mapping[str, list[Stored]], source: Source) -> None:
    targets = {target.name: target for target in hf_tensors(recipe.model)}

    def rows(tensor: Stored) -> Iterator[Tensor]:
        name, _, dtype = tensor
        return blocks(targets[name], source, dtype)

    left = {name: tensors for name, tensors in files.items() if not work.has(name)}
    size = sum(stored_bytes(tensor) for tensors in left.values() for tensor in tensors)
    with timed_bar("exporting", size) as done:
        for name, tensors in left.items():
            work.add(name, write_safetensors(work.directory / name, tensors, rows, done))
    if len(files) > 1:
        weight_map = {tensor[0]: name for name, tensors in files.items() for tensor in tensors}
        total = sum(stored_bytes(tensor) for tensors in files.values() for tensor in tensors)
        write_json(work.directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
