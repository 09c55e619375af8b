"""Order as a function: keyed permutations. No state, no files, O(1) memory."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt

Words = Any
"""An int, or an array of uint64: the same expressions serve both, so that the two forms cannot drift apart."""

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 6
_MAX_SIZE = 1 << 62


def _mix64(word: Words) -> Words:
    """A bijection of 64-bit words in which each input bit flips each output bit with probability near one half.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
    """
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def order_key(*parts: int | str) -> int:
    """A 64-bit key from numbers and names; the same on every machine and in every version of Python."""
    digest = hashlib.blake2b(json.dumps(parts).encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def numbered_key(key: int, number: int) -> int:
    """The key of member `number` of the family `key`: output `number` of SplitMix64, other for each number."""
    return int(_mix64((key + number * _GOLDEN) & _WORD))


def keyed_shuffle(size: int, key: int) -> npt.NDArray[np.int64]:
    """A permutation of range(size) as a table: for where every place of a short range is wanted at once.

    It sorts the first outputs of SplitMix64, which are distinct because its finaliser is a bijection.
    """
    words = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
    return np.argsort(_mix64(words))


class KeyedPermutation:
    """A permutation of range(size) chosen by a 64-bit key, evaluated at any index without a table.

    A generalised Feistel network with cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains"). Write an index as left * columns + right, with rows = ceil(sqrt(size)) and columns =
    ceil(size / rows). A half-round adds a hash of one half to the other, modulo its range: subtracting the same
    hash undoes it, so every half-round, and the whole network, is a bijection of range(rows * columns). A result
    beyond `size` goes through the network again until it is below: the first return of a bijection to a subset,
    which is a bijection of the subset, for walking back from a result reaches no other index before its own. The
    walks together are at most one tour of all rows * columns < size + rows values, so an evaluation takes fewer than
    1 + 2 / sqrt(size) passes on average.

    Twelve half-rounds. Four are enough where the halves are large (Luby and Rackoff 1988); the rest make the orders
    of a handful of elements come out equally often. This is a shuffle, not a cipher.

    Args:
        size: length of the range, from 1 to 2**62.
        key: which permutation; see `order_key`.

    Raises:
        ValueError: `size` is out of range.
    """

    __slots__ = ("_columns", "_round_keys", "_rows", "size")

    def __init__(self, size: int, key: int) -> None:
        if not 1 <= size <= _MAX_SIZE:
            raise ValueError(f"a permutation of {size} elements is not supported; 1 to 2**62 are")
        self.size = size
        self._rows = math.isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        keys = [_mix64((key + step * _GOLDEN) & _WORD) for step in range(1, 2 * _ROUNDS + 1)]
        self._round_keys = tuple(zip(keys[::2], keys[1::2], strict=True))

    def __call__(self, index: int) -> int:
        """Where `index` goes.

        Raises:
            IndexError: `index` is outside range(size).
        """
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside range({self.size})")
        value: int = self._pass(index)
        while value >= self.size:
            value = self._pass(value)
        return value

    def array(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where each of `indices` goes: the same values as one call for each.

        Raises:
            IndexError: an index is outside range(size).
        """
        if indices.size and not (indices.min() >= 0 and indices.max() < self.size):
            raise IndexError(f"an index is outside range({self.size})")
        values: npt.NDArray[np.uint64] = self._pass(indices.astype(np.uint64))
        while (beyond := np.flatnonzero(values >= self.size)).size:
            values[beyond] = self._pass(values[beyond])
        return values.astype(np.int64)

    def _pass(self, value: Words) -> Words:
        left, right = value // self._columns, value % self._columns
        for left_key, right_key in self._round_keys:
            # Half of the hash's range, so that the sum with a 32-bit half stays inside 64 bits.
            left = (left + (_mix64(right ^ left_key) >> 1)) % self._rows
            right = (right + (_mix64(left ^ right_key) >> 1)) % self._columns
        return left * self._columns + right
