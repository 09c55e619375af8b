"""Verification of a conversion by both models as a whole, where memory has room for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nano_pretrain.convert.hf_files import canonical
from nano_pretrain.convert.names import hf_tensors, shape_text
from nano_pretrain.convert.sides import Sides, alone, loading, our_model, shards
from nano_pretrain.recipe.errors import RunError


@dataclass(frozen=True)
class Logits:
    """How the logits of both models differ.

    Attributes:
        difference: the largest.
        largest: magnitude of a logit.
        greedy: tokens after which both find the same token likeliest.
    """

    difference: float
    largest: float
    greedy: int


def compare_logits(sides: Sides, samples: Sequence[Tensor]) -> Logits:
    """Compare the weights after loading, then the logits of both models.

    Args:
        sides: the conversion.
        samples: token ids, each [length].

    Raises:
        RunError: transformers does not load the checkpoint, or loads other weights.
    """
    theirs = _loaded(sides)
    with alone(sides.recipe) as platform:
        ours = our_model(sides.recipe, platform, max(map(len, samples)))
        sides.fill(shards(ours))
        device = next(ours.parameters()).device
        theirs.to(device)
        pairs = []
        for sample in samples:
            tokens = sample[None].to(device)
            answer = ours(tokens, None, None)[0, :, : sides.model.vocab_size]
            pairs.append((answer, theirs(tokens, use_cache=False).logits[0]))
    return Logits(
        difference=max(float((a - b).abs().max()) for a, b in pairs),
        largest=max(float(b.abs().max()) for _, b in pairs),
        greedy=sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs),
    )


def _loaded(sides: Sides) -> Any:
    """Transformers' model in FP32 with the weights that were converted, each compared as it was after loading."""
    model, report = _load(sides)
    parameters = {canonical(name): parameter for name, parameter in model.named_parameters()}
    targets = {target.name: target for target in hf_tensors(sides.model)}
    for name in [*targets, *parameters]:
        ours = targets[name].shape if name in targets else None
        theirs = tuple(parameters[name].shape) if name in parameters else None
        if ours != theirs:
            raise RunError(
                f"{name}: {shape_text(ours)} in our model and {shape_text(theirs)} in that which transformers makes of "
                f"{sides.hf.directory}"
            )
    for kind, names in report.items():
        if names:
            raise RunError(f"{sides.hf.directory}: transformers reports {kind.replace('_', ' ')}: {next(iter(names))}")
    for target in targets.values():
        for start, block in sides.agreeing(target, _Parameters(parameters)):
            parameters[target.name].data[start : start + len(block)] = block
    return model.eval()


def _load(sides: Sides) -> tuple[Any, dict[str, Any]]:
    from transformers import NemotronHForCausalLM

    config = sides.their_config()
    with loading(sides.hf.directory):
        model, report = NemotronHForCausalLM.from_pretrained(
            sides.hf.directory,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return model, report


class _Parameters:
    """Rows of parameters."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters

    def rows(self, name: str, start: int, count: int) -> Tensor:
        return self._parameters[name].detach()[start : start + count]
