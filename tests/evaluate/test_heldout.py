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
from tests.corpora import EOD, SOURCES, write_corpus

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
        predicted = stream.read(1, min(limit, stream.tokens - 1))
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
