"""FLOPs: the formulas against torch's own counter where it sees the operation, and executed ones by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nano_pretrain.kernels.native import library
from nano_pretrain.plan.blocks import executed_flops
from nano_pretrain.plan.scan import SCANS, local_groups
from nano_pretrain.platform import Platform
from nano_pretrain.recipe.derived import padded_vocab_size
from nano_pretrain.recipe.flops import attention_layer_flops, count_flops, feed_forward_layer_flops, mamba_layer_flops
from nano_pretrain.recipe.pattern import count_layers
from nano_pretrain.recipe.schema import Recipe, RecomputeConfig
from tests.model.building import batch, build, losses
from tests.plan.recipes import STAGE, named, small

LENGTH = 48


@pytest.fixture(autouse=True)
def plain_kernels() -> Iterator[None]:
    """Native kernels are one opaque call to torch's counter."""
    with library.implementation("plain"):
        yield


def counted(platform: Platform, recipe: Recipe, length: int = LENGTH) -> dict[str, float]:
    """FLOPs of one training token by torch operator."""
    model = build(platform, recipe)
    micro_batch = batch(recipe, samples=2, length=length, eod_id=None)
    with FlopCounterMode(display=False) as counter:
        losses(model, micro_batch).sum().backward()
    operators = counter.get_flop_counts()["Global"]
    return {str(operator): flops / micro_batch.tokens.numel() for operator, flops in operators.items()}


def sum_of(found: dict[str, float], name: str) -> float:
    return sum(flops for operator, flops in found.items() if name in operator)


@pytest.mark.parametrize("pattern", ["M", "-", "*", "M-M*-"])
def test_linears_and_head_are_what_torch_counts(platform: Platform, pattern: str) -> None:
    recipe = small(pattern=pattern, vocab_size=1024)
    layers = count_layers(pattern)
    projections = (
        layers.mamba * mamba_layer_flops(recipe.model).projections
        + layers.feed_forward * feed_forward_layer_flops(recipe.model)
        + layers.attention * attention_layer_flops(recipe.model, LENGTH).projections
    )
    head = count_flops(recipe.model, LENGTH).head
    assert sum_of(counted(platform, recipe), "aten.mm") == 3 * (projections + head)


def test_attention_is_half_of_the_square_that_torch_counts(platform: Platform) -> None:
    recipe = small(pattern="*")
    flops = attention_layer_flops(recipe.model, LENGTH)
    with sdpa_kernel(SDPBackend.MATH):
        # This path multiplies with the whole square, two products forward and four backward, none of them twice.
        assert sum_of(counted(platform, recipe), "aten.bmm") == 2 * 3 * flops.core
    # Flash kernels skip half of it and compute the scores again: five products backward.
    assert executed_flops(recipe, STAGE, "cpu")["attention"] == 3 * flops.projections + 3.5 * flops.core


def test_the_chunked_scan_is_what_torch_counts(platform: Platform) -> None:
    recipe = small(pattern="M")
    model = recipe.model
    # The plain kernels multiply with whole squares of 64 tokens, forward once and backward twice; before that again all
    # but the scores times x, which nothing needs.
    plain = replace(SCANS["cpu"], chunk=64, block=64, whole_scores=True)
    forward, _ = plain.flops(model.mamba_num_heads, model.mamba_num_groups, model.mamba_head_dim, model.mamba_state_dim)
    again = forward - model.mamba_num_heads * 2 * 64 * model.mamba_head_dim
    assert sum_of(counted(platform, recipe, length=128), "aten.bmm") == 3 * forward + again


def test_the_padding_of_the_vocabulary_is_executed(platform: Platform) -> None:
    recipe = small(pattern="-", vocab_size=513)
    found, rows = executed_flops(recipe, STAGE, "cpu"), padded_vocab_size(recipe.model)
    assert rows == 1024
    assert found["vocabulary"] == 3 * 2 * recipe.model.hidden_size * rows
    assert sum_of(counted(platform, recipe), "aten.mm") == found["vocabulary"] + found["feed_forward"]


def products_of_a_triangle(chunk: int, block: int, width: int) -> int:
    """FLOPs of a triangle times a matrix, in strips as scan.h's `lower_times`."""
    return sum(2 * block * width * (strip + block) for strip in range(0, chunk, block))


@pytest.mark.parametrize("platform_name", ["cuda", "cpu"])
def test_a_chunk_of_the_scan_by_hand(platform_name: str) -> None:
    scan = SCANS[platform_name]
    heads, groups, channels, state = 6, 2, 10, 16
    chunk = scan.chunk
    triangle = products_of_a_triangle(chunk, scan.block, channels)
    state_product = 2 * chunk * state * channels
    square = 2 * chunk * chunk * state
    scores = square if scan.whole_scores else products_of_a_triangle(chunk, scan.block, state)
    forward, backward = scan.flops(heads, groups, channels, state)
    assert forward * chunk == heads * (2 * state_product + triangle) + groups * scores
    assert backward * chunk == heads * (5 * state_product + scan.triangles * triangle) + 3 * groups * scores


def test_groups_are_repeated_where_there_are_fewer_than_ranks() -> None:
    model = named("nano_12b_v2").model
    assert [local_groups(model, tensor, context) for tensor, context in ((1, 1), (2, 2), (8, 1), (8, 16))] == [
        8,
        2,
        1,
        1,
    ]


def test_the_12b_executes_little_more_than_the_model_asks_for() -> None:
    recipe = named("nano_12b_v2")
    executed = executed_flops(recipe, STAGE, "cuda")
    model = count_flops(recipe.model, 8192)
    assert sum(executed.values()) == pytest.approx(1.0065 * model.training, rel=1e-3)
    assert executed["feed_forward"] == 3 * model.feed_forward
    assert executed["recomputation"] == 0


def test_full_recomputation_runs_every_layer_forward_again() -> None:
    recipe = small(pattern="M-M*-")
    plain = executed_flops(recipe, STAGE, "cpu")
    recipe.recompute = RecomputeConfig("full")
    full = executed_flops(recipe, STAGE, "cpu")
    model = count_flops(recipe.model, LENGTH)
    scan = SCANS["cpu"].flops(4, 2, 5, 6)[0]
    asked = mamba_layer_flops(recipe.model)
    assert {item: full[item] for item in ("mamba", "feed_forward", "attention", "vocabulary")} == {
        item: plain[item] for item in ("mamba", "feed_forward", "attention", "vocabulary")
    }
    chunked = 2 * (asked.projections + asked.convolution + scan)
    assert full["recomputation"] == pytest.approx(chunked + model.feed_forward + model.attention)
    recipe.recompute = RecomputeConfig("selective")
    selective = executed_flops(recipe, STAGE, "cpu")["recomputation"]
    assert selective == pytest.approx(2 * (asked.convolution + scan)), "no linear, no attention"
