"""Numbers that follow from a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from nano_pretrain.recipe.schema import ModelConfig, ParallelConfig, PrecisionConfig, Recipe, StageConfig

VOCAB_MULTIPLE = 128 * 8
"""The padded vocabulary is a multiple of this in every layout, so that any tensor parallelism up to 8 divides it."""


def padded_vocab_size(model: ModelConfig) -> int:
    """Rows of embedding and head."""
    return -(-model.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def parameter_dtype(precision: PrecisionConfig) -> str:
    """Name of the torch dtype that parameters are held in; the optimizer's copy is always FP32."""
    return "float32" if precision.name == "fp32" else "bfloat16"


def stage_layout(recipe: Recipe, stage: StageConfig) -> ParallelConfig:
    """The stage's own layout, or the recipe's."""
    return stage.parallel or recipe.parallel


def stage_ranks(recipe: Recipe, stage: StageConfig) -> int:
    """The stage's own number of ranks, or the cluster's."""
    return recipe.cluster.gpus if stage.gpus is None else stage.gpus


def stage_tokens(stage: StageConfig) -> int:
    """Tokens that a stage asks for."""
    return stage.tokens if stage.schedule.extend_to is None else stage.schedule.extend_to


def trained_length(recipe: Recipe, tokens: int) -> int:
    """Tokens of the longest sample that a checkpoint was trained on: of the stages that had begun."""
    begins = accumulate(map(stage_tokens, recipe.stages.values()), initial=0)
    begun = [stage for begin, stage in zip(begins, recipe.stages.values(), strict=False) if begin < max(tokens, 1)]
    return max(stage.sequence_length for stage in begun)


def batch_sizes(stage: StageConfig) -> list[tuple[int, int]]:
    """Tokens of the stage, and samples of the steps that start there or later, up to the next pair."""
    ramp = stage.batch_ramp
    if not ramp.start:
        return [(0, stage.global_batch_size)]
    steps = max(1, (stage.global_batch_size - ramp.start) // ramp.increment)
    sizes = [(ramp.ramp_tokens * step // steps, ramp.start + step * ramp.increment) for step in range(steps)]
    return [*sizes, (ramp.ramp_tokens, stage.global_batch_size)]


@dataclass(frozen=True)
class MambaShape:
    """Derived widths of a Mamba-2 layer (Dao and Gu 2024, section 7), in channels.

    Attributes:
        inner: heads x head dimension, the width of the gate z and of x.
        conv: channels of the causal convolution: x and, for each group, B and C.
        projected: rows of the input projection: z, x, B, C and one dt a head.
    """

    inner: int
    conv: int
    projected: int


def mamba_shape(model: ModelConfig) -> MambaShape:
    """The widths that follow from heads, head dimension, groups and state size; not from the hidden size."""
    inner = model.mamba_num_heads * model.mamba_head_dim
    conv = inner + 2 * model.mamba_num_groups * model.mamba_state_dim
    return MambaShape(inner=inner, conv=conv, projected=inner + conv + model.mamba_num_heads)
