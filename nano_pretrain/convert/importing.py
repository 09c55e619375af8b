"""`nano-pretrain import`: a Hugging Face checkpoint to a native one that any layout trains on."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from nano_pretrain.checkpoint.files import write_whole
from nano_pretrain.checkpoint.manifest import Manifest, all_checkpoints, checkpoints_directory, file_entries
from nano_pretrain.checkpoint.sharded import VERSIONS
from nano_pretrain.convert.hf_files import HfReader
from nano_pretrain.convert.names import Target, hf_tensors, native_tensors, shape_text
from nano_pretrain.convert.native import NativeReader
from nano_pretrain.convert.native_writer import NativeWriter
from nano_pretrain.convert.progress import timed_bar
from nano_pretrain.convert.sides import Sides
from nano_pretrain.convert.verify import prepare_transformers, verify
from nano_pretrain.convert.work import JOURNAL, Work
from nano_pretrain.data.shards import TOKENIZER_NAME
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.load import to_yaml
from nano_pretrain.recipe.schema import HfConfig, ModelConfig, Recipe

FORMAT = 1
"""Of what `import` writes; an interrupted import of another format is begun again."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
    if found := all_checkpoints(run_dir):
        raise UserError(f"run.name: {found[0]} is there already; choose another run.name")
    if options.verify:
        prepare_transformers()
    reader = HfReader(source)
    _check_tensors(reader, recipe.model)

    def dtype(target: Target) -> torch.dtype:
        return DTYPES.get(options.dtype) or reader.dtype(target.parts[0].source)

    work = Work(checkpoints_directory(run_dir) / "0", _identity(reader, options))
    writer = NativeWriter(work.directory, native_tensors(recipe.model), dtype)
    left = {name: size for name, size in writer.files.items() if not work.has(name)}
    if work.kept:
        print(f"{work.directory}: {work.kept} of {len(writer.files)} files are whole, going on with the next")
    with timed_bar("importing", sum(left.values())) as done:
        for name in left:
            work.add(name, *writer.write(name, reader, done))
    others = file_entries(work.directory, [*writer.finish(work.rest), JOURNAL])
    versions = {name: version(name) for name in VERSIONS}
    Manifest(0, 0, {}, versions, "", {**work.entries(), **others}, weights_only=True).write(work.directory)
    if options.verify:
        # What is read is compared bit for bit, which is more than checksums say.
        native = NativeReader(work.directory, before_reading=lambda _: None)
        verify(Sides(recipe, reader, native, work.directory, exported=False))
    # Whoever starts from that file means the run, not the import.
    write_whole(run_dir / "recipe.yaml", to_yaml(replace(recipe, hf=HfConfig())))
    work.publish()
    _compare_tokenizers(source, Path(recipe.data.path))
    print(f"{run_dir}: imported {source}; to train it: nano-pretrain launch recipe={run_dir / 'recipe.yaml'}")


def _compare_tokenizers(source: Path, corpus: Path) -> None:
    """Say so where the corpus has another tokenizer than the model."""
    files = source / TOKENIZER_NAME, corpus / TOKENIZER_NAME
    if all(file.is_file() for file in files):
        theirs, ours = (Tokenizer.from_file(str(file)).get_vocab() for file in files)
        if theirs != ours:
            fix = f"data.tokenizer.kind=file data.tokenizer.file={files[0]}"
            print(f"data.path: {corpus} was tokenised for another model; prepare one with {fix}")


def _identity(reader: HfReader, options: HfConfig) -> dict[str, Any]:
    """What decides on the content of the files, as JSON gives it back."""
    return {"format": FORMAT, "files": reader.identity(), "dtype": options.dtype}


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
