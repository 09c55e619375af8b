"""The chunked scan against the recurrence itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nano_pretrain.kernels.ssd import CHUNK, chunk_scan, state_update
from tests.kernels.compare import Inputs, assert_close, values_and_gradients
from tests.kernels.references import sequential_scan
from tests.kernels.scan_cases import PER_TOKEN, ScanCase, cases

pytestmark = pytest.mark.usefixtures("implementation")

# Rounding of float64 (1e-16), times the cancellation in sums over up to 192 tokens.
FLOAT64 = 1e-12
# Some roundings of fp32 (6e-8) in each value, and as much as eight in a sum over 200 tokens: the gradient of d.
FP32 = 1e-6
# As FP32; the state before each of 32 chunks is rounded once.
BF16_STATE = 3e-6
# A path from input to output is rounded to bf16 about six times, each with a relative error of at most 2^-8 / sqrt(3)
# in the mean square, independent of the others: sqrt(6) 2^-8 / sqrt(3) = 5.5e-3; twice that for the gradients of a and
# d, which are sums of terms that cancel.
BF16, BF16_SUMS = 5.5e-3, 1.1e-2


def cast(inputs: Inputs, large: torch.dtype, small: torch.dtype) -> Inputs:
    """x, b and c in the dtype of the products, the rest in that of the decays."""
    dtypes = {name: large if name in ("x", "b", "c") else small for name in inputs}
    return {
        name: value.to(dtypes[name]) if value is not None and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def double(inputs: Inputs) -> Inputs:
    return cast(inputs, torch.float64, torch.float64)


@settings(max_examples=100)
@given(cases)
def test_equals_the_recurrence_in_values_and_all_gradients(case: ScanCase) -> None:
    inputs, gradients = case.inputs(), case.output_gradients()
    expected = values_and_gradients(sequential_scan, inputs, gradients)
    assert_close(values_and_gradients(case.kernel(chunk_scan), inputs, gradients), expected, FLOAT64)


@pytest.mark.parametrize("length", [1, CHUNK, 3 * CHUNK - 5])
def test_fp32_is_within_its_rounding(length: int) -> None:
    case = ScanCase(length=length)
    inputs = cast(case.inputs(), torch.float32, torch.float32)
    expected = values_and_gradients(sequential_scan, double(inputs), case.output_gradients())
    assert_close(values_and_gradients(chunk_scan, inputs, case.output_gradients()), expected, FP32)


def test_bf16_is_within_its_rounding() -> None:
    case = ScanCase(length=5 * CHUNK, heads_per_group=4, channels=32, state=16)
    inputs = cast(case.inputs(), torch.bfloat16, torch.float32)
    gradients = [gradient.bfloat16().double() for gradient in case.output_gradients()]
    expected = values_and_gradients(sequential_scan, double(inputs), gradients)
    actual = values_and_gradients(chunk_scan, inputs, gradients)
    assert actual["0"].dtype == torch.bfloat16
    assert actual["1"].dtype == torch.float32
    for name, value in expected.items():
        assert_close({name: actual[name]}, {name: value}, BF16_SUMS if name in ("da", "dd") else BF16)


@pytest.mark.parametrize("step", [1e1, 1e2, 1e4])
def test_a_large_step_does_not_spoil_the_rounding_of_those_around_it(step: float) -> None:
    case = ScanCase(length=3 * CHUNK - 5, documents=False)
    inputs = case.inputs()
    inputs["dt"][:, 3::7] = step
    inputs = cast(inputs, torch.float32, torch.float32)
    expected = values_and_gradients(sequential_scan, double(inputs), case.output_gradients())
    actual = values_and_gradients(chunk_scan, inputs, case.output_gradients())
    # In the gradient of `a` the large step multiplies what is left of sums that cancel.
    assert_close({"da": actual.pop("da")}, {"da": expected.pop("da")}, 100 * FP32)
    assert_close(actual, expected, FP32)


def long_memory() -> Inputs:
    """2,048 bf16 tokens, of which the last state remembers the first: it decays by a third and by a fourteenth."""
    case = ScanCase(batch=1, length=32 * CHUNK, groups=1, channels=16, state=16, initial=False, documents=False)
    inputs = case.inputs()
    inputs["dt"] = 0.02 * inputs["dt"]
    inputs["a"] = torch.tensor([-0.05, -0.01], dtype=torch.float64)
    return cast(inputs, torch.bfloat16, torch.float32)


def test_states_of_bf16_inputs_are_summed_in_fp32() -> None:
    inputs = long_memory()
    _, expected = sequential_scan(**double(inputs))
    _, last = chunk_scan(**inputs)
    assert last.dtype == torch.float32
    assert_close({"last": last}, {"last": expected}, BF16_STATE)


def test_a_state_rounded_to_bf16_after_each_chunk_would_be_seen() -> None:
    inputs = long_memory()
    _, expected = sequential_scan(**double(inputs))
    state = None
    for start in range(0, 32 * CHUNK, CHUNK):
        _, last = run({**part(inputs, slice(start, start + CHUNK)), "initial_states": state})
        state = last.bfloat16().float()
    with pytest.raises(AssertionError, match="is off by"):
        assert_close({"last": last}, {"last": expected}, 100 * BF16_STATE)


def test_no_tokens_leave_the_state_as_it_is() -> None:
    case = ScanCase(length=0)
    inputs, (dy, dlast) = case.inputs(), case.output_gradients()
    actual = values_and_gradients(chunk_scan, inputs, (dy, dlast))
    assert torch.equal(actual["1"], inputs["initial_states"])
    assert torch.equal(actual["dinitial_states"], dlast)
    assert actual["0"].shape == actual["dx"].shape == dy.shape
    assert not actual["da"].any()
    assert not run({**inputs, "initial_states": None})[1].any()


def test_no_heads() -> None:
    case = ScanCase(heads_per_group=0)
    actual = values_and_gradients(chunk_scan, case.inputs(), case.output_gradients())
    assert actual["0"].shape == (2, case.length, 0, case.channels)
    assert not actual["db"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [1.0, 30.0, 1e4])
def test_gradients_stay_finite_where_decays_underflow(dtype: torch.dtype, step: float) -> None:
    # The products of a chunk's decays reach exp(-1e7): their inverses, above the diagonal, overflow.
    case = ScanCase(length=2 * CHUNK)
    inputs = case.inputs()
    inputs["dt"] = step * torch.ones_like(inputs["dt"])
    inputs["a"] = -16 * torch.ones_like(inputs["a"])
    inputs = cast(inputs, dtype, dtype)
    actual = values_and_gradients(chunk_scan, inputs, case.output_gradients())
    assert all(value.isfinite().all() for value in actual.values())
    expected = values_and_gradients(sequential_scan, double(inputs), case.output_gradients())
    # The gradient of `a` is itself of the size of the vanishing decays.
    for name in expected.keys() - {"da"}:
        assert_close({name: actual[name]}, {name: expected[name]}, FP32 if dtype == torch.float32 else FLOAT64)


def split_documents(length: int = 3 * CHUNK, border: int = CHUNK + 20) -> tuple[Inputs, int]:
    """Two documents whose border lies inside a chunk, no initial state."""
    inputs = ScanCase(length=length, initial=False, documents=False).inputs()
    inputs["seq_idx"] = (torch.arange(length) >= border).int().expand(2, -1)
    return inputs, border


def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return chunk_scan(**inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["x", "b", "c"])
def test_a_document_is_bit_for_bit_independent_of_the_one_before(name: str, dtype: torch.dtype) -> None:
    inputs, border = split_documents()
    inputs = cast(inputs, dtype, torch.float32)
    y, last = run(inputs)
    inputs[name] = torch.cat([1e3 * inputs[name][:, :border], inputs[name][:, border:]], 1)
    y_changed, last_changed = run(inputs)
    assert torch.equal(y[:, border:], y_changed[:, border:])
    assert torch.equal(last, last_changed)
    assert not torch.equal(y[:, :border], y_changed[:, :border])


def test_step_sizes_of_the_document_before_change_only_the_rounding() -> None:
    # Exponents are differences of sums that begin with the chunk, so their rounding depends on what came before.
    inputs, border = split_documents()
    y, last = run(inputs)
    inputs["dt"] = torch.cat([10 * inputs["dt"][:, :border], inputs["dt"][:, border:]], 1)
    y_changed, last_changed = run(inputs)
    assert_close({"y": y_changed[:, border:], "last": last_changed}, {"y": y[:, border:], "last": last}, FLOAT64)


def test_no_gradient_crosses_documents() -> None:
    inputs, border = split_documents()
    gradients = [torch.ones_like(output) for output in run(inputs)]
    gradients[0][:, :border] = 0
    found = values_and_gradients(chunk_scan, inputs, gradients)
    for name in PER_TOKEN:
        gradient = found[f"d{name}"]
        # The sums of dt run over documents: their gradients cancel, up to rounding.
        allowed = 1e-12 * gradient.abs().max() if name == "dt" else 0
        assert gradient[:, :border].abs().max() <= allowed, name


@given(cases)
def test_a_token_at_a_time_equals_the_chunks(case: ScanCase) -> None:
    inputs = {**case.inputs(), "seq_idx": None}
    y, last = run(inputs)
    initial = inputs["initial_states"]
    state = torch.zeros_like(last) if initial is None else initial.clone()
    outputs = []
    for t in range(case.length):
        x, dt, b, c = (inputs[name][:, t] for name in PER_TOKEN)
        outputs.append(state_update(state, x, dt, inputs["a"], b, c, inputs["d"]))
    assert_close({"y": torch.stack(outputs, 1), "last": state}, {"y": y, "last": last}, FLOAT64)


@given(cases, st.integers(0, 99))
def test_a_scan_continues_from_its_last_state(case: ScanCase, percent: int) -> None:
    inputs = {**case.inputs(), "seq_idx": None}
    y, last = run(inputs)
    cut = 1 + percent * (case.length - 1) // 100
    y_first, state = run(part(inputs, slice(None, cut)))
    assume(cut < case.length)
    y_second, last_second = run({**part(inputs, slice(cut, None)), "initial_states": state})
    assert_close({"y": torch.cat([y_first, y_second], 1), "last": last_second}, {"y": y, "last": last}, FLOAT64)


def part(inputs: Inputs, tokens: slice) -> Inputs:
    return {**inputs, **{name: inputs[name][:, tokens] for name in PER_TOKEN}}
