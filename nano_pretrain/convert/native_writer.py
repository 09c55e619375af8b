"""Writing a native checkpoint that holds weights alone, a file at a time, through torch's distributed checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from nano_pretrain.checkpoint.checksum import Checksum
from nano_pretrain.checkpoint.files import write_json
from nano_pretrain.checkpoint.manifest import FileEntry
from nano_pretrain.convert.assemble import Source, whole
from nano_pretrain.convert.names import Target

FILE_BYTES = 1 << 29
"""torch holds all tensors of a file until it is written."""

MEGATRON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What megatron-core 0.16 asks of metadata.json."""

Dtypes = Callable[[Target], torch.dtype]


class NativeWriter:
    """The files of a checkpoint, each of which can be written by itself.

    Args:
        directory: where they are written.
        targets: the tensors.
        dtype: of a tensor.
    """

    def __init__(self, directory: Path, targets: Sequence[Target], dtype: Dtypes) -> None:
        self._directory = directory
        self._targets = {target.name: target for target in targets}
        self._dtype = dtype
        local = [
            SavePlan([_write_item(target, dtype(target)) for target in group]) for group in _groups(targets, dtype)
        ]
        plans, self._metadata = create_default_global_save_plan(local)
        self._plans = self._writer(_HashingFiles()).prepare_global_plan(plans)

    @property
    def files(self) -> dict[str, int]:
        """Their names, with the bytes of the tensors in each."""
        return {_file_name(plan): sum(map(self._bytes, plan.items)) for plan in self._plans}

    def write(
        self, name: str, source: Source, done: Callable[[int], object]
    ) -> tuple[FileEntry, list[tuple[int, int]]]:
        """Write one file, durable on return.

        Args:
            name: its name.
            source: where the tensors' rows come from.
            done: called with the bytes of each tensor.

        Returns:
            Size and checksum of what was handed to the operating system; offset and length of each tensor in it.
        """
        plan, files = self._plan(name), _HashingFiles()
        planner = _Lazily(self._targets, source, self._dtype, done)
        with _without_crc32():
            results = self._writer(files).write_data(plan, planner).wait()
        places = {result.index.fqn: result.storage_data for result in results}
        return files.entry, [(places[item.index.fqn].offset, places[item.index.fqn].length) for item in plan.items]

    def finish(self, places: Callable[[str], Sequence[tuple[int, int]]]) -> list[str]:
        """Write what torch and megatron-core read first; returns the names of these files.

        Args:
            places: for the name of a file, what `write` returned of it.
        """
        results = [_results(plan, _file_name(plan), places(_file_name(plan))) for plan in self._plans]
        self._writer(FileSystem()).finish(self._metadata, results)
        torch.save({}, self._directory / "common.pt")
        write_json(self._directory / "metadata.json", MEGATRON)
        return [".metadata", "common.pt", "metadata.json"]

    def _bytes(self, item: WriteItem) -> int:
        return tensor_bytes(target := self._targets[item.index.fqn], self._dtype(target))

    def _plan(self, name: str) -> SavePlan:
        return next(plan for plan in self._plans if _file_name(plan) == name)

    def _writer(self, files: FileSystem) -> FileSystemWriter:
        writer = FileSystemWriter(self._directory)
        writer.fs = files
        return writer


def tensor_bytes(target: Target, dtype: torch.dtype) -> int:
    """Size of a tensor."""
    return math.prod(target.shape) * dtype.itemsize


def _groups(targets: Sequence[Target], dtype: Dtypes) -> Iterator[list[Target]]:
    """Those of each file."""
    group, size = list[Target](), 0
    for target in targets:
        more = tensor_bytes(target, dtype(target))
        if group and size + more > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(target)
        size += more
    yield group


def _write_item(target: Target, dtype: torch.dtype) -> WriteItem:
    shape, start = torch.Size(target.shape), torch.Size([0] * len(target.shape))
    data = TensorWriteData(ChunkStorageMetadata(start, shape), TensorProperties(dtype=dtype), shape)
    return WriteItem(MetadataIndex(target.name, start), WriteItemType.SHARD, tensor_data=data)


def _file_name(plan: SavePlan) -> str:
    return f"{plan.storage_data.prefix}0.distcp"


def _results(plan: SavePlan, name: str, places: Sequence[tuple[int, int]]) -> list[WriteResult]:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return [
        WriteResult(item.index, length, _StorageInfo(name, offset, length))
        for item, (offset, length) in zip(plan.items, places, strict=True)
    ]


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Torch's own checksum takes six times as long as writing, and the manifest has a better one."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Lazily(DefaultSavePlanner):
    """Makes a tensor when its turn to be written has come."""

    def __init__(
        self, targets: Mapping[str, Target], source: Source, dtype: Dtypes, done: Callable[[int], object]
    ) -> None:
        super().__init__()
        self._targets, self._source, self._dtype, self._done = targets, source, dtype, done

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        target = self._targets[write_item.index.fqn]
        tensor = whole(target, self._source, self._dtype(target))
        self._done(tensor.nbytes)
        return tensor


class _HashingFiles(FileSystem):
    """Writes files and knows the checksum of the last one."""

    entry: FileEntry

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            hashing = _Hashing(stream)
            yield hashing
            self.entry = FileEntry(hashing.size, hashing.checksum.hexdigest())


class _Hashing:
    """A stream that is written from its start to its end."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.checksum, self.size = Checksum(), 0

    def write(self, data: Any) -> int:
        self.checksum.update(data)
        self.size += memoryview(data).nbytes
        written: int = self._stream.write(data)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
