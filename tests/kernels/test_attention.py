"""Causal attention against the dense softmax in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nano_pretrain.kernels.attention import CausalAttention
from tests.kernels.compare import Inputs, assert_close, random_tensor, relative_error, values_and_gradients
from tests.kernels.references import dense_attention
from tests.kernels.scan_cases import documents

ATTENTION = CausalAttention(config=None, layer_number=1)
FP32 = 3e-6
"""Rounding of fp32 (6e-8) in products over the head dimension, scaled up by the exponential, and in sums over keys."""
BF16 = 2**-8 / 3**0.5
"""Largest mean-square error of rounding a result to bf16 once."""


def attend(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
    answer: Tensor = ATTENTION(query, key, value, documents)
    return answer


def attention_inputs(
    length: int, groups: int = 2, heads_per_group: int = 2, *, head_dim: int = 8, reset: bool = True, seed: int = 0
) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    batch = 2
    return {
        "query": random_tensor(g, length, batch, groups * heads_per_group, head_dim),
        "key": random_tensor(g, length, batch, groups, head_dim),
        "value": random_tensor(g, length, batch, groups, head_dim),
        "documents": documents(g, batch, length) if reset else None,
    }


def to(dtype: torch.dtype, inputs: Inputs) -> Inputs:
    return {name: t.to(dtype) if t is not None and t.is_floating_point() else t for name, t in inputs.items()}


def output_gradient(inputs: Inputs, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn_like(inputs["query"], dtype=torch.float64).flatten(2).to(dtype).double()


@given(st.integers(1, 130), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 1000))
def test_equals_the_dense_softmax(length: int, groups: int, heads_per_group: int, reset: bool, seed: int) -> None:
    inputs = to(torch.float32, attention_inputs(length, groups, heads_per_group, reset=reset, seed=seed))
    torch.manual_seed(seed)
    gradients = [output_gradient(inputs)]
    expected = values_and_gradients(dense_attention, to(torch.float64, inputs), gradients)
    assert_close(values_and_gradients(attend, inputs, gradients), expected, FP32)


@pytest.mark.parametrize("reset", [False, True])
def test_bf16_gradients_are_rounded_once(reset: bool) -> None:
    inputs = to(torch.bfloat16, attention_inputs(512, 1, 4, head_dim=64, reset=reset))
    gradients = [output_gradient(inputs, torch.bfloat16)]
    expected = values_and_gradients(dense_attention, to(torch.float64, inputs), gradients)
    actual = values_and_gradients(attend, inputs, gradients)
    assert {value.dtype for value in actual.values()} == {torch.bfloat16}
    assert_close(actual, expected, BF16)


def test_torchs_own_bf16_kernel_still_loses_precision() -> None:
    # The reason why CausalAttention computes in fp32; when this fails, it need not do so any more.
    inputs = to(torch.bfloat16, attention_inputs(512, 1, 4, head_dim=64, reset=False))

    def directly(query: Tensor, key: Tensor, value: Tensor, documents: None) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)

    gradients = [output_gradient(inputs, torch.bfloat16)]
    expected = values_and_gradients(dense_attention, to(torch.float64, inputs), gradients)
    actual = values_and_gradients(directly, inputs, gradients)
    assert relative_error(actual["dkey"], expected["dkey"]) > 2 * BF16


def test_outputs_do_not_depend_on_later_tokens_nor_on_other_documents() -> None:
    inputs = to(torch.float32, attention_inputs(60, reset=False))
    inputs["documents"] = (torch.arange(60) >= 25).int().expand(2, -1)
    y = attend(**inputs)
    inside = slice(25, 40)
    for name in ("key", "value"):
        t = inputs[name]
        inputs[name] = torch.cat([1e3 * t[:25], t[inside], 1e3 * t[40:]])
    assert torch.equal(attend(**inputs)[inside], y[inside])


def test_no_gradient_crosses_documents() -> None:
    inputs = attention_inputs(60, reset=False)
    inputs["documents"] = (torch.arange(60) >= 25).int().expand(2, -1)
    gradient = output_gradient(inputs)
    gradient[:25] = 0
    found = values_and_gradients(attend, inputs, [gradient])
    for name in ("dquery", "dkey", "dvalue"):
        assert not found[name][:25].any()
        assert found[name][25:].any()


def test_a_decoded_token_sees_the_whole_cache() -> None:
    inputs = attention_inputs(40, reset=False)
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    no_mask = SimpleNamespace(name="no_mask")
    last = ATTENTION(query[-1:], key, value, None, attn_mask_type=no_mask)
    assert_close({"y": last}, {"y": dense_attention(query, key, value)[-1:]}, 1e-13)


def test_other_masks_are_refused() -> None:
    inputs = attention_inputs(4)
    arguments = [inputs[name] for name in ("query", "key", "value", "documents")]
    with pytest.raises(ValueError, match="documents as attention_mask"):
        ATTENTION(*arguments, attention_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="documents as attention_mask"):
        ATTENTION(*arguments, packed_seq_params=SimpleNamespace())
