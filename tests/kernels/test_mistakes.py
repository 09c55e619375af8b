"""The comparisons of this directory see mistakes: each breaks a kernel in one place, and a comparison fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nano_pretrain.kernels import attention, conv, ssd
from nano_pretrain.kernels.conv import causal_conv_silu
from nano_pretrain.kernels.ssd import chunk_scan
from tests.kernels.compare import assert_close, random_tensor, values_and_gradients
from tests.kernels.references import convolution_silu, dense_attention, sequential_scan
from tests.kernels.scan_cases import ScanCase
from tests.kernels.test_attention import attend, attention_inputs, dense_end, end_of, output_gradient
from tests.kernels.test_conv import convolution_inputs

pytestmark = pytest.mark.usefixtures("plain")

Change = Callable[[Callable[..., Any]], Callable[..., Any]]


def without(position: int) -> Change:
    """The function is called with None in this position."""

    def change(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: function(*args[:position], None, *args[position + 1 :])

    return change


def including_the_token_itself(decay: Callable[..., Any]) -> Callable[..., Any]:
    """A token's own decay is applied to its input too."""
    return lambda cumulative, *args: decay(cumulative, *args) * _first_step(cumulative, args[1])


def _first_step(cumulative: Tensor, groups: int) -> Tensor:
    step = cumulative.diff(dim=2, prepend=torch.zeros_like(cumulative[:, :, :1]))
    by_head: Tensor = step.transpose(2, 3).unflatten(2, (groups, -1))
    return by_head.exp().unsqueeze(-2)


def compare_scan() -> None:
    case = ScanCase()
    inputs, gradients = case.inputs(), case.output_gradients()
    expected = values_and_gradients(sequential_scan, inputs, gradients)
    assert_close(values_and_gradients(chunk_scan, inputs, gradients), expected, 1e-12)


def compare_convolution() -> None:
    inputs = convolution_inputs(120, 4)
    gradients = [random_tensor(torch.Generator(), 2, 120, 3)]
    expected = values_and_gradients(convolution_silu, inputs, gradients)
    assert_close(values_and_gradients(causal_conv_silu, inputs, gradients), expected, 1e-13)


def compare_attention() -> None:
    inputs = attention_inputs(120)
    gradients = [output_gradient(inputs)]
    expected = values_and_gradients(dense_attention, inputs, gradients)
    assert_close(values_and_gradients(attend, inputs, gradients), expected, 1e-12)


def compare_attention_of_the_end() -> None:
    inputs = end_of(attention_inputs(120), 50, 110)
    gradients = [output_gradient(inputs)]
    expected = values_and_gradients(dense_end, inputs, gradients)
    assert_close(values_and_gradients(attend, inputs, gradients), expected, 1e-12)


MISTAKES: dict[str, tuple[Callable[[], None], Any, str, Change]] = {
    "decay across documents": (compare_scan, ssd, "_decay", without(1)),
    "earlier documents in the last state": (compare_scan, ssd, "_added_states", without(3)),
    "state carried over documents": (compare_scan, ssd, "_pass_states", without(2)),
    "output from another document's state": (compare_scan, ssd, "_carried_output", without(3)),
    "initial state lost": (
        compare_scan,
        ssd,
        "_pass_states",
        lambda pass_states: lambda *args: pass_states(*args[:3], torch.zeros_like(args[3])),
    ),
    "padding that decays the state": (compare_scan, ssd, "_chunks", lambda pad: lambda t, **_: pad(t, pad_last=True)),
    "decay one token too long": (compare_scan, ssd, "_decay", including_the_token_itself),
    "taps across documents": (compare_convolution, conv, "_within_document", without(1)),
    "attention across documents": (
        compare_attention,
        attention,
        "_attend_documents",
        lambda _: lambda q, k, v, documents: attention._causal(q, k, v),
    ),
    "attention to later tokens": (
        compare_attention,
        attention,
        "_softmax",
        lambda softmax: lambda q, k, v, **mask: softmax(q, k, v),
    ),
    "last queries taken for the first": (
        compare_attention_of_the_end,
        attention,
        "_causal",
        lambda _: lambda q, k, v: attention._softmax(q, k, v, is_causal=True),
    ),
}


@pytest.mark.parametrize(
    "compare", [compare_scan, compare_convolution, compare_attention, compare_attention_of_the_end]
)
def test_the_kernels_as_they_are_agree(compare: Callable[[], None]) -> None:
    compare()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compare, module, name, change = MISTAKES[mistake]
    monkeypatch.setattr(module, name, change(getattr(module, name)))
    with pytest.raises(AssertionError, match="is off by"):
        compare()
