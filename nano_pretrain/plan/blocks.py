"""The layers of one pipeline position as runs of kernels and collectives, and the FLOPs that are executed in all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nano_pretrain.plan.communication import Transfer, embedding_transfers, head_transfers, layer_transfers
from nano_pretrain.plan.kernels import embedding_kernels, head_kernels, layer_kernels
from nano_pretrain.plan.ranks import Part, whole_model
from nano_pretrain.plan.work import Kernel, Passes, RankWork, layer_format, total_flops, work_of
from nano_pretrain.recipe.pattern import LayerType
from nano_pretrain.recipe.schema import ParallelConfig, Recipe

LAYER_ITEMS = {LayerType.MAMBA: "mamba", LayerType.FEED_FORWARD: "feed_forward", LayerType.ATTENTION: "attention"}
VOCABULARY = "vocabulary"
"""Embedding, output head and loss."""

RECOMPUTED = frozenset({"convolution", "scan", "gated norm", "activation"})
"""Kernels of the forward pass that `recompute.granularity=selective` runs again; `full` runs those of whole layers."""


@dataclass(frozen=True)
class Run:
    """Kernels of a rank, one after the other, and the collectives among them."""

    kernels: tuple[Kernel, ...] = ()
    transfers: tuple[Transfer, ...] = ()


@dataclass(frozen=True)
class Block:
    """Equal layers of a rank, or its part of the vocabulary.

    Attributes:
        item: a layer type, or `VOCABULARY`.
        count: how many there are.
        forward: the forward pass of one.
        backward: its backward pass.
        repeated: what of the forward pass is computed again for it.
    """

    item: str
    count: int
    forward: Run
    backward: Run
    repeated: Run = Run()

    @property
    def runs(self) -> tuple[Run, Run, Run]:
        """All of one micro-batch."""
        return self.forward, self.backward, self.repeated


def blocks(recipe: Recipe, work: RankWork, part: Part, sequence_parallel: bool) -> Iterator[Block]:
    """What the ranks of a pipeline position do for one micro-batch."""
    kinds = Counter(
        (kind, layer_format(recipe.model, recipe.precision, index, work.platform))
        for index, kind in enumerate(part.layers, start=part.first_layer)
    )
    for (kind, number_format), count in kinds.items():
        kernels = layer_kernels(work, kind, number_format)
        transfers = layer_transfers(work, kind, number_format, sequence_parallel)
        forward = Run(kernels.forward, transfers.forward)
        repeated = _repeated(recipe.recompute.granularity, forward)
        yield Block(LAYER_ITEMS[kind], count, forward, Run(kernels.backward, transfers.backward), repeated)
    if part.holds_embedding:
        sent = embedding_transfers(work, sequence_parallel)
        yield _once(embedding_kernels(work), sent.forward, sent.backward)
    if part.holds_head:
        sent = head_transfers(work, sequence_parallel)
        yield _once(head_kernels(work), sent.forward, sent.backward)


def _once(kernels: Passes, forward: tuple[Transfer, ...], backward: tuple[Transfer, ...]) -> Block:
    return Block(VOCABULARY, 1, Run(kernels.forward, forward), Run(kernels.backward, backward))


def _repeated(granularity: str, forward: Run) -> Run:
    if granularity == "full":
        return forward
    return Run(tuple(kernel for kernel in forward.kernels if granularity == "selective" and kernel.name in RECOMPUTED))


def executed_flops(recipe: Recipe, stage_name: str, platform: str) -> dict[str, float]:
    """FLOPs that the kernels execute for one training token by item, and those of recomputation.

    As one rank would: context parallelism adds nothing but repeated C B^T products where groups are repeated.
    """
    stage = replace(recipe.stages[stage_name], micro_batch_size=1)
    alone = ParallelConfig()
    work = work_of(recipe.model, recipe.precision, stage, alone, platform)
    found = dict.fromkeys((*LAYER_ITEMS.values(), VOCABULARY, "recomputation"), 0.0)
    for block in blocks(recipe, work, whole_model(recipe.model), sequence_parallel=False):
        kernels = block.forward.kernels + block.backward.kernels
        found[block.item] += block.count * total_flops(kernels) / work.tokens
        found["recomputation"] += block.count * total_flops(block.repeated.kernels) / work.tokens
    return found
