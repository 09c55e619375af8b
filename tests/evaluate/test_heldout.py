"""Held-out loss per source: what is counted, also where a source has less text than a sample."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nano_pretrain.data.loader import MicroBatch
from nano_pretrain.data.shards import open_corpus
from nano_pretrain.evaluate.heldout import HeldOut
from nano_pretrain.platform import Platform
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.schema import ParallelConfig
from tests.corpora import EOD, SOURCES, write_corpus
from tests.distributed.ranks import run_ranks
from tests.distributed.training import heldout_loss
from tests.model.recipes import small_recipe

WEIGHTS = dict(zip(SOURCES, (2.0, 1.0, 1.0), strict=True))


def one_nat_a_token(
    batches: Iterator[MicroBatch], count: int, shape: tuple[int, int], forward_only: bool, score: Any
) -> list[Any]:
    """What a model with a loss of 1 everywhere reports."""
    assert forward_only
    taken = [next(batches) for _ in range(count)]
    assert all(batch.tokens.shape == (shape[1], shape[0]) for batch in taken)
    return [score(batch, torch.ones(batch.tokens.shape)) for batch in taken]


@pytest.mark.parametrize("length", [16, 200, 100_000])
def test_every_source_counts_its_own_tokens_and_bytes(platform: Platform, tmp_path: Path, length: int) -> None:
    corpus = open_corpus(write_corpus(tmp_path / "corpus", documents=8))
    limit = 300
    heldout = HeldOut(corpus, WEIGHTS, length, 4, limit, False, torch.device("cpu"))
    result = heldout.evaluate(one_nat_a_token)
    assert list(result["sources"]) == sorted(SOURCES)
    for name, numbers in result["sources"].items():
        stream = corpus.heldout[name]
        count = min(limit, stream.tokens - 1)
        predicted = stream.read(1 + (stream.tokens - 1 - count) // 2, count)
        # A token of the corpus is one or two bytes long; the end of a document is none.
        expected = sum(0 if token == EOD else 1 + (token >= 3 + 256) for token in predicted.tolist())
        assert numbers["tokens"] == len(predicted)
        assert numbers["bytes"] == expected
        assert numbers["loss"] == pytest.approx(1.0)
        assert numbers["bits_per_byte"] == pytest.approx(len(predicted) / math.log(2) / expected)
    assert result["blend"]["loss"] == pytest.approx(1.0)


def test_source_without_held_out_text_is_named(tmp_path: Path) -> None:
    corpus = open_corpus(write_corpus(tmp_path / "corpus", documents=3))
    with pytest.raises(UserError, match="source alpha has no held-out text"):
        HeldOut(corpus, WEIGHTS, 16, 4, 300, False, torch.device("cpu"))


FP32 = 1e-7
"""Of a mean over 257 tokens, summed in float64: losses off by an FP32 rounding (6e-8) each; measured up to 5e-9."""


@pytest.fixture(scope="module")
def of_one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """A recipe and its held-out loss."""
    recipe = small_recipe(corpus=write_corpus(tmp_path_factory.mktemp("heldout") / "corpus"))
    return recipe, run_ranks(heldout_loss, 1, recipe, ParallelConfig())[0]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ParallelConfig(context=2)),
        (4, ParallelConfig(context=2)),
        pytest.param(4, ParallelConfig(context=4), marks=pytest.mark.full),
        pytest.param(4, ParallelConfig(context=2, pipeline=2), marks=pytest.mark.full),
        pytest.param(4, ParallelConfig(context=2, tensor=2, sequence=True), marks=pytest.mark.full),
    ],
)
def test_ranks_that_share_a_sequence_count_every_token_once(
    ranks: int, layout: ParallelConfig, of_one_rank: tuple[Any, dict[str, Any]]
) -> None:
    recipe, expected = of_one_rank
    for found in run_ranks(heldout_loss, ranks, recipe, layout):
        assert found["blend"] == pytest.approx(expected["blend"], rel=FP32)
        assert found["sources"].keys() == expected["sources"].keys()
        for name, numbers in found["sources"].items():
            assert numbers["tokens"] == 5 * 48 + 17
            assert numbers == pytest.approx(expected["sources"][name], rel=FP32)
