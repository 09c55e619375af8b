"""Scores of retrieval and loss by position, with stand-ins for the model, and across ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from nano_pretrain.data.loader import MicroBatch
from nano_pretrain.data.shards import Corpus, open_corpus
from nano_pretrain.evaluate.heldout import HeldOut
from nano_pretrain.evaluate.positions import LossByPosition, bin_edges
from nano_pretrain.evaluate.prompts import CANDIDATES, Example, Prompts
from nano_pretrain.evaluate.retrieval import estimate, match_scores, rank_scores
from nano_pretrain.evaluate.rows import Passes, Run
from nano_pretrain.evaluate.windows import ENOUGH, Window, concatenated_windows, whole_windows
from nano_pretrain.platform import Platform
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import RETRIEVAL_TASKS, ParallelConfig
from tests.corpora import EOD, SOURCES, write_corpus
from tests.distributed.ranks import run_ranks
from tests.distributed.training import length_lines
from tests.evaluate.test_prompts import prompts as prompts_of
from tests.model.recipes import small_recipe

CPU = torch.device("cpu")
LENGTH = 900
PASSES = Passes((LENGTH, 3), None, CPU)


def nothing(rows: int) -> None:
    """No progress to show."""


def stand_in(losses: Callable[[Tensor, Tensor], Tensor]) -> Run:
    """A model whose loss is a function of tokens and labels [batch, length]."""

    def run(batches: Iterator[MicroBatch], count: int, shape: tuple[int, int], forward_only: bool, score: Any) -> Any:
        assert forward_only
        taken = [next(batches) for _ in range(count)]
        assert all(batch.tokens.shape == shape[::-1] for batch in taken)
        return [score(batch, losses(batch.tokens, batch.labels).float()) for batch in taken]

    return run


def uniform(tokens: Tensor, labels: Tensor) -> Tensor:
    """Every token is equally likely."""
    return torch.ones(labels.shape)


def knows(examples: list[Example], which: int) -> Run:
    """A model that expects the first token of one candidate of each prompt, and is worse at the prompt before it."""

    def losses(tokens: Tensor, labels: Tensor) -> Tensor:
        out = torch.ones(labels.shape)
        for row, found in zip(tokens.tolist(), out, strict=True):
            for example in examples:
                size, answer = len(example.prompt), example.candidates[which]
                if row[:size] == example.prompt and row[size : size + len(answer) - 1] == answer[:-1]:
                    found[: size - 1] = 3
                    found[size - 1] = 0.5
        return out

    return stand_in(losses)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return open_corpus(write_corpus(tmp_path_factory.mktemp("length") / "corpus"))


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> Tokenizer:
    return Tokenizer.from_file(str(corpus.tokenizer_file))


@pytest.fixture(scope="module")
def examples(tokenizer: Tokenizer) -> dict[str, list[Example]]:
    """Five prompts of each task."""
    return {task: Prompts(tokenizer).examples(task, LENGTH, 5, 0) for task in RETRIEVAL_TASKS}


@pytest.mark.parametrize("task", RETRIEVAL_TASKS)
def test_who_knows_the_answer_scores_one_and_who_knows_nothing_scores_chance(
    platform: Platform, examples: dict[str, list[Example]], task: str
) -> None:
    prompts = examples[task]
    assert rank_scores(knows(prompts, 0), PASSES, prompts, nothing) == [1.0] * 5
    assert rank_scores(knows(prompts, 1), PASSES, prompts, nothing) == [0.0] * 5
    assert rank_scores(stand_in(uniform), PASSES, prompts, nothing) == [1 / CANDIDATES] * 5


def test_a_model_that_is_broken_scores_nothing(platform: Platform, examples: dict[str, list[Example]]) -> None:
    broken = stand_in(lambda tokens, labels: torch.full(labels.shape, math.nan))
    assert rank_scores(broken, PASSES, examples["vt"], nothing) == [0.0] * 5


def test_continuations_are_searched_for_every_answer(platform: Platform) -> None:
    tokenizer, maker = prompts_of(60)
    prompts = maker.examples("vt", LENGTH, 5, 0)

    def scores(answer: Callable[[Example], list[str]]) -> list[float]:
        by_prompt = {tuple(example.prompt): example for example in prompts}

        def complete(prompt: list[int], most: int) -> list[int]:
            example = by_prompt[tuple(prompt)]
            ids = tokenizer.encode(" ".join(answer(example))).ids
            assert len(ids) <= most == example.room
            return ids

        return match_scores(complete, tokenizer, prompts, CPU, nothing)

    assert scores(lambda example: list(example.references)) == [1.0] * 5
    assert scores(lambda example: [name.lower() for name in example.references]) == [1.0] * 5
    assert scores(lambda example: [example.references[1]]) == pytest.approx([1 / 3] * 5)
    assert scores(lambda example: ["no idea"]) == [0.0] * 5


def test_standard_error_is_that_of_the_mean() -> None:
    found = estimate([1.0, 0.0, 0.0, 1.0])
    assert found.score == 0.5
    assert found.standard_error == pytest.approx(math.sqrt(1 / 3 / 4))
    assert estimate([0.25]).standard_error is None


def hard_to_copy(tokens: Tensor, labels: Tensor) -> Tensor:
    """A loss that depends on token, label and position."""
    return (labels % 7) / 3 + (tokens % 5) / 11 + torch.arange(labels.shape[1]) / 100


def test_loss_by_position_has_the_mean_of_the_held_out_loss_on_the_same_samples(
    platform: Platform, corpus: Corpus
) -> None:
    length, count = 100, 6
    # Document after document is shorter than this: samples are cut as training samples are.
    positions = LossByPosition(corpus, sorted(SOURCES), 400, 3)
    assert (positions.whole, positions.samples) == (False, 3)
    for name in SOURCES:
        one = LossByPosition(corpus, [name], length, count)
        # The very tokens of the held-out loss: the middle of the stream.
        first = (corpus.heldout[name].tokens - 1 - count * length) // 2
        one._windows = [Window(corpus.heldout[name], first + length * number) for number in range(count)]
        found = one.evaluate(stand_in(hard_to_copy), Passes((112, 4), EOD, CPU), nothing)
        heldout = HeldOut(corpus, {name: 1.0}, length, 4, count * length, True, CPU)
        expected = heldout.evaluate(stand_in(hard_to_copy))["blend"]["loss"]
        # Summed in double precision, in another order.
        assert found["loss"] == pytest.approx(expected, rel=1e-12)
        edges, means = found["bins"]["edges"], found["bins"]["loss"]
        total = sum(mean * (high - low) for mean, (low, high) in zip(means, pairwise(edges), strict=True))
        assert total / length == pytest.approx(expected, rel=1e-12)


def test_each_position_counts_in_its_own_bin(platform: Platform, corpus: Corpus) -> None:
    places = stand_in(lambda tokens, labels: torch.arange(labels.shape[1]).expand(labels.shape))
    found = LossByPosition(corpus, sorted(SOURCES), 100, 4).evaluate(places, Passes((100, 3), None, CPU), nothing)
    edges = [0, 16, 23, 32, 45, 64, 91, 100]
    middles = [(low + high - 1) / 2 for low, high in pairwise(edges)]
    assert found["bins"] == {"edges": edges, "loss": middles, "standard_error": [0.0] * len(middles)}


def test_samples_lie_within_long_documents_where_there_are_enough(corpus: Corpus) -> None:
    positions = LossByPosition(corpus, sorted(SOURCES), 100, 12)
    assert (positions.whole, positions.samples) == (True, 12)
    names = [window.stream.name for window in positions._windows]
    assert names[:3] == sorted(SOURCES), "each source in its turn"
    for window in positions._windows:
        assert EOD not in window.stream.read(window.start, 100)
    assert len({(window.stream.name, window.start) for window in positions._windows}) == 12
    assert not LossByPosition(corpus, sorted(SOURCES), 290, ENOUGH).whole


def test_windows_lie_evenly_over_what_a_source_has(corpus: Corpus) -> None:
    """Else two sources that begin with the same text would count it twice."""
    streams = [corpus.heldout[name] for name in sorted(SOURCES)]
    for stream in streams:
        found = [window.start for window in concatenated_windows([stream], 100, 3)]
        every = range(0, stream.tokens - 100, 100)
        assert found == [every[(2 * number + 1) * len(every) // 6] for number in range(3)]
        assert found[0] >= 100
    whole, first = (whole_windows(streams, 100, count, EOD) for count in (10**6, 5))
    assert [window.stream.name for window in first] == [*sorted(SOURCES), *sorted(SOURCES)[:2]]
    assert set(first) < set(whole)
    assert len(set(whole)) == len(whole)
    rows = [tuple(window.stream.read(window.start, 100).tolist()) for window in whole]
    assert not any(EOD in row for row in rows)


def test_length_beyond_all_held_out_text_is_refused(corpus: Corpus) -> None:
    most = max(stream.tokens for stream in corpus.heldout.values()) - 1
    assert LossByPosition(corpus, sorted(SOURCES), most, 4).samples >= 1
    with pytest.raises(RecipeError, match=rf"evaluate\.lengths: no source has {most + 1} .*; write at most {most}"):
        LossByPosition(corpus, sorted(SOURCES), most + 1, 4)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 512, 8192, 524_288])
def test_bins_cover_every_position_once(length: int) -> None:
    edges = bin_edges(length)
    assert (edges[0], edges[-1]) == (0, length)
    assert edges == sorted(set(edges))
    assert len(edges) <= 2 + 2 * math.log2(max(length, 16) / 16) + 1


FP32 = 1e-6
"""Of means over hundreds of losses of about 6, each of which may be off by an FP32 rounding (5e-7)."""


@pytest.fixture(scope="module")
def of_one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, Any]]]:
    """A recipe and what is evaluated after one of its steps."""
    recipe = small_recipe(corpus=write_corpus(tmp_path_factory.mktemp("ranks") / "corpus"))
    recipe.evaluate.lengths, recipe.evaluate.tasks, recipe.evaluate.examples = [333, 403], ["niah_single"], 5
    return recipe, run_ranks(length_lines, 1, recipe, ParallelConfig())[0]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ParallelConfig(context=2)),
        pytest.param(2, ParallelConfig(), marks=pytest.mark.full),
        pytest.param(4, ParallelConfig(pipeline=2), marks=pytest.mark.full),
        pytest.param(4, ParallelConfig(context=2, tensor=2, sequence=True), marks=pytest.mark.full),
        pytest.param(4, ParallelConfig(context=2, pipeline=2), marks=pytest.mark.full),
    ],
)
def test_every_layout_finds_the_same(
    ranks: int, layout: ParallelConfig, of_one_rank: tuple[Any, list[dict[str, Any]]]
) -> None:
    recipe, expected = of_one_rank
    assert all(line["retrieval"]["niah_single"]["match"] is not None for line in expected)
    for found in run_ranks(length_lines, ranks, recipe, layout):
        for line, one in zip(found, expected, strict=True):
            rank, match = (line["retrieval"]["niah_single"][name] for name in ("rank", "match"))
            assert rank == one["retrieval"]["niah_single"]["rank"]
            assert match == (one["retrieval"]["niah_single"]["match"] if layout == ParallelConfig() else None)
            positions, alone = line["positions"], one["positions"]
            assert positions["bins"]["loss"] == pytest.approx(alone["bins"]["loss"], rel=FP32)
            assert positions["loss"] == pytest.approx(alone["loss"], rel=FP32)
            assert (positions["samples"], positions["documents"]) == (alone["samples"], alone["documents"])
