"""Causal attention against the dense softmax in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nano_pretrain.kernels.attention import QUERY_BLOCK, CausalAttention
from tests.kernels.compare import Inputs, Kernel, assert_close, random_tensor, relative_error, values_and_gradients
from tests.kernels.references import dense_attention
from tests.kernels.scan_cases import documents

pytestmark = pytest.mark.usefixtures("implementation")

ATTENTION = CausalAttention(config=None, layer_number=1)
FP32 = 3e-6
"""Rounding of fp32 (6e-8) in products over the head dimension, scaled up by the exponential, and in sums over keys."""
BF16 = 2**-8 / 3**0.5
"""Largest mean-square error of rounding a result to bf16 once."""
BF16_GRADIENT = 1.5 * BF16
"""The native kernels' gradients of queries and keys also carry the rounding of the output, which is kept in bf16."""
TILE = 64
"""Queries and keys of the native kernels' tiles."""


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


def end_of(inputs: Inputs, first: int, end: int) -> Inputs:
    """The queries from `first` to `end` of a sequence and the keys up to `end`, as views."""
    documents = None if inputs["documents"] is None else inputs["documents"][:, :end]
    return {
        "query": inputs["query"][first:end],
        "key": inputs["key"][:end],
        "value": inputs["value"][:end],
        "documents": documents,
    }


