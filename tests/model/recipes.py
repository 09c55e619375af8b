"""Recipes of hybrids that are built and trained in moments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from nano_pretrain.recipe.schema import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PhaseConfig,
    PrecisionConfig,
    Recipe,
    RunConfig,
    ScheduleConfig,
    StageConfig,
)
from tests import corpora

ALONE = ParallelConfig(distributed_optimizer=False)
"""The layout of one rank."""

MODEL = ModelConfig(
    pattern="M*-M",
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=10,
    mamba_num_heads=4,
    mamba_head_dim=5,
    mamba_num_groups=2,
    mamba_state_dim=6,
    vocab_size=corpora.VOCAB_SIZE,
    init_std=0.1,
)
"""Every width differs from the others: d_inner 20 is not 2 x hidden, the heads' 40 channels are not hidden either."""


def small_recipe(precision: str = "fp32", *, seed: int = 1, corpus: Path | None = None, **model: Any) -> Recipe:
    """A recipe of 6 steps, each of 8 samples of 48 tokens, with documents reset.

    Args:
        precision: name of the precision.
        seed: seed of the initial weights.
        corpus: directory of a corpus of tests/corpora.py.
        **model: fields of the model that differ from MODEL's.
    """
    phase = PhaseConfig(share=1.0, blend=dict.fromkeys(corpora.SOURCES, 1.0))
    stage = StageConfig(
        tokens=6 * 8 * 48,
        sequence_length=48,
        micro_batch_size=2,
        global_batch_size=8,
        schedule=ScheduleConfig(kind="constant", lr=3e-3),
        phases={"all": phase},
    )
    return Recipe(
        model=replace(MODEL, **model),
        precision=PrecisionConfig(name=precision),
        data=DataConfig(path=str(corpus), document_boundaries="reset", quota_window=16, max_epochs=100.0),
        stages={"pretrain": stage},
        run=RunConfig(seed=seed),
    )
