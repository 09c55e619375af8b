"""Which part of a source each stage reads, and where in it a stage's k-th sample of the source lies.

Each stage after the first has a range of its own at the end of the source, of whole documents and as long as it needs;
the first stage has what is before and all generations of shards that were added later. So no stage repeats another.
Where that would take more than half of a source, or leave no sample, every stage has the whole source. When a run is
told something else in mid-run, stages that have begun keep what they have, and the others are given theirs anew.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise

from nano_pretrain.data.order import KeyedPermutation, order_key

CACHED_PERMUTATIONS = 8
"""Of each range: its generations in the epochs that are being read."""

Span = tuple[int, int]
"""Tokens [start, end) of a source."""


def _overlap(first: Span, second: Span) -> bool:
    return max(first[0], second[0]) < min(first[1], second[1])


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


def divide_anew(size: SourceSize, kept: Iterable[Span], needs: Sequence[Need]) -> list[list[Span]]:
    """What stages that have read nothing of a source have of it, beside stages that have begun to read it.

    Args:
        size: of the source.
        kept: spans of the stages that have begun.
        needs: of the others, in order.

    Returns:
        Spans of each of `needs`, in the order of its reading: whole documents at the end of what no stage has, as long
        as it needs. Where there is less, all that no stage has, and then the rest of the source, which others read too.
    """
    taken, found = list(kept), list[list[Span]]()
    for need in reversed(needs):
        free = _outside(taken, size)
        room = next((span for span in reversed(free) if span[1] - span[0] >= need.tokens), None)
        if room:
            spans = [(size.document_start(room[1] - need.tokens), room[1])]
        else:
            spans = [*free, *_outside(free, size), *size.spans[1:]]
        found.append(spans)
        taken += spans
    return found[::-1]


def _outside(taken: Iterable[Span], size: SourceSize) -> list[Span]:
    """What none of these spans has of the first generation, ascending."""
    whole, found, reached = size.generations[0], list[Span](), 0
    for start, end in sorted([*taken, (whole, whole)]):
        if reached < start <= whole:
            found.append((reached, start))
        reached = max(reached, end)
    return found


class StageRange:
    """What one stage reads of one source, and in which order.

    An epoch reads every sample of the first span, then of the second, and so on; in each in the order of a permutation
    of its own, which is another in every epoch. Samples are cut inside a span, so that spans that are added at the end
    change nothing of the first epoch's samples before them.

    Args:
        spans: tokens of the source, in the order of their reading.
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

    def tokens_before(self, added: int) -> int:
        """Tokens that an epoch trains on before it comes to a span that begins at token `added` or later."""
        ends = zip(self.spans, [0, *self._ends], strict=False)
        return next((end for (start, _), end in ends if start >= added), self.samples) * self.sequence_length

    def times_read(self, tokens: int) -> Iterator[tuple[Span, Fraction]]:
        """How often each span was read, on average, after `tokens` tokens of the stage.

        A span is without the rest at its end that is no whole sample; one that has no sample is left out.
        """
        epochs, rest = divmod(tokens // self.sequence_length, self.samples)
        for (start, _), before, after in zip(self.spans, [0, *self._ends], self._ends, strict=False):
            if after > before:
                share = Fraction(min(max(rest - before, 0), after - before), after - before)
                yield (start, start + (after - before) * self.sequence_length), epochs + share

    def samples_outside(self, read: Sequence[Span]) -> int:
        """Samples of an epoch before the first span that has text in common with these."""
        for span, before in zip(self.spans, [0, *self._ends], strict=False):
            if any(_overlap(span, other) for other in read):
                return before
        return self.samples

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
        by_stage: range of each stage that reads the source, in order.

    Attributes:
        size, by_stage: see above.
        sharing: stages whose range has text in common with another's.
    """

    def __init__(self, size: SourceSize, by_stage: Mapping[str, StageRange]) -> None:
        self.size = size
        self.by_stage = by_stage
        self.sharing = tuple(stage for stage in by_stage if self._has_what_others_have(stage))

    def epochs(self, read: Mapping[str, int]) -> Fraction:
        """How often the source was read: tokens read over its tokens."""
        return Fraction(sum(read.values()), self.size.tokens)

    def most_read(self, read: Mapping[str, int]) -> dict[str, Fraction]:
        """How often each stage has read the part that was read most."""
        return max((times for _, times in self._parts(read)), key=lambda times: sum(times.values()))

    def read_twice(self, read: Mapping[str, int]) -> Fraction:
        """Share of the source that was read more than once.

        Of what several stages have the share to be expected: each reads it in an order of its own.
        """
        again = Fraction(0)
        for tokens, times in self._parts(read):
            never, once = Fraction(1), Fraction(0)
            for often in times.values():
                unread, single = max(1 - often, Fraction(0)), max(1 - abs(1 - often), Fraction(0))
                never, once = never * unread, once * unread + never * single
            again += tokens * (1 - never - once)
        return again / self.size.tokens

    def first_again(self, stage: str, read: Mapping[str, int]) -> int:
        """Samples that a stage reads before the first one that it, or a stage that has read so much, may have read."""
        times = (part for other, tokens in read.items() for part in self.by_stage[other].times_read(tokens))
        found = [span for span, often in times if often]
        return self.by_stage[stage].samples_outside(found)

    def keeps(self, generations: tuple[int, ...], read: Mapping[str, int]) -> bool:
        """Whether the same samples would have been read, had the source's generations been these, as they once were.

        Shards may be added as a new generation while no stage that reads it has come to the end of the others.
        """
        if self.size.generations[: len(generations)] != generations:
            return False
        parts = {stage: self.by_stage[stage] for stage in read}
        ends = {stage: part.tokens_before(sum(generations)) for stage, part in parts.items()}
        return all(ends[stage] == parts[stage].tokens or tokens <= ends[stage] for stage, tokens in read.items())

    def _has_what_others_have(self, stage: str) -> bool:
        others = [span for other, part in self.by_stage.items() if other != stage for span in part.spans]
        part = self.by_stage[stage]
        return part.samples_outside(others) < part.samples

    def _parts(self, read: Mapping[str, int]) -> Iterator[tuple[int, dict[str, Fraction]]]:
        """What is between the borders of ranges: its tokens, and how often each stage that has it has read it."""
        found = [(stage, *part) for stage, tokens in read.items() for part in self.by_stage[stage].times_read(tokens)]
        borders = sorted({border for _, span, _ in found for border in span})
        for start, end in pairwise(borders):
            yield end - start, {stage: often for stage, span, often in found if _overlap(span, (start, end))}


def ranges_at_begin(size: SourceSize, first: Need, later: Sequence[Need], key: tuple[int | str, ...]) -> SourceRanges:
    """The ranges that a run begins with.

    Args:
        size: of the source.
        first: need of the run's first stage; without samples if it does not read the source.
        later: needs of the stages after it that read the source, in order.
        key: parts of the key of the order.
    """
    readers = [first, *later]
    spans = divide(size, first, later) or [size.spans] * len(readers)
    return SourceRanges(
        size,
        {
            need.stage: StageRange(part, need.sequence_length, (*key, need.stage))
            for need, part in zip(readers, spans, strict=True)
            if need.samples
        },
    )


def ranges_in_midrun(
    size: SourceSize, kept: Mapping[str, StageRange], needs: Sequence[Need], key: tuple[int | str, ...]
) -> SourceRanges:
    """The ranges of a run that is told something else.

    Args:
        size: of the source.
        kept: ranges of stages that have begun, which stay what they are.
        needs: of all stages that read the source, in order.
        key: parts of the key of the order.
    """
    others = [need for need in needs if need.stage not in kept]
    spans = divide_anew(size, [span for part in kept.values() for span in part.spans], others)
    made = {
        need.stage: StageRange(part, need.sequence_length, (*key, need.stage))
        for need, part in zip(others, spans, strict=True)
    }
    return SourceRanges(size, {need.stage: kept.get(need.stage) or made[need.stage] for need in needs})
