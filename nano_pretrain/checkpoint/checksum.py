"""Checksums of files: XXH3, 128 bits, which finds damage at the speed of the memory and is no proof against malice."""

from __future__ import annotations

from pathlib import Path

import xxhash

Checksum = xxhash.xxh3_128
_READ_BYTES = 1 << 24


def file_checksum(path: Path) -> str:
    """Checksum of a file's content, in hexadecimal."""
    checksum = Checksum()
    with path.open("rb", buffering=0) as stream:
        buffer = bytearray(_READ_BYTES)
        while count := stream.readinto(buffer):
            checksum.update(memoryview(buffer)[:count])
    return checksum.hexdigest()
