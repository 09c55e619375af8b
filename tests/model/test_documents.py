"""A document does not see the one before it in the sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nano_pretrain.data.loader import MicroBatch
from nano_pretrain.platform import Platform
from tests.model.building import batch, build, logits, losses
from tests.model.recipes import small_recipe

LENGTH, BORDER = 150, 70
"""The border lies inside the second chunk of the scan."""

# Exponents of the scan are differences of sums over the chunk, so their rounding (6e-8 of sums of about 10, over four
# layers) depends on the document before.
ROUNDING = 5e-6


@pytest.fixture(params=["M", "*", "M*-M", "-"])
def model(request: pytest.FixtureRequest, platform: Platform) -> Any:
    return build(platform, small_recipe(pattern=request.param), LENGTH)


def two_documents() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, tokens with another first document, and the documents, each [1, length]."""
    recipe = small_recipe()
    tokens, others = (batch(recipe, 1, LENGTH, None, seed).tokens for seed in (0, 1))
    documents = (torch.arange(LENGTH) >= BORDER).int()[None]
    return tokens, torch.cat([others[:, :BORDER], tokens[:, BORDER:]], 1), documents


def test_logits_do_not_depend_on_the_document_before(model: Any) -> None:
    tokens, changed, documents = two_documents()
    found = logits(model, tokens, documents)[:, BORDER:]
    assert (logits(model, changed, documents)[:, BORDER:] - found).abs().max() < ROUNDING
    assert (logits(model, tokens[:, BORDER:]) - found).abs().max() < ROUNDING, "as if it were alone"


def test_without_resets_they_do(platform: Platform) -> None:
    tokens, changed, _ = two_documents()
    model = build(platform, small_recipe(), LENGTH)
    difference = logits(model, tokens)[:, BORDER:] - logits(model, changed)[:, BORDER:]
    assert difference.abs().max() > 100 * ROUNDING


def test_no_gradient_reaches_the_document_before(model: Any) -> None:
    tokens, _, documents = two_documents()
    # Ids that only the first document has.
    tokens[:, :BORDER] = tokens[:, :BORDER] % 200
    tokens[:, BORDER:] = tokens[:, BORDER:] % 200 + 200
    micro_batch = MicroBatch(tokens, tokens, documents)
    losses(model, micro_batch)[:, BORDER:].sum().backward()
    gradient = next(p.grad for name, p in model.named_parameters() if name.endswith("word_embeddings.weight"))
    assert gradient is not None
    assert gradient[200:400].any()
    assert gradient[:200].abs().max() < ROUNDING * gradient.abs().max()


def test_documents_of_the_rows_of_a_batch_are_their_own(platform: Platform) -> None:
    recipe = small_recipe()
    model = build(platform, recipe, LENGTH)
    both = batch(recipe, 2, LENGTH)
    assert both.documents is not None
    assert not torch.equal(both.documents[0], both.documents[1])
    together = logits(model, both.tokens, both.documents)
    for row in range(2):
        alone = logits(model, both.tokens[row : row + 1], both.documents[row : row + 1])
        assert (together[row] - alone[0]).abs().max() < ROUNDING
