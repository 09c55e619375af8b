"""What quantisation loses in each linear, summed over the micro-batches of a step and over all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nano_pretrain.precision.linear import Fp8Recipe
from nano_pretrain.precision.quantize import Statistics

OPERANDS = ("input", "weight", "gradient")
"""What a linear quantises; input and output's gradient along either axis, and both count."""


class QuantisationLosses:
    """Statistics of the FP8 linears of a model, counted while `counting` is set, in backward passes.

    Args:
        linears: names of those of all pipeline positions.
    """

    def __init__(self, linears: Sequence[str]) -> None:
        self.linears = tuple(linears)
        self.counting = False
        self._sums = torch.zeros(len(linears), len(OPERANDS), len(fields(Statistics)), dtype=torch.float64)

    def add(self, linear: int, recipe: Fp8Recipe, x: Tensor, weight: Tensor, gradient: Tensor) -> None:
        """Count a use of a linear.

        Args:
            linear: its number.
            recipe: how it quantises.
            x: [..., inputs].
            weight: [outputs, inputs].
            gradient: [..., outputs].
        """
        x, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
        found = (
            recipe.input.statistics(x) + recipe.input_by_tokens.statistics(x),
            recipe.weight.statistics(weight),
            recipe.gradient.statistics(gradient) + recipe.gradient_by_tokens.statistics(gradient),
        )
        self._sums[linear] += torch.tensor([astuple(each) for each in found], dtype=torch.float64)

    def take(self) -> dict[str, dict[str, Statistics]]:
        """By linear and operand, of all ranks, each of which must call it; then counts anew.

        Copies of a weight or an input on several ranks count as often as they are there.
        """
        dist.all_reduce(self._sums)
        found = {
            name: {operand: Statistics(*sums) for operand, sums in zip(OPERANDS, of_linear, strict=True)}
            for name, of_linear in zip(self.linears, self._sums.tolist(), strict=True)
        }
        self._sums.zero_()
        return found


Losses = Mapping[str, Mapping[str, Statistics]]
"""Linear -> operand -> what was lost."""


def described(losses: Losses) -> dict[str, Any]:
    """As a line of fp8.jsonl: the largest relative error of each operand, what is not finite, and every linear.

    None stands for what is not finite, which JSON does not know.
    """
    linears = {linear: {name: _measures(found) for name, found in of.items()} for linear, of in losses.items()}
    worst = {operand: _worst(losses, operand) for operand in OPERANDS}
    return {"worst": worst, "not_finite": not_finite(losses), "linears": linears}


def not_finite(losses: Losses) -> list[str]:
    """Operands with infinite or NaN values, in the order in which a step meets them: the first is nearest to the cause.

    Inputs and weights from the first linear to the last, then gradients from the last to the first. FP8 has no
    infinities: the products that they go into are finite, and nothing else shows them.
    """
    forward = [(linear, operand) for linear in losses for operand in ("input", "weight")]
    backward = [(linear, "gradient") for linear in reversed(list(losses))]
    return [f"{operand} of {linear}" for linear, operand in forward + backward if losses[linear][operand].not_finite]


def _measures(found: Statistics) -> dict[str, float | None]:
    error = found.relative_error
    return {
        "flushed": found.flushed_share,
        "saturated": found.saturated_share,
        "not_finite": found.not_finite_share,
        "relative_error": error if math.isfinite(error) else None,
    }


def _worst(losses: Losses, operand: str) -> dict[str, Any] | None:
    found = [(of[operand].relative_error, linear) for linear, of in losses.items()]
    finite = [(error, linear) for error, linear in found if math.isfinite(error)]
    if not finite:
        return None
    error, linear = max(finite, key=lambda each: each[0])
    return {"linear": linear, "relative_error": error}
