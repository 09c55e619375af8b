"""Each stage has whole documents of its own where the source is large enough, and else all stages have it whole."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_pretrain.data.ranges import Need, SourceSize, StageRange, divide, divide_anew, whole_samples

FIRST = Need("first", 8, 0)
DOCUMENTS = st.lists(st.integers(1, 300), min_size=1, max_size=60)
LATER = st.lists(st.builds(Need, st.just("later"), st.integers(1, 100), st.integers(1, 30)), max_size=3)


def source(documents: list[int], *added: int) -> SourceSize:
    starts = list(accumulate(documents, initial=0))
    return SourceSize((starts[-1], *added), lambda token: max(start for start in starts if start <= token))


@given(DOCUMENTS, LATER, st.lists(st.integers(0, 500), max_size=2))
def test_ranges_are_disjoint_whole_documents_as_long_as_the_stages_need(
    documents: list[int], later: list[Need], added: list[int]
) -> None:
    size = source(documents, *added)
    ranges = divide(size, FIRST, later)
    if ranges is None:
        return
    first, *own = ranges
    borders = {0, *accumulate(documents)}
    assert first[1:] == size.spans[1:]
    ends = [first[0], *(spans[0] for spans in own)]
    assert all(len(spans) == 1 for spans in own)
    assert {border for span in ends for border in span} <= borders
    assert (ends[0][0], ends[-1][1]) == (0, sum(documents))
    assert all(before[1] == after[0] for before, after in pairwise(ends))
    for (start, end), need in zip(ends[1:], later, strict=True):
        assert whole_samples(end - start, need.sequence_length) >= need.samples
        # No longer than it has to be: without its first document it would be too short.
        shorter = min(border for border in borders if border > start)
        assert whole_samples(end - shorter, need.sequence_length) < need.samples


@given(DOCUMENTS, LATER)
def test_a_source_is_shared_only_where_it_is_too_small(documents: list[int], later: list[Need]) -> None:
    size, border = source(documents), sum(documents)
    for need in reversed(later):
        border -= need.samples * need.sequence_length + 1
        border = size.document_start(border) if border >= 0 else border
    too_small = bool(later) and (2 * border < sum(documents) or border < FIRST.sequence_length + 1)
    assert (divide(size, FIRST, later) is None) == too_small


@given(DOCUMENTS, LATER, st.integers(0, 1000), st.integers(0, 500))
def test_neither_the_first_stages_need_nor_a_generation_moves_a_range(
    documents: list[int], later: list[Need], samples: int, added: int
) -> None:
    before = divide(source(documents), FIRST, later)
    assert divide(source(documents), Need("first", 8, samples), later) == before
    grown = divide(source(documents, added), FIRST, later)
    if before is None or grown is None:
        assert before == grown
    else:
        assert (grown[0][:1], grown[1:]) == (before[0], before[1:])


@given(DOCUMENTS, LATER, st.data())
def test_what_stages_are_given_anew_is_outside_of_what_others_keep(
    documents: list[int], needs: list[Need], data: st.DataObject
) -> None:
    size, borders = source(documents, 7), [0, *accumulate(documents)]
    start, end = sorted(data.draw(st.lists(st.sampled_from(borders), min_size=2, max_size=2)))
    taken, given = set(range(start, end)), divide_anew(size, [(start, end)], needs)
    for need, spans in reversed(list(zip(needs, given, strict=True))):
        own = [token for begin, stop in spans for token in range(begin, stop)]
        assert {border for span in spans for border in span} <= {*borders, size.tokens}
        if len(own) == size.tokens:
            # First what nobody has, of which there was not enough in one place.
            free = sorted(set(range(sum(documents))) - taken)
            assert own[: len(free)] == free
            assert all(stop - begin < need.tokens for begin, stop in spans if begin in free)
        else:
            assert not taken & set(own)
            assert whole_samples(len(own), need.sequence_length) >= need.samples
        taken |= set(own)


def test_an_epoch_reads_generation_after_generation_and_adding_one_keeps_the_others() -> None:
    spans = [(0, 8 * 20 + 3), (163, 163), (163, 163 + 8 * 5 + 1)]
    before, after = (StageRange(spans[:count], 8, ("key",)) for count in (1, 3))
    first = [after.place(number) for number in range(25)]
    assert first[:20] == [before.place(number) for number in range(20)]
    assert sorted(start for _, _, start in first[:20]) == list(range(0, 160, 8))
    assert sorted(start for _, _, start in first[20:]) == list(range(163, 203, 8))
    again = [after.place(number) for number in range(25, 50)]
    assert [epoch for epoch, _, _ in again] == [1] * 25
    assert {start for _, _, start in again} == {start for _, _, start in first}
    assert [index for _, index, _ in again] != [index for _, index, _ in first]
    assert (after.tokens, after.tokens_before(163), after.tokens_before(999)) == (200, 160, 200)


@pytest.mark.parametrize(("tokens", "samples"), [(0, 0), (8, 0), (9, 1), (16, 1), (17, 2)])
def test_samples_share_their_last_token(tokens: int, samples: int) -> None:
    assert whole_samples(tokens, 8) == samples
