"""Models and batches of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nano_pretrain.data.loader import MicroBatch, batch_of
from nano_pretrain.platform import Platform
from nano_pretrain.recipe.schema import Recipe
from tests.model.recipes import ALONE

CPU = torch.device("cpu")


def build(platform: Platform, recipe: Recipe, sequence_length: int = 128) -> Any:
    """The model of one rank; imported here, after the platform has prepared megatron-core."""
    from nano_pretrain.model.hybrid import build_model

    return build_model(recipe, ALONE, platform, sequence_length)


def batch(recipe: Recipe, samples: int = 2, length: int = 48, eod_id: int | None = 2, seed: int = 0) -> MicroBatch:
    """Random tokens; about every twentieth ends a document."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, recipe.model.vocab_size, (samples, length + 1))
    if eod_id is not None:
        rows[generator.random(rows.shape) < 0.05] = eod_id
    return batch_of(rows, eod_id, CPU)


def logits(model: Any, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
    """Logits of the whole padded vocabulary [batch, length, rows]."""
    with torch.no_grad():
        answer: Tensor = model(tokens, None, documents)
    return answer


def losses(model: Any, micro_batch: MicroBatch) -> Tensor:
    """Loss of each token [batch, length]."""
    answer: Tensor = model(micro_batch.tokens, None, micro_batch.documents, labels=micro_batch.labels)
    return answer


def parameter(model: Any, ending: str) -> Tensor:
    """The first parameter with this end of its name."""
    return next(iter(parameters(model, (ending,)).values()))


def parameters(model: Any, endings: Sequence[str]) -> dict[str, Tensor]:
    """All parameters with one of these ends of their names."""
    return {name: value.detach() for name, value in model.named_parameters() if name.endswith(tuple(endings))}
