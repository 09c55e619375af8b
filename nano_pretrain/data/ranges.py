"""Which part of a source each stage reads, and where in it a stage's k-th sample of the source lies.

Each stage after the first has a range of its own at the end of the source, of whole documents and as long as it needs;
the first stage has what is before and all generations of shards that were added later. So no stage repeats another.
Where that would take more than half of a source, or leave no sample, every stage has the whole source.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise

from nano_pretrain.data.order import KeyedPermutation, order_key

CACHED_PERMUTATIONS = 8
"""Of each range: its generations in the epochs that are being read."""

Span = tuple[int, int]
"""Tokens [start, end) of a source."""


def _itself(token: int) -> int:
    return token


@dataclass(frozen=True)
class SourceSize:
    """What the order has to know of a source.

    Attributes:
        generations: training tokens of each generation of shards, one after the other in the source's stream.
        document_start: from a token of the first generation to the first token of its document.
    """

    generations: tuple[int, ...]
    document_start: Callable[[int], int] = _itself

    @property
    def tokens(self) -> int:
        """Tokens of all generations."""
        return sum(self.generations)

    @property
    def spans(self) -> list[Span]:
        """Where each generation lies."""
        return list(pairwise(accumulate(self.generations, initial=0)))


@dataclass(frozen=True)
class Need:
    """What a stage reads of a source.

    Attributes:
        stage: its name.
        sequence_length: tokens of a sample without its last label.
        samples: how many it reads.
    """

    stage: str
    sequence_length: int
    samples: int

    @property
    def tokens(self) -> int:
        """Least length of a range that holds them; each sample's last label is the next one's first token."""
        return self.samples * self.sequence_length + 1


def whole_samples(tokens: int, sequence_length: int) -> int:
    """Samples of sequence_length + 1 tokens, each sharing its last token with the next one's first."""
    return max(0, tokens - 1) // sequence_length


def divide(size: SourceSize, first: Need, later: Sequence[Need]) -> list[list[Span]] | None:
    """What each stage reads of a source.

    Neither how much the first stage reads nor a generation that is added changes a range, other than by giving the
    first stage the generation.

    Args:
        size: of the source.
        first: of the run's first stage, whether it reads the source or not.
        later: of the stages after it that read the source, in order.

    Returns:
        Spans of the first stage, then of each of `later`; None if all of them have the whole source.
    """
    whole, *added = size.spans
    border, ranges = whole[1], list[list[Span]]()
    for need in reversed(later):
        if border < need.tokens:
            return None
        start = size.document_start(border - need.tokens)
        ranges.append([(start, border)])
        border = start
    if later and (2 * border < whole[1] or not whole_samples(border, first.sequence_length)):
        return None
    return [[(0, border), *added], *reversed(ranges)]


class StageRange:
    """What one stage reads of one source, and in which order.

    An epoch reads every sample of the first span, then of the second, and so on; in each in the order of a permutation
    of its own, which is another in every epoch. Samples are cut inside a span, so that spans that are added at the end
    change nothing of the first epoch's samples before them.

    Args:
        spans: tokens of the source, ascending.
        sequence_length: tokens of a sample without its last label.
        key: parts of the key of the permutations; see `order_key`.

    Attributes:
        spans, sequence_length: see above.
        samples: samples of an epoch.
    """

    def __init__(self, spans: Sequence[Span], sequence_length: int, key: tuple[int | str, ...]) -> None:
        self.spans = tuple(spans)
        self.sequence_length = sequence_length
        self._ends = list(accumulate(whole_samples(end - start, sequence_length) for start, end in spans))
        self.samples = self._ends[-1]
        self._permutation = lru_cache(CACHED_PERMUTATIONS)(self._new_permutation)
        self._key = key

    @property
    def tokens(self) -> int:
        """Tokens that an epoch trains on."""
        return self.samples * self.sequence_length

    def tokens_of(self, spans: int) -> int:
        """Tokens that an epoch trains on in the first `spans` spans, or in all if there are fewer."""
        return self._ends[min(spans, len(self._ends)) - 1] * self.sequence_length

    def place(self, number: int) -> tuple[int, int, int]:
        """Where the stage's sample `number` of the source lies, counted from 0 over all phases.

        Returns:
            How often the stage had read the whole range before, the number of the sample in the range, and its first
            token in the source's stream.
        """
        epoch, rest = divmod(number, self.samples)
        span = bisect_right(self._ends, rest)
        before = self._ends[span - 1] if span else 0
        slot = self._permutation(epoch, span)(rest - before)
        return epoch, before + slot, self.spans[span][0] + slot * self.sequence_length

    def _new_permutation(self, epoch: int, span: int) -> KeyedPermutation:
        size = self._ends[span] - (self._ends[span - 1] if span else 0)
        return KeyedPermutation(size, order_key(*self._key, epoch, span))


