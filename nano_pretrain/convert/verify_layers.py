"""Verification of a conversion a layer at a time, where memory has no room for both models.

Both compute each layer from the same residual stream, ours, so that peak memory is that of two copies of a layer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from nano_pretrain.convert.names import EMBEDDING, FINAL_NORM, HEAD, Target, hf_tensors, layer_tensors
from nano_pretrain.convert.sides import Sides, alone, loading, our_model, shards
from nano_pretrain.platform import Platform
from nano_pretrain.recipe.errors import RunError

STREAM_SHARE = 1e-3
"""What a layer adds is known to no better than the rounding of the residual stream, 2^-23 of its largest number. With a
thousandth of that number counted as added, the rounding is a ten-thousandth of what is counted."""

HEAD_ROWS = 4096
"""Of the head that are multiplied at once."""


@dataclass(frozen=True)
class Layers:
    """How layers and logits of both models differ.

    Attributes:
        layer: largest difference of a layer's outputs, of the largest number that the layer adds.
        difference: the largest of two logits, from the same residual stream.
        largest: magnitude of a logit.
    """

    layer: float
    difference: float
    largest: float


def compare_layers(sides: Sides, sample: Tensor, bound: float) -> Layers:
    """Compare the weights as they are stored and what each layer makes of the residual stream.

    Args:
        sides: the conversion.
        sample: token ids [length].
        bound: of `Layers.layer`.

    Raises:
        RunError: a weight or the output of a layer differs.
    """
    config = sides.their_config()
    # Before a CPU platform keeps what is freed: the largest tensors would leave the largest holes.
    stream = _embedded(sides, sample)
    sides.check(_made_of(sides, HEAD))
    their_norm = _their_norm(sides, config)
    with alone(sides.recipe) as platform:
        # The largest first, whose memory the others take again.
        kinds = [letter for letter in "-M*" if letter in sides.model.pattern]
        models = {letter: _one_layer(sides, platform, letter, len(sample)) for letter in kinds}
        our_norm = models[kinds[0]].decoder.final_norm
        stream, worst = stream.to(our_norm.weight.device), 0.0
        for number in track(range(len(sides.model.pattern)), "verifying", console=Console(file=sys.stderr)):
            after = _our_output(sides, models[sides.model.pattern[number]], number, stream)
            worst = max(worst, _check_layer(sides, number, _their_layer(sides, config, number), (stream, after), bound))
            stream = after
        return Layers(worst, *_compare_logits(sides, our_norm(stream), their_norm.to(stream.device)(stream)))


def _one_layer(sides: Sides, platform: Platform, letter: str, length: int) -> Any:
    """One of our models, of one layer, which has no memory yet."""
    # Nothing is used of embedding and head.
    model = our_model(sides.recipe, platform, length, pattern=letter, vocab_size=1)
    sides.fill(_under(FINAL_NORM, shards(model)))
    _release(model.decoder.layers[0])
    return model


def _under(prefix: str, parts: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in parts.items() if name.startswith(prefix)}


def _release(layer: Any) -> None:
    """Free the memory of a layer's parameters."""
    for parameter in layer.parameters():
        parameter.untyped_storage().resize_(0)


def _our_output(sides: Sides, model: Any, number: int, stream: Tensor) -> Tensor:
    """What layer `number` makes of a residual stream [1, length, hidden], in the one of `model`."""
    layer, here = model.decoder.layers[0], "decoder.layers.0."
    for parameter in layer.parameters():
        parameter.untyped_storage().resize_(parameter.nbytes)
    sides.fill(_under(here, shards(model)), here, f"decoder.layers.{number}.")
    answer = layer(stream.transpose(0, 1).contiguous(), attention_mask=None)
    _release(layer)
    # Attention and feed-forward layers also return a context, which is for cross-attention.
    found: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return found.transpose(0, 1)


def _check_layer(sides: Sides, number: int, theirs: Any, ours: tuple[Tensor, Tensor], bound: float) -> float:
    """Difference of a layer's outputs, of what is counted as added.

    Args:
        sides: the conversion.
        number: of the layer, from 0.
        theirs: transformers' layer.
        ours: residual stream before and after our layer.
        bound: of the difference.

    Raises:
        RunError: it is larger.
    """
    before, after = ours
    difference = float((theirs.to(before.device)(before) - after).abs().max())
    added = float((after - before).abs().max()) + STREAM_SHARE * float(after.abs().max())
    if not difference <= bound * added:
        raise RunError(
            f"backbone.layers.{number} ({sides.model.pattern[number]}): from the same input transformers' output "
            f"differs from ours by {difference:.2e}, and the layer adds up to {added:.2e}; its weights are the same, "
            f"so look at {sides.hf.directory}/config.json"
        )
    return difference / added if added else 0.0


def _their_layer(sides: Sides, config: Any, number: int) -> Any:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHBlock

    with loading(sides.hf.directory), torch.device("meta"):
        block = NemotronHBlock(config, number)
    return _filled(sides, block, layer_tensors(sides.model, number), f"backbone.layers.{number}.")


def _their_norm(sides: Sides, config: Any) -> Any:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNorm

    with loading(sides.hf.directory), torch.device("meta"):
        norm = NemotronHRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
    return _filled(sides, norm, [_made_of(sides, FINAL_NORM)], "backbone.norm_f.")


def _filled(sides: Sides, module: Any, targets: Sequence[Target], prefix: str) -> Any:
    """A module with its tensors from the files, in FP32."""
    state = {target.name.removeprefix(prefix): _agreed(sides, target) for target in targets}
    try:
        module.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        *_, last = str(error).splitlines()
        raise RunError(
            f"{prefix[:-1]}: transformers' layer of {sides.hf.directory} has others: {last.strip()}"
        ) from error
    return module.eval()


def _agreed(sides: Sides, target: Target) -> Tensor:
    """A tensor that is the same on both sides, in FP32."""
    out = torch.empty(target.shape)
    for start, block in sides.agreeing(target, sides.hf):
        out[start : start + len(block)] = block
    return out


def _embedded(sides: Sides, sample: Tensor) -> Tensor:
    """Embeddings [1, length, hidden] of the sample; the whole table is compared on the way."""
    out = torch.empty(1, len(sample), sides.model.hidden_size)
    for start, block in sides.agreeing(_made_of(sides, EMBEDDING), sides.hf):
        inside = (sample >= start) & (sample < start + len(block))
        out[0, inside] = block[sample[inside] - start].float()
    return out


def _compare_logits(sides: Sides, ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Largest difference and magnitude of the logits of two final states [1, length, hidden]."""
    head, difference, largest = _made_of(sides, HEAD), 0.0, 0.0
    for start in range(0, head.shape[0], HEAD_ROWS):
        rows = sides.hf.rows(head.name, start, min(HEAD_ROWS, head.shape[0] - start))
        weight = rows.to(sides.dtype(head)).to(ours.device).float().T
        answers = theirs @ weight
        difference = max(difference, float((ours @ weight - answers).abs().max()))
        largest = max(largest, float(answers.abs().max()))
    return difference, largest


def _made_of(sides: Sides, source: str) -> Target:
    """The tensor of the Hugging Face checkpoint that one of ours becomes."""
    return next(target for target in hf_tensors(sides.model) if target.parts[0].source == source)
