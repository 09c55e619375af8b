"""Writing a safetensors file as a stream.

Format: 8 bytes, the length of the header in little endian; the header, a JSON object of each tensor's dtype, shape and
[begin, end) in bytes after the header; the tensors, row-major (https://github.com/huggingface/safetensors#format). The
library's own writer takes all tensors of a file at once.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor

from nano_pretrain.checkpoint.checksum import Checksum
from nano_pretrain.checkpoint.manifest import FileEntry

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
AHEAD = 8
"""Blocks that are read while one is written: half a gigabyte, the largest file of a checkpoint that was imported."""
_ALIGNMENT = 8

T = TypeVar("T")

Stored = tuple[str, tuple[int, ...], torch.dtype]
"""Name, shape and dtype of a tensor in a file."""


def stored_bytes(tensor: Stored) -> int:
    """Its size."""
    _, shape, dtype = tensor
    return math.prod(shape) * dtype.itemsize


def write_safetensors(
    path: Path, tensors: Sequence[Stored], blocks: Callable[[Stored], Iterator[Tensor]], done: Callable[[int], object]
) -> FileEntry:
    """Write a file, durable on return.

    Args:
        path: where to.
        tensors: what it holds, in this order.
        blocks: the rows of one of them, in contiguous blocks of its dtype.
        done: called with the bytes of each block.

    Returns:
        Its size and checksum, of what was handed to the operating system.
    """
    checksum, header = Checksum(), _header(tensors)
    with path.open("wb", buffering=0) as stream:
        for view in chain([memoryview(header)], _ahead(_views(tensors, blocks, done))):
            checksum.update(view)
            _write(stream.fileno(), view)
        os.fsync(stream.fileno())
    return FileEntry(len(header) + sum(map(stored_bytes, tensors)), checksum.hexdigest())


def _views(
    tensors: Sequence[Stored], blocks: Callable[[Stored], Iterator[Tensor]], done: Callable[[int], object]
) -> Iterator[memoryview]:
    for tensor in tensors:
        for block in blocks(tensor):
            yield block.view(-1).view(torch.uint8).numpy().data
            done(block.nbytes)


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Items that a thread makes while those before them are used: reading and writing take a core each."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        made = deque(pool.submit(next, items, end) for _ in range(AHEAD))
        while (item := made.popleft().result()) is not end:
            made.append(pool.submit(next, items, end))
            yield cast(T, item)


def _header(tensors: Sequence[Stored]) -> bytes:
    borders = accumulate(map(stored_bytes, tensors), initial=0)
    entries = {
        name: {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": place}
        for (name, shape, dtype), place in zip(tensors, pairwise(borders), strict=True)
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    # The tensors begin at a multiple of what their dtypes need; the format allows spaces at the end.
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
