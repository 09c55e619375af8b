"""What the native attention promises beyond the plain one: threads, memory, skipped tiles, parts of a sequence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nano_pretrain.kernels.native import library
from nano_pretrain.kernels.native.attention import AttentionInputs, attention_backward, attention_forward
from tests.kernels.allocations import largest_tensor
from tests.kernels.broken_sources import broken_kernels
from tests.kernels.compare import Inputs, assert_close, values_and_gradients
from tests.kernels.implementations import Results, assert_bits_do_not_depend_on_threads, kept_by_autograd, using
from tests.kernels.references import dense_attention
from tests.kernels.test_attention import TILE, attend, attention_inputs, dense_end, end_of, output_gradient, to


def loaded() -> library.Library:
    found = library.active()
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("heads_per_group", [1, 5])
def test_bits_do_not_depend_on_threads(heads_per_group: int, dtype: torch.dtype) -> None:
    inputs = to(dtype, attention_inputs(5 * TILE + 3, 2, heads_per_group))
    gradients = [output_gradient(inputs)]
    assert_bits_do_not_depend_on_threads(lambda: values_and_gradients(attend, inputs, gradients))
    inputs, gradients = end_of(inputs, 2 * TILE + 5, 5 * TILE), [gradients[0][2 * TILE + 5 : 5 * TILE]]
    assert_bits_do_not_depend_on_threads(lambda: values_and_gradients(attend, inputs, gradients))


@pytest.mark.parametrize("reset", [False, True])
def test_memory_is_linear_in_the_length(reset: bool) -> None:
    def work(length: int) -> None:
        inputs = to(torch.float32, attention_inputs(length, 1, 2, head_dim=4, reset=reset))
        leaves = {name: t.requires_grad_() for name, t in inputs.items() if name != "documents"}
        attend(**leaves, documents=inputs["documents"]).sum().backward()

    with using("native"):
        short, long = (largest_tensor(lambda n=length: work(n)) for length in (1024, 4096))  # type: ignore[misc]
    # The scratch memory is among them.
    assert long <= 4 * short


def test_output_and_a_number_of_each_query_are_kept() -> None:
    inputs = to(torch.bfloat16, attention_inputs(100, reset=False))
    given_ = {inputs[n].requires_grad_().untyped_storage().data_ptr() for n in ("query", "key", "value")}
    with using("native"):
        kept = kept_by_autograd(lambda: attend(**inputs))
    assert given_ <= kept
    assert len(kept - given_) == 2


def test_tiles_of_other_documents_and_of_later_tokens_are_skipped() -> None:
    # A tile that is computed spreads its NaN: it times a weight of zero is NaN.
    inputs = to(torch.float32, attention_inputs(6 * TILE, reset=False))
    inputs["documents"] = (torch.arange(6 * TILE) // (2 * TILE)).int().expand(2, -1)
    for name in ("query", "key", "value"):
        inputs[name][: 2 * TILE] = torch.nan
        inputs[name][4 * TILE - 1 :] = torch.nan
    gradient = output_gradient(inputs)
    with using("native"):
        found = values_and_gradients(attend, inputs, [gradient])
    untouched = slice(2 * TILE, 3 * TILE)
    assert found["0"][untouched].isfinite().all()
    assert found["dquery"][untouched].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(10, 2, 3, 8)}, "do not fit together"),
        ({"value": torch.zeros(9, 2, 2, 8)}, "do not fit together"),
        ({"key": torch.zeros(10, 1, 2, 8)}, "do not fit together"),
        ({"key": torch.zeros(10, 2, 2, 9), "value": torch.zeros(10, 2, 2, 9)}, "do not fit together"),
        ({"key": torch.zeros(10, 2, 2, 8, dtype=torch.float64)}, "query, key and value are"),
        ({"documents": torch.zeros(2, 9, dtype=torch.int32)}, "documents"),
    ],
)
def test_what_does_not_fit_is_refused(change: Inputs, message: str) -> None:
    inputs = to(torch.float32, attention_inputs(10)) | change
    with using("native"), pytest.raises(ValueError, match=message):
        attend(**inputs)


def parts(inputs: Inputs, queries: slice, keys: slice) -> AttentionInputs:
    """Queries of one part of a sequence and keys of another."""
    starts = None
    if inputs["documents"] is not None:
        of_queries, of_keys = (inputs["documents"][:, part].contiguous() for part in (queries, keys))
        starts = torch.searchsorted(of_keys, of_queries, out_int32=True)
    query, key, value = inputs["query"][queries], inputs["key"][keys], inputs["value"][keys]
    return AttentionInputs(query, key, value, starts, queries.start - keys.start)


def in_parts(inputs: Inputs, border: int, dout: Tensor) -> Results:
    """Attention of the whole sequence from that of two parts, as ranks that share it would put it together."""
    native, length = loaded(), inputs["query"].shape[0]
    halves = (slice(0, border), slice(border, length))
    pairs = {(q, k): parts(inputs, halves[q], halves[k]) for q in (0, 1) for k in (0, 1)}
    found = {pair: attention_forward(native, part) for pair, part in pairs.items()}
    outs, lses = [], []
    for q in (0, 1):
        lse = torch.stack([found[q, k][1] for k in (0, 1)])
        weights = (lse - lse.logsumexp(0)).exp().permute(0, 3, 1, 2).unsqueeze(-1)
        outs.append((weights * torch.stack([found[q, k][0] for k in (0, 1)])).sum(0))
        lses.append(lse.logsumexp(0))
    gradients = {
        (q, k): attention_backward(native, part, outs[q], lses[q], dout[halves[q]]) for (q, k), part in pairs.items()
    }
    sums = [torch.cat([gradients[q, 0][0] + gradients[q, 1][0] for q in (0, 1)])]
    sums += [torch.cat([gradients[0, k][i] + gradients[1, k][i] for k in (0, 1)]) for i in (1, 2)]
    names = ("0", "dquery", "dkey", "dvalue")
    return dict(zip(names, [torch.cat(outs).flatten(2), *sums], strict=True))


@given(st.integers(2, 200), st.data(), st.booleans())
def test_parts_of_a_sequence_add_up(length: int, data: st.DataObject, reset: bool) -> None:
    border = data.draw(st.integers(1, length - 1))
    inputs = attention_inputs(length, reset=reset)
    dout = output_gradient(inputs)
    with using("native"):
        actual = in_parts(inputs, border, dout.view(inputs["query"].shape))
        future = attention_forward(loaded(), parts(inputs, slice(0, border), slice(border, length)))
    assert_close(actual, values_and_gradients(dense_attention, inputs, [dout]), 1e-12)
    assert not future[0].any()
    assert future[1].isneginf().all()


MISTAKES = {
    "a key too many": ("attention.h", "query + shape.offset + 1,", "query + shape.offset + 2,"),
    "queries at the beginning": ("attention.h", "query + shape.offset + 1,", "query + 1,"),
    "documents": ("attention.h", "scores + seen.begin, NONE", "scores, NONE"),
    "sums of an old peak": ("attention_forward.cpp", "    totals *= factor;\n", ""),
    "output of an old peak": ("attention_forward.cpp", "out[i] *= factor;", "out[i] *= 1;"),
    "group of a head": ("attention_backward.cpp", "head % s.heads / s.heads_per_group()", "0"),
    "mean gradient": ("attention_backward.cpp", "(gradients[i] - delta)", "gradients[i]"),
    "a segment left out": ("attention_backward.cpp", "(head + 1) * count; part++", "head * count + 1; part++"),
    "scale of the gradient": (
        "attention_backward.cpp",
        "partial.query_rows(s), W(scale)",
        "partial.query_rows(s), W(1)",
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str, tmp_path: Path) -> None:
    inputs = end_of(attention_inputs(4 * TILE), TILE + 9, 4 * TILE - 3)
    gradients = [output_gradient(inputs)]
    with broken_kernels(*MISTAKES[mistake], directory=tmp_path, only="attention"):
        actual = values_and_gradients(attend, inputs, gradients)
    with pytest.raises(AssertionError, match="is off by"):
        assert_close(actual, values_and_gradients(dense_end, inputs, gradients), 1e-12)
