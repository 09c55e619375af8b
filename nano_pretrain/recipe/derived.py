"""Numbers that follow from a recipe."""

from __future__ import annotations

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
