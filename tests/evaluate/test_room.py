"""Shapes of forward passes, and lengths that do not fit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_pretrain.compose import compose
from nano_pretrain.evaluate.room import (
    forward_bytes,
    pass_shape,
    without_room_at_stage_ends,
    without_room_for_weights,
)
from nano_pretrain.platform.base import Memory
from nano_pretrain.recipe.schema import ParallelConfig, PrecisionConfig
from tests.model.recipes import small_recipe

CONTEXT = ParallelConfig(context=2)
SEQUENCE = ParallelConfig(tensor=2, context=2, sequence=True)


@given(
    st.integers(1, 5000),
    st.sampled_from([ParallelConfig(), CONTEXT, SEQUENCE]),
    st.sampled_from(["bf16", "fp8_blockwise", "fp8_current_scaling"]),
)
def test_passes_are_filled_up_to_what_layout_and_fp8_divide(length: int, layout: ParallelConfig, name: str) -> None:
    recipe = replace(small_recipe(), precision=PrecisionConfig(name=name))
    stage = recipe.stages["pretrain"]
    filled, rows = pass_shape(recipe, length, layout, stage)
    ranks = layout.context * layout.tensor
    pieces = ranks * (2 if layout.context > 1 else 1)
    # Transformer Engine: multiples of 16 on a rank, whole tiles of 128 where sequence parallelism gathers them.
    alone = 1 if name == "bf16" else 128 if name == "fp8_blockwise" and layout.sequence else 16
    assert filled % pieces == 0
    assert (rows * filled) % (ranks * alone) == 0
    assert 0 <= filled - length < math.lcm(pieces, ranks * alone)
    # As in training, or a single row.
    assert rows == 1 or rows * filled <= stage.micro_batch_size * stage.sequence_length


def test_need_grows_with_the_length_and_what_does_not_fit_says_how_much_does() -> None:
    recipe: Any = compose(["recipe=tiny", "precision=bf16"]).recipe
    alone = ParallelConfig()
    needs = [forward_bytes(recipe, alone, (length, 1), "cpu") for length in (1024, 2048)]
    assert needs[1] == 2 * needs[0]
    memory = Memory("this machine", 2e9, ranks=2)
    (refusal,) = without_room_for_weights(recipe, alone, [(2048, 1), (10**6, 1)], "cpu", memory)
    assert str(refusal).startswith("evaluate.lengths: 1000000 tokens need ")
    most = int(str(refusal).rpartition(" ")[2])
    assert not list(without_room_for_weights(recipe, alone, [(most, 1)], "cpu", memory))
    assert list(without_room_for_weights(recipe, alone, [(most + most // 100, 1)], "cpu", memory))


@pytest.mark.parametrize("at_stage_end", [True, False])
def test_stages_refuse_lengths_that_do_not_fit_beside_the_optimizer(at_stage_end: bool) -> None:
    recipe: Any = compose(
        ["recipe=tiny", "evaluate.lengths=[512,1000000]", f"evaluate.at_stage_end={at_stage_end}"]
    ).recipe
    found = list(without_room_at_stage_ends(recipe, "cpu", Memory("this machine", 2e9)))
    assert len(found) == at_stage_end * len(recipe.stages)
