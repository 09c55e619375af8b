"""Shapes of hybrids that are compared with the peer, and the recipes that they are trained with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from benchmarks.step import MODEL as BENCHMARK_MODEL
from nano_pretrain.data.loader import MicroBatch, batch_of
from nano_pretrain.recipe.schema import ModelConfig, Recipe
from tests.model.building import CPU
from tests.model.recipes import MODEL, small_recipe

SKEW = 3
"""The lowest eighth of the vocabulary is half of all tokens, so that there is something to learn."""


@dataclass(frozen=True)
class Shape:
    """A model and the samples it is given.

    Args:
        model: the model.
        length: tokens of a sample.
        samples: samples of a micro-batch.
        peak: learning rate at the end of the warm-up.
    """

    model: ModelConfig
    length: int
    samples: int = 2
    peak: float = 1e-2

    def recipe(self, precision: str = "fp32") -> Recipe:
        """A recipe with this model and the optimizer's default values."""
        return replace(small_recipe(precision), model=self.model)

    def batch(self, seed: int = 0) -> MicroBatch:
        """Random tokens; without documents, which transformers does not know."""
        shares = np.random.default_rng(seed).random((self.samples, self.length + 1)) ** SKEW
        return batch_of((shares * self.model.vocab_size).astype(np.int64), None, CPU)


def small(length: int, **model: Any) -> Shape:
    """A shape that differs from tests/model/recipes.py's MODEL in these fields."""
    return Shape(replace(MODEL, **model), length)


SMALL = {
    # In small what nano_12b_v2 is, but d_inner 20 beside a hidden size of 24; two heads a group; padded vocabulary.
    "M-M*-M-": small(150, pattern="M-M*-M-"),
    # Odd sizes: d_inner 21 and 36 query channels beside 28 hidden ones, one group of 3 heads, one key/value head.
    "*M-M": small(
        100,
        pattern="*M-M",
        hidden_size=28,
        ffn_hidden_size=33,
        num_query_groups=1,
        head_dim=9,
        mamba_num_heads=3,
        mamba_head_dim=7,
        mamba_num_groups=1,
        mamba_conv_width=3,
        vocab_size=700,
        norm_epsilon=1e-3,
    ),
    # Mamba-2 beside Mamba-2, one head of 32 a group, d_inner 2 x hidden, whole chunks, a vocabulary without padding.
    "MM-M": small(
        128,
        pattern="MM-M",
        hidden_size=64,
        mamba_head_dim=32,
        mamba_num_groups=4,
        mamba_state_dim=16,
        vocab_size=1024,
    ),
    # No attention; four heads of 7 a group, d_inner 56 above 2 x hidden, one chunk.
    "M-M-": small(64, pattern="M-M-", hidden_size=16, mamba_num_heads=8, mamba_head_dim=7),
    # Heads of 80, d_inner 2 x hidden as in nano_12b_v2; one token more than transformers' chunk; one query a key.
    "M*-": small(
        129,
        pattern="M*-",
        hidden_size=80,
        num_query_groups=4,
        mamba_num_heads=2,
        mamba_head_dim=80,
        mamba_num_groups=1,
        vocab_size=1030,
    ),
    # Attention beside attention and feed-forward, heads of 64, d_inner 4 x hidden, less than a chunk.
    "M*M**-": small(
        63,
        pattern="M*M**-",
        hidden_size=32,
        num_attention_heads=6,
        num_query_groups=3,
        head_dim=8,
        mamba_num_heads=2,
        mamba_head_dim=64,
        mamba_num_groups=1,
    ),
    # No Mamba-2.
    "*-": small(65, pattern="*-"),
}
"""Each takes moments, by pattern."""

_REALISTIC = ModelConfig(
    pattern="M-M*-M-",
    hidden_size=256,
    ffn_hidden_size=768,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=32,
    mamba_num_heads=8,
    mamba_head_dim=64,
    mamba_num_groups=2,
    mamba_state_dim=64,
    vocab_size=4096,
    init_std=0.05,
)
_HEADS_OF_80 = replace(
    _REALISTIC,
    pattern="M-M*-",
    hidden_size=320,
    ffn_hidden_size=1280,
    num_query_groups=2,
    head_dim=64,
    mamba_head_dim=80,
    mamba_state_dim=128,
)
REALISTIC = {
    "heads of 64": Shape(_REALISTIC, 1024, samples=1, peak=5e-3),
    "heads of 80": Shape(_HEADS_OF_80, 1024, samples=1, peak=5e-3),
    "benchmark": Shape(BENCHMARK_MODEL, 1024, samples=1, peak=5e-3),
}
"""Sizes of the heads, states and samples that models are trained with."""


@st.composite
def any_shape(draw: st.DrawFn) -> Shape:
    """Any pattern of up to five layers with any widths, all small."""
    groups, query_groups = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3))
    model = ModelConfig(
        pattern=draw(st.text("M-*", min_size=1, max_size=5)),
        hidden_size=draw(st.integers(8, 48)),
        ffn_hidden_size=draw(st.integers(1, 48)),
        num_attention_heads=query_groups * draw(st.integers(1, 3)),
        num_query_groups=query_groups,
        head_dim=draw(st.integers(1, 16)),
        mamba_num_heads=groups * draw(st.integers(1, 4)),
        mamba_head_dim=draw(st.sampled_from([3, 7, 16, 32, 80])),
        mamba_num_groups=groups,
        mamba_state_dim=draw(st.integers(1, 16)),
        mamba_conv_width=draw(st.integers(2, 4)),
        vocab_size=draw(st.integers(512, 1100)),
        init_std=0.1,
    )
    return Shape(model, draw(st.integers(1, 140)))
