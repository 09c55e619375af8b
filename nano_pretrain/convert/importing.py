"""`nano-pretrain import`: a Hugging Face checkpoint to a native one that any layout trains on."""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nano_pretrain.checkpoint.files import sync, write_json, write_whole
from nano_pretrain.checkpoint.manifest import (
    IMPORTED,
    MANIFEST,
    ORIGIN,
    Manifest,
    all_checkpoints,
    checkpoints_directory,
    file_entries,
    unfinished_import,
)
from nano_pretrain.checkpoint.sharded import VERSIONS
from nano_pretrain.convert.assemble import ASKED_DTYPES
from nano_pretrain.convert.hf_files import HfReader, read_tokenizer
from nano_pretrain.convert.names import Target, hf_tensors, native_tensors, shape_text
from nano_pretrain.convert.native import NativeReader
from nano_pretrain.convert.native_writer import NativeWriter
from nano_pretrain.convert.progress import timed_bar
from nano_pretrain.convert.sides import Sides
from nano_pretrain.convert.verify import prepare_transformers, verify
from nano_pretrain.convert.work import JOURNAL, Work, forgotten_if_wrong
from nano_pretrain.data.shards import TOKENIZER_NAME
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.load import to_yaml
from nano_pretrain.recipe.schema import HfConfig, ModelConfig, Recipe
from nano_pretrain.train.directory import STREAMS, only_trainer

FORMAT = 2
"""Of what `import` writes; an interrupted import of another format is begun again."""

RECIPE = "recipe.yaml"


def import_checkpoint(recipe: Recipe, options: HfConfig, source: Path, run_dir: Path) -> None:
    """Write a Hugging Face checkpoint as the one with which a run begins, at 0 tokens, and the run's recipe.yaml.

    It is written beside its place, verified and then renamed; an interrupted one goes on with the next file.

    Args:
        recipe: the run's recipe; its model is the checkpoint's.
        options: in which dtype its tensors are kept.
        source: directory of the checkpoint.
        run_dir: directory of the run.

    Raises:
        UserError: the checkpoint is damaged or of another model, or the run has begun.
        RunError: what was written is not what was read.
    """
    with only_trainer(run_dir):
        _check_new(run_dir)
        _import(recipe, options, source, run_dir)
    print(f"{run_dir}: imported {source}; to train it: nano-pretrain launch recipe={run_dir / 'recipe.yaml'}")


def _import(recipe: Recipe, options: HfConfig, source: Path, run_dir: Path) -> None:
    if options.verify:
        prepare_transformers()
    reader = HfReader(source)
    _check_tensors(reader, recipe.model)
    _compare_tokenizers(source, Path(recipe.data.path))

    def dtype(target: Target) -> torch.dtype:
        return ASKED_DTYPES.get(options.dtype) or reader.dtype(target.parts[0].source)

    work = Work(checkpoints_directory(run_dir) / IMPORTED, _identity(recipe, reader, options))
    writer = NativeWriter(work.directory, native_tensors(recipe.model), dtype)
    left = {name: size for name, size in writer.files.items() if not work.has(name)}
    if work.kept:
        print(f"{work.directory}: {work.kept} of {len(writer.files)} files are there, going on")
    with timed_bar("importing", sum(left.values())) as done:
        for name in left:
            work.add(name, *writer.write(name, reader, done))
    writer.finish(work.rest)
    if options.verify:
        # What is read is compared bit for bit, which is more than checksums say.
        native = NativeReader(work.directory, before_reading=lambda _: None)
        with forgotten_if_wrong(work):
            verify(Sides(recipe, reader, native, work.directory, exported=False))
    work.finish(options.verify)
    entries = {**work.entries(), **file_entries(work.directory, [JOURNAL])}
    versions = {name: version(name) for name in VERSIONS}
    Manifest(0, 0, {}, versions, "", entries, weights_only=True).write(work.directory)
    sync(work.directory / MANIFEST)
    # Whoever starts from that file means the run, not the import.
    write_whole(run_dir / RECIPE, to_yaml(replace(recipe, hf=HfConfig())))
    write_json(run_dir / ORIGIN, {"source": str(source.resolve()), "tokens": 0})
    for name in (RECIPE, ORIGIN):
        sync(run_dir / name)
    work.publish()


def _check_new(run_dir: Path) -> None:
    """Refuse a directory in which a run has begun; an import that was interrupted is gone on with.

    Raises:
        UserError: names what is there.
    """
    begun = [*all_checkpoints(run_dir), *(run_dir / name for name in (*STREAMS, "exit.json"))]
    if not unfinished_import(run_dir):
        begun.append(run_dir / RECIPE)
    if found := [path for path in begun if path.exists()]:
        raise UserError(f"run.name: {found[0]} is there already; choose another run.name")


def _compare_tokenizers(source: Path, corpus: Path) -> None:
    """Say so where the corpus has another tokenizer than the model."""
    files = source / TOKENIZER_NAME, corpus / TOKENIZER_NAME
    if all(file.is_file() for file in files):
        theirs, ours = (
            read_tokenizer(files[0], "hf.path").get_vocab(),
            read_tokenizer(files[1], "data.path").get_vocab(),
        )
        if theirs != ours:
            fix = f"data.tokenizer.kind=file data.tokenizer.file={files[0]}"
            print(f"data.path: {corpus} was tokenised for another model; prepare one with {fix}")


def _identity(recipe: Recipe, reader: HfReader, options: HfConfig) -> dict[str, Any]:
    """What decides on the content of the files, as JSON gives it back."""
    return {
        "format": FORMAT,
        "made": "import",
        "model": asdict(recipe.model),
        "files": reader.identity(),
        "dtype": options.dtype,
    }


def _check_tensors(reader: HfReader, model: ModelConfig) -> None:
    """Refuse a checkpoint whose tensors are not those of the model.

    Raises:
        UserError: names a tensor.
    """
    wanted = {target.name: target.shape for target in hf_tensors(model)}
    for name in [*wanted, *reader.shapes]:
        if wanted.get(name) != reader.shapes.get(name):
            raise UserError(
                f"{reader.directory}: {name} is {shape_text(reader.shapes.get(name))} in the files and "
                f"{shape_text(wanted.get(name))} by config.json; fetch the checkpoint again"
            )