class SourceRanges:
    """What the stages of a run read of one source. Its methods take the tokens that stages have read of it so far.

    Args:
        size: of the source.
        first: need of the run's first stage; without samples if it does not read the source.
        later: needs of the stages after it that read the source, in order.
        key: parts of the key of the order.

    Attributes:
        size: see above.
        by_stage: range of each stage that reads the source, in order.
        shared: whether several stages read the whole source, because it is too small for ranges.
    """

    def __init__(self, size: SourceSize, first: Need, later: Sequence[Need], key: tuple[int | str, ...]) -> None:
        self.size = size
        spans = divide(size, first, later)
        readers = [first, *later]
        parts = [
            StageRange(part, need.sequence_length, (*key, need.stage))
            for need, part in zip(readers, spans or [size.spans] * len(readers), strict=True)
        ]
        self.by_stage = {need.stage: part for need, part in zip(readers, parts, strict=True) if need.samples}
        self._divided = sum(part.tokens for part in parts)
        self.shared = spans is None and len(self.by_stage) > 1
        self._key = key

    def shared_with(self, stage: str, sequence_length: int) -> SourceRanges:
        """A copy in which another stage reads the whole source; nothing changes for those that read it already."""
        other = copy(self)
        whole = StageRange(self.size.spans, sequence_length, (*self._key, stage))
        other.by_stage, other.shared = {**self.by_stage, stage: whole}, True
        return other

    def epochs(self, read: Mapping[str, int]) -> Fraction:
        """How often the source was read: tokens read over the tokens of all ranges, also of one that no stage reads."""
        return Fraction(sum(read.values()), self.size.tokens if self.shared else self._divided)

    def readings(self, read: Mapping[str, int]) -> Fraction:
        """How often the part that was read most was read: the range of a stage, and what all of them share."""
        shares = self._shares(read)
        whole = {stage for stage in shares if self.by_stage[stage].spans == tuple(self.size.spans)}
        own = max((share for stage, share in shares.items() if stage not in whole), default=Fraction(0))
        return own + sum((shares[stage] for stage in whole), Fraction(0))

    def read_twice(self, read: Mapping[str, int]) -> Fraction:
        """Share of the source that was read more than once.

        Of a shared source the share to be expected: each stage reads it in an order of its own.
        """
        shares = self._shares(read)
        again = {stage: min(max(share - 1, Fraction(0)), Fraction(1)) for stage, share in shares.items()}
        if not self.shared:
            twice = sum((again[stage] * self.by_stage[stage].tokens for stage in read), Fraction(0))
            return twice / self._divided
        never, once = Fraction(1), Fraction(0)
        for stage, share in shares.items():
            unread, single = 1 - min(share, Fraction(1)), min(share, Fraction(1)) - again[stage]
            never, once = never * unread, once * unread + never * single
        return 1 - never - once

    def keeps(self, generations: tuple[int, ...], read: Mapping[str, int]) -> bool:
        """Whether the same samples would have been read, had the source's generations been these, as they once were.

        Shards may be added as a new generation while no stage that reads it has come to the end of the others.
        """
        if self.size.generations[: len(generations)] != generations:
            return False
        parts = {stage: self.by_stage[stage] for stage in read}
        ends = {stage: part.tokens_of(len(generations)) for stage, part in parts.items()}
        return all(ends[stage] == parts[stage].tokens or tokens <= ends[stage] for stage, tokens in read.items())

    def _shares(self, read: Mapping[str, int]) -> dict[str, Fraction]:
        """How often each stage read its range."""
        return {stage: Fraction(tokens, self.by_stage[stage].tokens) for stage, tokens in read.items()}
