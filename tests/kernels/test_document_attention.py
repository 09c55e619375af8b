"""flex_attention over documents, as GPUs use it, against the CPU's attention; all but one test run it uncompiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from nano_pretrain.kernels.attention import attend
from nano_pretrain.kernels.document_attention import LatestMask, block_mask, document_attention
from nano_pretrain.parallel.context import own_tokens
from nano_pretrain.recipe.schema import ParallelConfig
from tests.distributed.ranks import run_ranks
from tests.gpu.on_a_cpu import on_a_cpu
from tests.kernels.compare import Inputs, assert_close, random_tensor, values_and_gradients
from tests.kernels.document_ranks import Found, compare, compiled_differences, differentiable_on_a_cpu
from tests.kernels.scan_cases import documents

pytestmark = [
    pytest.mark.usefixtures("platform"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

ROUNDING = 1e-5
"""Rounding of fp32 (6e-8) in products over the head dimension, scaled up by the exponential, and in sums over keys."""


def attention_inputs(length: int, heads: int = 4, groups: int = 2, head_dim: int = 10) -> Inputs:
    g = torch.Generator().manual_seed(0)
    shapes = {"query": heads, "key": groups, "value": groups}
    return {
        **{name: random_tensor(g, length, 2, count, head_dim).float() for name, count in shapes.items()},
        "documents": documents(g, 2, length),
    }


def flexible(query: Tensor, key: Tensor, value: Tensor, documents: Tensor) -> Tensor:
    return document_attention(query, key, value, documents, None)


# 300: blocks of the mask are 128 tokens, and the last one is not full.
@pytest.mark.parametrize("length", [5, 128, 300])
def test_equals_our_attention_in_values_and_gradients(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_validate_device", differentiable_on_a_cpu)
    inputs = attention_inputs(length)
    gradients = [random_tensor(torch.Generator().manual_seed(1), *inputs["query"].shape).float()]
    expected = values_and_gradients(attend, inputs, gradients)
    assert_close(values_and_gradients(flexible, inputs, gradients), expected, ROUNDING)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_sees_what_the_whole_sequence_shows_its_tokens(rank: int) -> None:
    whole = documents(torch.Generator().manual_seed(2), 2, 300)
    dense = torch.ones(300, 300, dtype=torch.bool).tril() & (whole[:, :, None] == whole[:, None])
    mask = block_mask(whole, (rank, 3))
    queries, keys = torch.meshgrid(torch.arange(100), torch.arange(300), indexing="ij")
    seen = torch.stack([mask.mask_mod(torch.tensor(row), torch.tensor(0), queries, keys) for row in range(2)])
    assert torch.equal(seen, own_tokens(dense, 1, (rank, 3)))
    # Blocks that no query sees are left out.
    blocks = torch.nn.functional.pad(seen, (0, 84, 0, 28)).unflatten(2, (3, 128)).unflatten(1, (1, 128)).any(4).any(2)
    assert torch.equal(mask.to_dense()[:, 0].bool(), blocks)


def test_one_mask_a_micro_batch_also_for_recomputed_layers() -> None:
    masks, of_batch = LatestMask(), documents(torch.Generator().manual_seed(3), 2, 64)
    first = masks.of(of_batch, (0, 1))
    assert masks.of(of_batch.detach(), (0, 1)) is first, "a checkpoint hands on a detached copy"
    assert masks.of(of_batch.clone(), (0, 1)) is not first
    second = masks.of(of_batch, (0, 1))
    assert masks.of(of_batch, (0, 2)) is not second
    third = masks.of(of_batch, (0, 1))
    of_batch += 1
    assert masks.of(of_batch, (0, 1)) is not third, "documents that were overwritten are others"


LAYOUTS = {
    "one rank": ParallelConfig(),
    "TP2 with SP": ParallelConfig(tensor=2, sequence=True),
    "CP2": ParallelConfig(context=2),
}


@pytest.mark.parametrize(
    ("layout", "granularity"),
    [("one rank", "none"), ("one rank", "selective"), ("TP2 with SP", "full"), ("CP2", "full"), ("CP2", "none")],
)
def test_a_model_has_the_losses_and_gradients_of_our_attention(layout: str, granularity: str) -> None:
    parallel = LAYOUTS[layout]
    ranks: list[Found] = run_ranks(compare, parallel.tensor * parallel.context, granularity, parallel)
    for found in ranks:
        assert found.losses < ROUNDING
        assert found.gradients < ROUNDING
        # Two attention layers, two micro-batches.
        assert found.masks == 2


@pytest.mark.full
def test_compiled_it_is_the_same_and_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    assert max(on_a_cpu(compiled_differences)) < ROUNDING
