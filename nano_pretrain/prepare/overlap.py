"""Near-duplicate removal: which held-out documents have been seen in training.

A held-out document is dropped when at least half of its word 8-grams occur in the training text of any source. This is
the criterion of PaLM (Chowdhery et al. 2022, section 8: 70 percent of 8-grams), stricter in its share. It is exact but
for collisions of 64-bit hashes: unlike MinHash, which estimates the resemblance of two documents, it also finds a short
document inside a long one, and a document whose parts lie in several. The training n-grams are only looked up, never
stored, so memory is that of the held-out n-grams. Where the held-out documents are given, because shards are added to
a corpus, the same criterion leaves out training documents.

The same function decontaminates: pass the documents of a benchmark as `heldout`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

NGRAM = 8
MAX_CONTAINMENT = 0.5

# Thai, Lao, Burmese, Khmer, kana and Han are written without spaces: there each character is a word.
_WORD = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
    "|[^\\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)


class _Ngrams:
    """Hashes of word n-grams; a word is numbered when it is first met, so hashes compare within one instance only."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def of(self, text: str) -> npt.NDArray[np.uint64]:
        """Hash of each n-gram of the text in order; empty when it has fewer words than `NGRAM`."""
        numbers = self._numbers
        words = [numbers.setdefault(word, len(numbers)) for word in _WORD.findall(text.lower())]
        count = len(words) - NGRAM + 1
        if count <= 0:
            return np.empty(0, np.uint64)
        mixed = _mix(np.array(words, np.uint64))
        hashes = np.zeros(count, np.uint64)
        for offset in range(NGRAM):
            hashes = hashes * _FACTOR + mixed[offset : offset + count]
        return hashes


_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection of 64-bit numbers that spreads every bit."""
    x = (x + np.uint64(1)) * _FACTOR
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def containment(heldout: Sequence[str], training: Iterable[str]) -> npt.NDArray[np.float64]:
    """Share of the word 8-grams of each held-out text that occur in the training texts.

    Args:
        heldout: texts to judge.
        training: all training texts; read once.

    Returns:
        float64 of shape (number of held-out texts,); 1.0 for a text too short to have an n-gram.
    """
    ngrams = _Ngrams()
    own = [ngrams.of(text) for text in heldout]
    known = np.unique(np.concatenate([*own, np.empty(0, np.uint64)]))
    seen = np.zeros(known.size, np.bool_)
    for text in training:
        seen[_places(known, ngrams.of(text))] = True
    return np.array([seen[np.searchsorted(known, hashes)].mean() if hashes.size else 1.0 for hashes in own])


def admitted(heldout: Sequence[str], training: Iterable[str], candidates: Iterable[str]) -> list[bool]:
    """Which texts may join the training texts without bringing a held-out text to `MAX_CONTAINMENT` in all of them.

    Args:
        heldout: texts that stay held out.
        training: all training texts so far; read once.
        candidates: texts to judge, one after the other; one that is refused does not count for the next.

    Returns:
        For each candidate whether it may join. One that adds nothing to a held-out text always may.
    """
    ngrams = _Ngrams()
    own = [ngrams.of(text) for text in heldout]
    known, places = np.unique(np.concatenate([*own, np.empty(0, np.uint64)]), return_inverse=True)
    owners = np.repeat(np.arange(len(own)), [hashes.size for hashes in own])
    limits = MAX_CONTAINMENT * np.bincount(owners, minlength=len(own))
    seen = np.zeros(known.size, np.bool_)
    for text in training:
        seen[_places(known, ngrams.of(text))] = True

    def judge(text: str) -> bool:
        found = _places(known, ngrams.of(text))
        found = found[~seen[found]]
        if not found.size:
            return True
        seen[found] = True
        counts = np.bincount(owners, weights=seen[places], minlength=len(own))
        touched = owners[np.isin(places, found)]
        refused = bool(np.any(counts[touched] >= limits[touched]))
        seen[found] = not refused
        return not refused

    return [judge(text) for text in candidates]


def _places(known: npt.NDArray[np.uint64], hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """Where in `known`, which is sorted, those of the hashes lie that are in it."""
    places = np.searchsorted(known, hashes)
    inside = places < known.size
    places, hashes = places[inside], hashes[inside]
    found: npt.NDArray[np.intp] = places[known[places] == hashes]
    return found
