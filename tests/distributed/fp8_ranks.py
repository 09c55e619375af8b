"""What the FP8 linears of a model are given on the ranks of a layout, and what they make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nano_pretrain.parallel.groups import context_parallel_place
from nano_pretrain.precision.linear import Fp8Recipe
from nano_pretrain.recipe.schema import ParallelConfig, PrecisionConfig, Recipe
from tests.distributed.courses import Mistake
from tests.distributed.training import groups
from tests.model.building import batch, losses

LENGTH, BATCH = 48, 3


@dataclass(frozen=True)
class Used:
    """A linear in one forward and backward pass, on a rank or in whole.

    Attributes:
        weight: [outputs, inputs].
        x: [tokens, inputs].
        y: [tokens, outputs], summed over the ranks where the linear does that.
        dx: gradient of x.
        dy: gradient of y.
        dweight: gradient of the weight from these tokens.
    """

    weight: Tensor
    x: Tensor
    y: Tensor
    dx: Tensor
    dy: Tensor
    dweight: Tensor


Uses = dict[str, Used]
"""By the name of the linear."""


def use_each(
    recipe: Recipe, layout: ParallelConfig, fp8: Mapping[str, Fp8Recipe], mistake: Mistake = nullcontext
) -> dict[str, Uses]:
    """This rank's uses of a model whose linears are all quantised, for each FP8 recipe by its name."""
    with groups(layout) as platform, mistake():
        return {name: _use(recipe, layout, platform, how) for name, how in fp8.items()}


def _use(recipe: Recipe, layout: ParallelConfig, platform: Any, how: Fp8Recipe) -> Uses:
    from nano_pretrain.model.hybrid import build_model
    from nano_pretrain.precision.parallel import quantise_linears

    model = build_model(recipe, layout, platform, LENGTH)
    quantise_linears(model.decoder.layers, recipe.model.pattern, PrecisionConfig("fp8_blockwise"))
    linears = quantised(model)
    for module in linears.values():
        module._forward_impl = replace(module._forward_impl, recipe=how)
    uses = {name: record(module) for name, module in linears.items()}
    losses(model, batch(recipe, BATCH, LENGTH).of_context(context_parallel_place())).sum().backward()
    return {name: use() for name, use in uses.items()}


def quantised(model: Any) -> dict[str, Any]:
    """The linears of this rank that compute in FP8, by name with the layer's number in the whole model."""
    return {
        f"layers.{layer.layer_number - 1}.{name}": module
        for layer in model.decoder.layers
        for name, module in layer.named_modules()
        if "_forward_impl" in vars(module)
    }


def record(module: Any) -> Callable[[], Used]:
    """What answers after the next forward and backward pass how a linear was used in them."""
    given: dict[str, Tensor] = {}

    def forward(module: Any, inputs: Any, outputs: Any) -> None:
        given["x"], given["y"] = _matrix(inputs), _matrix(outputs)

    def backward(module: Any, of_inputs: Any, of_outputs: Any) -> None:
        given["dx"], given["dy"] = _matrix(of_inputs), _matrix(of_outputs)

    hooks = module.register_forward_hook(forward), module.register_full_backward_hook(backward)

    def use() -> Used:
        for hook in hooks:
            hook.remove()
        return Used(module.weight.detach(), dweight=module.weight.grad, **given)

    return use


def _matrix(values: Any) -> Tensor:
    matrix: Tensor = values[0].detach().flatten(0, -2).clone()
    return matrix
