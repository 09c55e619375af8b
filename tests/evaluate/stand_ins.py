"""The requests of lm-evaluation-harness to a model of one rank in this process."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer

from nano_pretrain.evaluate.checkpoint import _run_of
from nano_pretrain.evaluate.length import Subject
from nano_pretrain.evaluate.requests import Requests
from nano_pretrain.evaluate.room import pass_shape
from nano_pretrain.recipe.schema import Recipe
from tests.model.recipes import ALONE


def requests_of(model: Any, recipe: Recipe, tokenizer: Tokenizer, eod_id: int, longest: int) -> Requests:
    """As the verb `evaluate` has them."""
    model.eval()
    stage = next(iter(recipe.stages.values()))
    subject = Subject(_run_of(model), None, torch.device("cpu"))
    return Requests(
        subject, model, tokenizer.decode, eod_id, partial(pass_shape, recipe, layout=ALONE, stage=stage), longest
    )
