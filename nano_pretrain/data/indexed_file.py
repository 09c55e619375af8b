"""The Megatron `.bin`/`.idx` file pair: one sequence per document, tokens back to back in the `.bin`.

Layout of the `.idx`, little-endian, as megatron-core's `IndexedDataset` reads and writes it: magic (9 bytes), version
(uint64), dtype code (uint8), number of sequences (uint64), number of document bounds (uint64), then the sequences'
lengths (int32) and byte offsets (int64), then the document bounds as sequence numbers (int64). A multimodal index has
one more byte per sequence at its end.
"""

from __future__ import annotations

import bisect
import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from nano_pretrain.recipe.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}.items()
}
UINT16_VOCABULARY = 65_500
"""Vocabularies below this size are stored as uint16, larger ones as int32: megatron-core's own rule."""


@dataclass(frozen=True)
class Index:
    """What the `.idx` says about its `.bin`; a document is one or more sequences."""

    dtype: np.dtype[Any]
    sequences: int
    documents: int
    tokens: int


def bin_path(prefix: Path) -> Path:
    """Path of the tokens of the pair `prefix`; the prefix may contain dots."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Path of the index of the pair `prefix`; the prefix may contain dots."""
    return prefix.with_name(prefix.name + ".idx")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest of megatron-core's two token types that holds every id of the vocabulary."""
    return np.dtype("<u2") if vocab_size < UINT16_VOCABULARY else np.dtype("<i4")


def read_index(prefix: Path) -> Index:
    """Read and check a pair without reading its tokens: header, and the sizes of both files.

    Raises:
        UserError: a file is missing, is not an index, or has not the size that the index states.
    """
    path = idx_path(prefix)
    try:
        size, bin_size = path.stat().st_size, bin_path(prefix).stat().st_size
        with path.open("rb") as file:
            dtype, sequences, bounds = _read_header(file, path)
            arrays = HEADER.size + sequences * (4 + 8) + bounds * 8
            if size not in {arrays, arrays + sequences}:
                raise UserError(f"{path}: {size} bytes, its header says {arrays}: truncated or damaged; {REPAIR}")
            end = _end_of_last_sequence(file, sequences, dtype.itemsize)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; {REPAIR}") from error
    if bin_size != end:
        raise UserError(f"{bin_path(prefix)}: {bin_size} bytes, its index says {end}: truncated or damaged; {REPAIR}")
    return Index(dtype, sequences, max(bounds - 1, 0), end // dtype.itemsize)


def document_start(prefix: Path, index: Index, token: int) -> int:
    """First token of the document that holds `token`, found in the `.idx` without reading it whole.

    Args:
        prefix: path of the pair without its suffixes.
        index: what `read_index` says of it.
        token: a token of the pair.
    """
    skipped, count = HEADER.size + 4 * index.sequences, index.sequences + index.documents
    words = np.memmap(idx_path(prefix), "<i8", mode="r", offset=skipped, shape=(count,))
    offsets, bounds = words[: index.sequences], words[index.sequences :]

    def start(document: int) -> int:
        return int(offsets[bounds[document]]) // index.dtype.itemsize

    return start(bisect.bisect_right(range(index.documents), token, key=start) - 1)


REPAIR = "remove the corpus directory and run `nano-pretrain prepare` again"


def _read_header(file: IO[bytes], path: Path) -> tuple[np.dtype[Any], int, int]:
    raw = file.read(HEADER.size)
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        raise UserError(f"{path}: not a Megatron index (no MMIDIDX header); {REPAIR}")
    _, version, code, sequences, bounds = HEADER.unpack(raw)
    if version != VERSION or code not in DTYPES:
        raise UserError(f"{path}: index version {version} with token type {code} is not supported; {REPAIR}")
    return DTYPES[code], sequences, bounds


def _end_of_last_sequence(file: IO[bytes], sequences: int, itemsize: int) -> int:
    if sequences == 0:
        return 0
    file.seek(HEADER.size + 4 * (sequences - 1))
    (length,) = struct.unpack("<i", file.read(4))
    file.seek(HEADER.size + 4 * sequences + 8 * (sequences - 1))
    (offset,) = struct.unpack("<q", file.read(8))
    return int(offset + length * itemsize)


@dataclass(frozen=True)
class WrittenPair:
    """What a finished writer knows of its pair: counts, sizes in bytes and hashes of the two files."""

    name: str
    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str


class IndexedFileWriter:
    """Writes one `.bin`/`.idx` pair, a document at a time.

    The index is written by `finish`: a pair whose writer was interrupted has none and cannot be opened.

    Args:
        prefix: path of the pair without its suffixes; the directory must exist.
        dtype: token type, see `token_dtype`.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self.tokens = 0
        self._prefix = prefix
        self._dtype = dtype.newbyteorder("<")
        self._lengths: list[int] = []
        self._hash = hashlib.sha256()
        self._bin = bin_path(prefix).open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.close()

    def add(self, tokens: npt.ArrayLike) -> None:
        """Append one document: token ids, end-of-document token included.

        Raises:
            ValueError: an id does not fit the token type.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        limits = np.iinfo(self._dtype)
        if ids.size and not limits.min <= ids.min() <= ids.max() <= limits.max:
            raise ValueError(f"token ids {ids.min()}..{ids.max()} do not fit {self._dtype.name}")
        raw = ids.astype(self._dtype).tobytes()
        self._bin.write(raw)
        self._hash.update(raw)
        self._lengths.append(ids.size)
        self.tokens += ids.size

    def finish(self) -> WrittenPair:
        """Write the index and close both files."""
        self._bin.close()
        index = self._index_bytes()
        idx_path(self._prefix).write_bytes(index)
        return WrittenPair(
            name=self._prefix.name,
            documents=len(self._lengths),
            tokens=self.tokens,
            bin_bytes=self.tokens * self._dtype.itemsize,
            idx_bytes=len(index),
            bin_sha256=self._hash.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )

    def _index_bytes(self) -> bytes:
        lengths = np.array(self._lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self._dtype.itemsize
        offsets = np.concatenate([np.zeros(1, "<i8"), ends[:-1]])[: lengths.size]
        bounds = np.arange(lengths.size + 1, dtype="<i8")
        code = next(code for code, dtype in DTYPES.items() if dtype == self._dtype)
        header = HEADER.pack(MAGIC, VERSION, code, lengths.size, bounds.size)
        return header + lengths.tobytes() + offsets.astype("<i8").tobytes() + bounds.tobytes()