def dense_end(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
    """What the last queries of a sequence get."""
    behind = key.shape[0] - query.shape[0]
    whole = torch.cat([query.new_zeros(behind, *query.shape[1:]), query])
    return dense_attention(whole, key, value, documents)[behind:]


def to(dtype: torch.dtype, inputs: Inputs) -> Inputs:
    return {name: t.to(dtype) if t is not None and t.is_floating_point() else t for name, t in inputs.items()}


def output_gradient(inputs: Inputs, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = inputs["query"].flatten(2).shape
    return random_tensor(torch.Generator().manual_seed(1), *shape).to(dtype).double()


cases = st.builds(
    attention_inputs,
    st.integers(1, 2 * TILE + 2) | st.sampled_from([TILE, 3 * TILE - 1, 3 * TILE + 1]),
    st.integers(1, 3),
    st.integers(1, 3),
    head_dim=st.integers(1, 20) | st.sampled_from([32, 33, 80]),
    reset=st.booleans(),
    seed=st.integers(0, 1000),
)


@given(cases, st.sampled_from([(torch.float64, 1e-12), (torch.float32, FP32)]))
def test_equals_the_dense_softmax(inputs: Inputs, precision: tuple[torch.dtype, float]) -> None:
    # 1e-12: as FP32, with roundings of 1e-16.
    dtype, tolerance = precision
    assert_equals(dense_attention, to(dtype, inputs), tolerance)


@given(cases, st.data(), st.sampled_from([(torch.float64, 1e-12), (torch.float32, FP32)]))
def test_the_end_of_a_sequence_equals_that_of_the_dense_softmax(
    inputs: Inputs, data: st.DataObject, precision: tuple[torch.dtype, float]
) -> None:
    dtype, tolerance = precision
    length = inputs["query"].shape[0]
    end = data.draw(st.just(length) | st.integers(1, length))
    inputs = to(dtype, end_of(inputs, data.draw(st.integers(0, end - 1)), end))
    assert_equals(dense_end, inputs, tolerance)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("first", [1, QUERY_BLOCK - 1])
def test_the_end_of_a_sequence_in_several_blocks(first: int, reset: bool) -> None:
    inputs = attention_inputs(first + 2 * QUERY_BLOCK + 1, 1, 2, head_dim=4, reset=reset)
    if reset:
        # One document is longer than a block of queries, and begins before them.
        inputs["documents"][:, 20 : first + QUERY_BLOCK + 9] = inputs["documents"][:, 20:21]
        inputs["documents"] = inputs["documents"].cummax(1).values
    assert_equals(dense_end, end_of(inputs, first, first + 2 * QUERY_BLOCK + 1), 1e-12)


def assert_equals(reference: Kernel, inputs: Inputs, tolerance: float) -> None:
    gradients = [output_gradient(inputs)]
    expected = values_and_gradients(reference, to(torch.float64, inputs), gradients)
    actual = values_and_gradients(attend, inputs, gradients)
    # Where queries see but themselves, gradients of query and key vanish up to the rounding of what cancels.
    smallest = expected["dvalue"].norm()
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * value.norm().clamp(min=smallest), name


@pytest.mark.parametrize("length", [256, 1024])
@pytest.mark.parametrize("reset", [False, True])
def test_bf16_results_are_off_by_a_rounding_at_any_length(reset: bool, length: int) -> None:
    inputs = to(torch.bfloat16, attention_inputs(length, 1, 4, head_dim=32, reset=reset))
    gradients = [output_gradient(inputs, torch.bfloat16)]
    expected = values_and_gradients(dense_attention, to(torch.float64, inputs), gradients)
    actual = values_and_gradients(attend, inputs, gradients)
    assert {value.dtype for value in actual.values()} == {torch.bfloat16}
    rounded_once = ("0", "dvalue")
    assert_close({n: actual[n] for n in rounded_once}, {n: expected[n] for n in rounded_once}, BF16)
    assert_close(actual, expected, BF16_GRADIENT)


@pytest.mark.parametrize("queries", [200, 4 * QUERY_BLOCK])
@pytest.mark.parametrize("reset", [False, True])
def test_bf16_results_of_the_end_of_a_sequence_are_off_by_a_rounding_at_any_length(reset: bool, queries: int) -> None:
    length = 50 + queries
    inputs = end_of(to(torch.bfloat16, attention_inputs(length, 1, 1, head_dim=8, reset=reset)), 50, length)
    gradients = [output_gradient(inputs, torch.bfloat16)]
    expected = values_and_gradients(dense_end, to(torch.float64, inputs), gradients)
    actual = values_and_gradients(attend, inputs, gradients)
    rounded_once = ("0", "dvalue")
    assert_close({n: actual[n] for n in rounded_once}, {n: expected[n] for n in rounded_once}, BF16)
    assert_close(actual, expected, BF16_GRADIENT)


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


def test_the_end_of_a_sequence_sees_only_its_own_documents() -> None:
    inputs = to(torch.float32, attention_inputs(60, reset=False))
    inputs["documents"] = (torch.arange(60) >= 25).int().expand(2, -1)
    inputs = end_of(inputs, 40, 60)
    y = attend(**inputs)
    found = values_and_gradients(attend, inputs, [output_gradient(inputs)])
    assert not found["dkey"][:25].any()
    assert not found["dvalue"][:25].any()
    assert found["dkey"][25:].any()
    for name in ("key", "value"):
        inputs[name] = torch.cat([1e3 * inputs[name][:25], inputs[name][25:]])
    assert torch.equal(attend(**inputs), y)


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


def test_views_of_a_wider_tensor() -> None:
    # As megatron-core splits the output of its linear.
    mixed = random_tensor(torch.Generator().manual_seed(0), 70, 2, 2, 4 * 8)

    def split(mixed: Tensor) -> Inputs:
        query, key, value = mixed.split([16, 8, 8], 3)
        return {"query": query.reshape(70, 2, 4, 8), "key": key, "value": value, "documents": None}

    gradients = [output_gradient(split(mixed))]
    expected = values_and_gradients(lambda mixed: dense_attention(**split(mixed)), {"mixed": mixed}, gradients)
    actual = values_and_gradients(lambda mixed: attend(**split(mixed)), {"mixed": mixed}, gradients)
    assert_close(actual, expected, 1e-12)


def test_dimensions_that_are_not_contiguous() -> None:
    inputs = attention_inputs(30)
    turned = {n: t.transpose(0, 3).contiguous().transpose(0, 3) for n, t in inputs.items() if n != "documents"}
    assert_close({"y": attend(**turned, documents=inputs["documents"])}, {"y": attend(**inputs)}, 1e-13)


@pytest.mark.parametrize("wanted", ["query", "key", "value"])
def test_only_what_is_asked_for_has_a_gradient(wanted: str) -> None:
    inputs = attention_inputs(30)
    inputs[wanted].requires_grad_()
    attend(**inputs).sum().backward()
    assert [name for name in ("query", "key", "value") if inputs[name].grad is not None] == [wanted]


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(name: str, bad: float) -> None:
    inputs = to(torch.float32, attention_inputs(150, 1, 1, reset=False))
    inputs[name][100, 1, 0, 3] = bad
    y = attend(**inputs)
    last = 101 if name == "query" else 150
    # An infinite key weighs nothing where its score is minus infinity.
    seen = (inputs["query"][:, 1, 0, 3] > 0) if (name, bad) == ("key", torch.inf) else torch.ones(150, dtype=torch.bool)
    assert not y[100:last, 1][seen[100:last]].isfinite().all(-1).any()
    assert y[:, 0].isfinite().all()


def test_other_masks_are_refused() -> None:
    inputs = attention_inputs(4)
    arguments = [inputs[name] for name in ("query", "key", "value", "documents")]
    with pytest.raises(ValueError, match="documents as attention_mask"):
        ATTENTION(*arguments, attention_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="documents as attention_mask"):
        ATTENTION(*arguments, packed_seq_params=SimpleNamespace())
