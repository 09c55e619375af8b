"""The samples of a step do not depend on how many data-parallel ranks read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.loader import BatchReader, MicroBatch, batch_of
from nano_pretrain.data.shards import open_corpus
from tests.corpora import EOD, write_corpus
from tests.model.recipes import small_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("batches") / "corpus")


def step(corpus_path: Path, place: tuple[int, int], micro_batch_size: int, consumed: int = 0) -> list[MicroBatch]:
    recipe = small_recipe(corpus=corpus_path)
    recipe.stages["pretrain"].micro_batch_size = micro_batch_size
    corpus = open_corpus(corpus_path)
    curriculum = Curriculum(recipe, corpus.sizes)
    return list(BatchReader(corpus, curriculum, place, True, CPU).micro_batches(consumed))


@pytest.mark.parametrize(("size", "micro_batch_size"), [(1, 1), (1, 8), (2, 2), (2, 4), (4, 1), (8, 1)])
def test_ranks_share_the_samples_of_a_step(size: int, micro_batch_size: int, corpus_path: Path) -> None:
    whole = torch.cat([batch.tokens for batch in step(corpus_path, (0, 1), 2)])
    ranks = [step(corpus_path, (rank, size), micro_batch_size) for rank in range(size)]
    assert {len(batches) for batches in ranks} == {8 // (size * micro_batch_size)}
    # Micro-batch m of all ranks comes before micro-batch m + 1 of any.
    shared = torch.cat([batch.tokens for batches in zip(*ranks, strict=True) for batch in batches])
    assert torch.equal(shared, whole)


def test_steps_read_other_samples(corpus_path: Path) -> None:
    first, second = (step(corpus_path, (0, 1), 8, consumed)[0].tokens for consumed in (0, 8 * 48))
    assert not set(map(tuple, first.tolist())) & set(map(tuple, second.tolist()))


@given(st.lists(st.sampled_from([EOD, 7, 8, 9]), min_size=2, max_size=40))
def test_labels_follow_and_documents_end_with_their_last_token(row: list[int]) -> None:
    batch = batch_of(np.array([row]), EOD, CPU)
    assert batch.tokens.tolist() == [row[:-1]]
    assert batch.labels.tolist() == [row[1:]]
    assert batch.documents is not None
    # The end-of-document token belongs to the document that it ends.
    assert batch.documents.tolist() == [[row[:position].count(EOD) for position in range(len(row) - 1)]]
    assert batch_of(np.array([row]), None, CPU).documents is None
