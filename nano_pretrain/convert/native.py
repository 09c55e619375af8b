"""Reading the rows of a native checkpoint's tensors where torch's distributed checkpoints have put them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from mmap import ACCESS_COPY, mmap
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from nano_pretrain.checkpoint.manifest import MANIFEST, damaged_files, read_manifest
from nano_pretrain.convert.names import native_tensors, shape_text
from nano_pretrain.recipe.errors import RunError, UserError
from nano_pretrain.recipe.schema import ModelConfig

MAIN_WEIGHTS = "optimizer.state.param."
"""Prefix of the FP32 weights that the optimizer updates; those of the model are them rounded."""
OPEN_FILES, PIECES = 4, 64
SMALL_FILES = (".metadata", "common.pt", "metadata.json")
"""What torch and megatron-core read, the latter during verification, before any tensor."""


@contextmanager
def present(checkpoint: Path) -> Iterator[None]:
    """Around whatever reads a checkpoint, which a run that goes on may remove meanwhile.

    Raises:
        UserError: reading failed, and the checkpoint is gone.
    """
    try:
        yield
    except RunError:
        raise
    # Of torch's, which is no Exception, come those of megatron-core's reader.
    except (Exception, CheckpointException) as error:
        if checkpoint.exists():
            raise
        raise UserError(
            f"{checkpoint}: gone, the run has removed it; keep more with checkpoint.keep, or export another"
        ) from error


def open_checkpoint(checkpoint: Path, model: ModelConfig) -> NativeReader:
    """Open a whole checkpoint of a model; the content of each of its files is verified before it is read.

    That of the small ones is at once.

    Raises:
        UserError: a file is damaged, or the checkpoint is of another model.
    """
    manifest = read_manifest(checkpoint)
    another = "choose another checkpoint with hf.checkpoint=TOKENS"
    if manifest is None:
        raise UserError(f"{checkpoint / MANIFEST}: missing or damaged; {another}")

    @cache
    def check(file: str) -> None:
        if file not in manifest.files:
            raise UserError(f"{checkpoint / MANIFEST}: damaged, it does not name {file}; {another}")
        if damaged_files(checkpoint, [file], manifest):
            raise UserError(f"{checkpoint / file}: damaged; {another}")

    for file in SMALL_FILES:
        check(file)
    reader = NativeReader(checkpoint, check)
    wanted, found = {target.name: target.shape for target in native_tensors(model)}, reader.shapes
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{checkpoint}: {name} is {shape_text(found.get(name))} there and {shape_text(wanted.get(name))} in "
                "the model of the run's recipe.yaml; restore that file"
            )
    return reader


class NativeReader:
    """Tensors of a checkpoint by the names of the model, on whatever layout they were written.

    Files are mapped: reading takes no memory, and copies only what several ranks wrote.

    Args:
        checkpoint: its directory.
        before_reading: called with the name of a file before it is read.
    """

    def __init__(self, checkpoint: Path, before_reading: Callable[[str], object]) -> None:
        self._checkpoint = checkpoint
        self._before_reading = before_reading
        self._reader = FileSystemReader(checkpoint)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        stored = metadata.state_dict_metadata.items()
        self._tensors = {name: entry for name, entry in stored if isinstance(entry, TensorStorageMetadata)}
        self._map = lru_cache(OPEN_FILES)(self._map_file)
        self._piece = lru_cache(PIECES)(self._map_piece)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of the model."""
        return {name: tuple(entry.size) for name, entry in self._tensors.items() if not name.startswith("optimizer.")}

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which the model computes with a tensor."""
        dtype: torch.dtype = self._tensors[name].properties.dtype
        return dtype

    def rows(self, name: str, start: int, count: int) -> Tensor:
        """Rows [start, start + count) of a tensor, of the main weights where the checkpoint has them."""
        name = self._exact(name)
        entry = self._tensors[name]
        if len(entry.chunks) == 1:
            return self._piece(name, entry.chunks[0].offsets)[start : start + count]
        out = torch.empty((count, *entry.size[1:]), dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            first, *offsets = chunk.offsets
            low, high = max(start, first), min(start + count, first + chunk.sizes[0])
            if low < high:
                inside = tuple(slice(o, o + n) for o, n in zip(offsets, chunk.sizes[1:], strict=True))
                out[(slice(low - start, high - start), *inside)] = self._piece(name, chunk.offsets)[
                    low - first : high - first
                ]
        return out

    def _exact(self, name: str) -> str:
        main = MAIN_WEIGHTS + name
        return main if main in self._tensors else name

    def _map_piece(self, name: str, offsets: torch.Size) -> Tensor:
        """What one rank has written of a tensor, which torch has saved as one of many in a file."""
        info = self._reader.storage_data[MetadataIndex(name, offsets)]
        content = self._map(info.relative_path)
        with (self._checkpoint / info.relative_path).open("rb") as stream, FakeTensorMode():
            # Says where its numbers lie, and does not read them.
            piece = torch.load(self._reader._slice_file(stream, info), map_location="cpu", weights_only=True)
        storage = piece.untyped_storage()
        count = storage.nbytes() // piece.dtype.itemsize
        flat = torch.frombuffer(
            content, dtype=piece.dtype, count=count, offset=info.offset + storage._checkpoint_offset
        )
        return flat.as_strided(piece.shape, piece.stride(), piece.storage_offset())

    def _map_file(self, file: str) -> mmap:
        self._before_reading(file)
        with (self._checkpoint / file).open("rb") as stream:
            # Of the process' own if it were written to, which torch would warn of otherwise.
            return mmap(stream.fileno(), 0, access=ACCESS_COPY)
