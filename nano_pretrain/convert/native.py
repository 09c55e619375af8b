"""Reading the tensors of a native checkpoint, a block of rows at a time, through torch's distributed checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nano_pretrain.checkpoint.manifest import damaged_files, read_manifest
from nano_pretrain.convert.names import native_tensors, shape_text
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.schema import ModelConfig

MAIN_WEIGHTS = "optimizer.state.param."
"""Prefix of the FP32 weights that the optimizer updates; those of the model are them rounded."""
WHOLE_BYTES = 3 << 29
"""Up to this size a tensor is read at once: torch reads a stored piece as a whole, whatever is asked of it."""
BLOCK_BYTES = 1 << 28


def open_checkpoint(checkpoint: Path, model: ModelConfig) -> NativeReader:
    """Open a whole checkpoint of a model; the content of each of its files is verified before it is read.

    Raises:
        UserError: a file is damaged, or the checkpoint is of another model.
    """
    manifest = read_manifest(checkpoint)
    assert manifest is not None

    @cache
    def check(file: str) -> None:
        if damaged_files(checkpoint, [file], manifest):
            raise UserError(f"{checkpoint / file}: damaged; choose another checkpoint with hf.checkpoint=TOKENS")

    check(".metadata")
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

    Args:
        checkpoint: its directory.
        before_reading: called with the name of a file before it is read.
    """

    def __init__(self, checkpoint: Path, before_reading: Callable[[str], object]) -> None:
        self._before_reading = before_reading
        self._reader = FileSystemReader(checkpoint)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        stored = metadata.state_dict_metadata.items()
        self._tensors = {name: entry for name, entry in stored if isinstance(entry, TensorStorageMetadata)}
        self._block = lru_cache(1)(self._read_block)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of the model."""
        return {name: tuple(entry.size) for name, entry in self._tensors.items() if not name.startswith("optimizer.")}

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which the model computes with a tensor."""
        dtype: torch.dtype = self._tensors[name].properties.dtype
        return dtype

    def exact_dtype(self, name: str) -> torch.dtype:
        """Dtype of what `rows` gives."""
        return self.dtype(self._exact(name))

    def rows(self, name: str, start: int, count: int) -> Tensor:
        """Rows [start, start + count) of a tensor, of the main weights where the checkpoint has them."""
        name = self._exact(name)
        size = self._rows_per_block(name)
        first, last = start // size, (start + count - 1) // size
        parts = [
            self._block(name, number)[max(start - number * size, 0) : start + count - number * size]
            for number in range(first, last + 1)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _exact(self, name: str) -> str:
        main = MAIN_WEIGHTS + name
        return main if main in self._tensors else name

    def _rows_per_block(self, name: str) -> int:
        entry = self._tensors[name]
        rows, size = entry.size[0], math.prod(entry.size) * entry.properties.dtype.itemsize
        return int(rows) if size <= WHOLE_BYTES else max(1, int(BLOCK_BYTES // (size // rows)))

    def _read_block(self, name: str, number: int) -> Tensor:
        entry = self._tensors[name]
        size = self._rows_per_block(name)
        start = number * size
        shape = torch.Size([min(size, entry.size[0] - start), *entry.size[1:]])
        offsets = torch.Size([start, *[0] * (len(shape) - 1)])
        block = torch.empty(shape, dtype=entry.properties.dtype)
        items = create_read_items_for_chunk_list(name, entry, [ChunkStorageMetadata(offsets, shape)])
        for file in {self._reader.storage_data[item.storage_index].relative_path for item in items}:
            self._before_reading(file)
        self._reader.read_data(LoadPlan(items), _Into(block)).wait()
        return block


class _Into(DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._target
        for dimension, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dimension, offset, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It is where it belongs."""
