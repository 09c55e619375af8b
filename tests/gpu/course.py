"""A few steps of training on whatever platform there is, from a checkpoint that a CPU wrote; what ranks run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nano_pretrain.recipe.schema import ParallelConfig, Recipe
from tests.model.recipes import small_recipe

LENGTH, SAMPLES = 256, 4
"""Tokens of a sample, two blocks of a block mask, and samples of a step."""

EOD = 2
RATE = 1e-3


def gpu_recipe(precision: str, **fields: Any) -> Recipe:
    """Every layer type in widths that the GPU's kernels have; TP2 and CP2 divide them."""
    widths: dict[str, Any] = {
        "pattern": "M*-M*-",
        "hidden_size": 256,
        "ffn_hidden_size": 512,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "head_dim": 64,
        "mamba_num_heads": 8,
        "mamba_head_dim": 64,
        "mamba_num_groups": 4,
        "mamba_state_dim": 64,
        "vocab_size": 600,
        "init_std": 0.05,
    }
    recipe = small_recipe(precision, **widths | fields)
    stage = recipe.stages["pretrain"]
    stage.sequence_length, stage.micro_batch_size, stage.global_batch_size = LENGTH, 1, SAMPLES
    return recipe


@dataclass(frozen=True)
class Course:
    """What a rank reports.

    Attributes:
        losses: of each step.
        grad_norms: of each step.
        gradients: of the first step, unclipped, by their names in a checkpoint; only where there is one rank.
    """

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, Tensor]


def take(recipe: Recipe, layout: ParallelConfig, source: Path, steps: range, target: Path | None = None) -> Course:
    """Train the steps after the checkpoint in `source`, which has optimizer state unless the first step is 0.

    Args:
        recipe: from `gpu_recipe`.
        layout: layout of the ranks.
        source: a checkpoint.
        steps: their numbers, which decide on the tokens.
        target: where to write a checkpoint at the end.
    """
    from nano_pretrain.checkpoint.sharded import load_checkpoint, sharded_state
    from nano_pretrain.parallel.groups import process_groups, ranks_from_environment
    from nano_pretrain.platform import current_platform
    from tests.distributed.training import save_state

    platform, ranks = current_platform(), ranks_from_environment()
    device = platform.prepare(ranks.local_rank, threads=1)
    # What derives from megatron-core's classes comes after the platform has prepared it.
    from nano_pretrain.model.hybrid import build_model
    from nano_pretrain.train.step import Trainable

    with process_groups(platform, ranks, layout, timeout_seconds=240):
        model = build_model(recipe, layout, platform, LENGTH)
        # Before the optimizer takes its FP32 copies.
        load_checkpoint(source, model, None)
        trainable = Trainable(recipe, layout, platform, model)
        if steps.start:
            with platform.optimizer_scope():
                load_checkpoint(source, model, trainable.optimizer)
        gradients = _gradients(trainable, recipe, device, steps.start) if ranks.world_size == 1 else {}
        results = []
        for number in steps:
            batches = list(_micro_batches(recipe, device, number))
            results.append(trainable.step(iter(batches), len(batches), (LENGTH, 1), lr=RATE, stop=False))
        if target is not None:
            trainable.gather_parameters()
            with platform.optimizer_scope():
                save_state(sharded_state(trainable.model, trainable.optimizer, loading=False), target)
        return Course([r.loss for r in results], [r.grad_norm for r in results], gradients)


def _micro_batches(recipe: Recipe, device: Any, step: int) -> Iterator[Any]:
    """Those of this rank: samples of random tokens, about every fortieth of which ends a document."""
    from nano_pretrain.data.loader import batch_of
    from nano_pretrain.parallel.groups import context_parallel_place, data_parallel_place

    generator = np.random.default_rng(step)
    rows = generator.integers(0, recipe.model.vocab_size, (SAMPLES, LENGTH + 1))
    rows[generator.random(rows.shape) < 1 / 40] = EOD
    eod = EOD if recipe.data.document_boundaries == "reset" else None
    rank, size = data_parallel_place()
    for number in range(rank, SAMPLES, size):
        yield batch_of(rows[number : number + 1], eod, device).of_context(context_parallel_place())


def _gradients(trainable: Any, recipe: Recipe, device: Any, step: int) -> dict[str, Tensor]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    batches = list(_micro_batches(recipe, device, step))
    trainable.wrapped.zero_grad_buffer()
    trainable.run(iter(batches), len(batches), (LENGTH, 1), forward_only=False)
    parameters = list(trainable.model.parameters())
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad.to(parameter.dtype)
    state = trainable.model.sharded_state_dict()
    apply_factories(state)
    shards = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    found = {str(shard.key): shard.data.detach().float().cpu().clone() for shard in shards}
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
    return found
