"""Models whose attention layers take documents through flex_attention, compared with the CPU's own attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from nano_pretrain.kernels import document_attention as module
from nano_pretrain.kernels.attention import CausalAttention, attend
from nano_pretrain.parallel.groups import context_parallel_place
from nano_pretrain.platform.base import LayerModules, Platform
from nano_pretrain.platform.cpu import CpuPlatform
from nano_pretrain.platform.cuda import with_documents
from nano_pretrain.recipe.schema import ParallelConfig, Recipe, RecomputeConfig
from tests.distributed.training import groups
from tests.kernels.scan_cases import documents
from tests.model.building import batch
from tests.model.recipes import small_recipe

LENGTH = 48


class FlexPlatform(CpuPlatform):
    """The CPU with CUDA's attention over documents."""

    def layer_modules(self) -> LayerModules:
        """As the CPU's."""
        return replace(super().layer_modules(), core_attention=with_documents(CausalAttention))


def differentiable_on_a_cpu(*tensors: Tensor) -> None:
    """In place of torch's `_validate_device`, which refuses gradients there; uncompiled, autograd gives them."""


@dataclass(frozen=True)
class Found:
    """Largest difference of the losses and, relative to its norm, of any gradient; and how often a mask was built."""

    losses: float
    gradients: float
    masks: int


def compare(granularity: str, layout: ParallelConfig) -> Found:
    """The same micro-batches through both attentions, on a rank of the layout."""
    flex.__dict__["_validate_device"] = differentiable_on_a_cpu
    recipe = replace(small_recipe(pattern="M*-*"), recompute=RecomputeConfig(granularity=granularity))
    with groups(layout) as platform:
        expected_losses, expected = passes(recipe, layout, platform)
        built = count_masks()
        losses, gradients = passes(recipe, layout, FlexPlatform())
    assert gradients.keys() == expected.keys()
    # A rank whose rows of the vocabulary are padding has a gradient of zero.
    apart = [float((gradients[n] - value).norm()) / (float(value.norm()) or 1.0) for n, value in expected.items()]
    return Found(float((losses - expected_losses).abs().max()), max(apart), len(built))


def compiled_differences() -> list[float]:
    """Largest difference from our attention of two micro-batches, the second without compiling again.

    Compiled for a CPU, where torch has a forward pass only.
    """
    g = torch.Generator().manual_seed(0)
    return [_compiled_difference(g, "default"), _compiled_difference(g, "fail_on_recompile")]


def _compiled_difference(generator: torch.Generator, stance: str) -> float:
    query, key, value = (torch.randn(300, 2, heads, 64, generator=generator) for heads in (4, 2, 2))
    of_batch = documents(generator, 2, 300)
    with torch.no_grad(), torch.compiler.set_stance(stance):
        answer = module.document_attention(query, key, value, of_batch, None)
    return float((answer - attend(query, key, value, of_batch)).abs().max())


def passes(recipe: Recipe, layout: ParallelConfig, platform: Platform) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and gradients of two micro-batches, one after the other."""
    from nano_pretrain.model.hybrid import build_model

    model: Any = build_model(recipe, layout, platform, LENGTH).train()
    found = []
    for seed in range(2):
        own = batch(recipe, length=LENGTH, seed=seed).of_context(context_parallel_place())
        loss = model(own.tokens, None, own.documents, labels=own.labels)
        loss.sum().backward()
        found.append(loss.detach())
    return torch.stack(found), {name: parameter.grad for name, parameter in model.named_parameters()}


def count_masks() -> list[Tensor]:
    """The documents of each mask that this process builds from now on."""
    built: list[Tensor] = []
    original = module.block_mask

    def counted(documents: Tensor, place: tuple[int, int]) -> Any:
        built.append(documents)
        return original(documents, place)

    module.block_mask = counted
    return built
