"""The kernels of GPUs against the plain references in float64; skipped, with the reason, where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nano_pretrain.kernels.document_attention import document_attention
from tests.kernels.compare import Inputs, Kernel, assert_close, random_tensor, values_and_gradients
from tests.kernels.references import convolution_silu, dense_attention
from tests.kernels.scan_cases import documents
from tests.peers.mamba_cases import FORMULAS, LARGE, SMALL, Case, one_token

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TF32 = 5e-3
"""Triton multiplies FP32 in TF32: factors rounded by up to 2^-11, several times over, and sums that cancel."""
ROUNDING = 1e-5
"""FP32 (6e-8) in sums over a few terms."""
BF16 = 2e-2
"""Rounding of inputs that the reference gets too, of attention's weights and of the result: 2^-9 each, and sums."""


def on_gpu(value: Any) -> Any:
    """A tensor there; everything else as it is."""
    return value.cuda() if isinstance(value, Tensor) else value


def mamba_ssm_functions() -> dict[str, Kernel]:
    """mamba-ssm's functions by the names of the cases."""
    from mamba_ssm.ops.triton import layernorm_gated, selective_state_update, ssd_combined

    return {
        "mamba_chunk_scan_combined": ssd_combined.mamba_chunk_scan_combined,
        "mamba_split_conv1d_scan_combined": ssd_combined.mamba_split_conv1d_scan_combined,
        "rmsnorm_fn": layernorm_gated.rmsnorm_fn,
        "selective_state_update": one_token(selective_state_update.selective_state_update),
    }


@pytest.mark.parametrize("make", [*SMALL.values(), *LARGE.values()], ids=[*SMALL, *(f"large {name}" for name in LARGE)])
def test_mamba_ssm_equals_its_formula(make: Callable[[], Case]) -> None:
    """Scan, layer, gated norm and decoding: ragged, with documents, with first and last states."""
    case = make()
    there = replace(
        case,
        inputs={name: on_gpu(value) for name, value in case.inputs.items()},
        gradients=tuple(map(on_gpu, case.gradients)),
    )
    found = {name: value.cpu() for name, value in there.results(mamba_ssm_functions()).items()}
    assert_close(found, case.results(FORMULAS, torch.float64), TF32)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [3, 300])
def test_causal_conv1d_equals_its_formula(length: int, packed: bool) -> None:
    from causal_conv1d import causal_conv1d_fn

    g = torch.Generator().manual_seed(length)
    inputs: Inputs = {
        "x": random_tensor(g, 2, length, 64),
        "weight": random_tensor(g, 64, 4),
        "bias": random_tensor(g, 64),
        "seq_idx": documents(g, 2, length) if packed else None,
    }

    def theirs(x: Tensor, **others: Any) -> Tensor:
        out: Tensor = causal_conv1d_fn(x.mT, activation="silu", **others)
        return out.mT

    compare(theirs, convolution_silu, inputs, (2, length, 64), torch.float32, ROUNDING)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, TF32), (torch.bfloat16, BF16)])
@pytest.mark.parametrize("length", [5, 300, 1024])
def test_flex_attention_equals_the_dense_softmax(length: int, dtype: torch.dtype, tolerance: float) -> None:
    def flexible(query: Tensor, key: Tensor, value: Tensor, documents: Tensor) -> Tensor:
        return document_attention(query, key, value, documents, None).flatten(2)

    inputs = attention_inputs(length)
    compare(flexible, dense_attention, inputs, (length, 2, 8 * 64), dtype, tolerance)


@pytest.mark.parametrize("length", [300, 1024])
def test_transformer_engines_attention_equals_the_dense_softmax(length: int) -> None:
    from transformer_engine.pytorch import DotProductAttention

    attention = DotProductAttention(8, 64, num_gqa_groups=2, attention_dropout=0.0, qkv_format="sbhd")

    def theirs(query: Tensor, key: Tensor, value: Tensor, documents: None) -> Tensor:
        out: Tensor = attention(query, key, value, attn_mask_type="causal")
        return out

    inputs = {**attention_inputs(length), "documents": None}
    compare(theirs, dense_attention, inputs, (length, 2, 8 * 64), torch.bfloat16, BF16)


def attention_inputs(length: int) -> Inputs:
    """Two samples, eight heads in two groups, 64 channels."""
    g = torch.Generator().manual_seed(length)
    shapes = {"query": 8, "key": 2, "value": 2}
    heads = {name: random_tensor(g, length, 2, count, 64) for name, count in shapes.items()}
    return {**heads, "documents": documents(g, 2, length)}


def compare(
    kernel: Kernel, formula: Kernel, inputs: Inputs, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    """Values and gradients on the GPU in `dtype` against those of the formula on the same numbers in float64."""
    rounded = {
        name: value.to(dtype) if value is not None and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    gradient = random_tensor(torch.Generator().manual_seed(1), *shape).to(dtype)
    exact = {
        name: value.double() if value is not None and value.is_floating_point() else value
        for name, value in rounded.items()
    }
    there = {name: on_gpu(value) for name, value in rounded.items()}
    found = values_and_gradients(kernel, there, [gradient.cuda()])
    expected = values_and_gradients(formula, exact, [gradient.double()])
    assert_close({name: value.cpu() for name, value in found.items()}, expected, tolerance)
