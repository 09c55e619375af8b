"""What the native scan promises beyond the plain one: threads, memory, layouts, and that the tests see its mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nano_pretrain.kernels import mixer
from nano_pretrain.kernels.mamba import mamba_split_conv1d_scan_combined
from nano_pretrain.kernels.native import scan
from nano_pretrain.kernels.ssd import chunk_scan
from tests.kernels.broken_sources import broken_kernels
from tests.kernels.compare import Inputs, assert_close, random_tensor, relative_error, values_and_gradients
from tests.kernels.implementations import Results, assert_bits_do_not_depend_on_threads, kept_by_autograd, using
from tests.kernels.references import sequential_scan
from tests.kernels.scan_cases import ScanCase, documents

SEGMENT = 1024
"""Tokens between two kept states."""


def narrow(inputs: Inputs) -> Inputs:
    """x, b and c in bf16, the rest in fp32."""
    return {
        name: value.to(torch.bfloat16 if name in ("x", "b", "c") else torch.float32)
        if value is not None and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def test_bits_do_not_depend_on_threads() -> None:
    case = ScanCase(length=200, groups=3, heads_per_group=5, channels=7, state=9)
    inputs = narrow(case.inputs())
    assert_bits_do_not_depend_on_threads(lambda: values_and_gradients(chunk_scan, inputs, case.output_gradients()))


@pytest.mark.parametrize("length", [SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 70])
def test_segments_equal_the_recurrence(length: int) -> None:
    case = ScanCase(batch=1, length=length, groups=1, heads_per_group=2, channels=3, state=4)
    inputs, gradients = case.inputs(), case.output_gradients()
    expected = values_and_gradients(sequential_scan, inputs, gradients)
    with using("native"):
        actual = values_and_gradients(chunk_scan, inputs, gradients)
    # Rounding of float64 in sums over 2,000 tokens, as in test_chunk_scan.
    assert_close(actual, expected, 1e-12)


def layer(zxbcdt: Tensor, weight: Tensor, bias: Tensor, a: Tensor, d: Tensor, dt_bias: Tensor) -> Tensor:
    """Two heads of 8, two groups, state 3; input and output [length, batch, channels] as megatron-core's."""
    out = mamba_split_conv1d_scan_combined(
        zxbcdt.transpose(0, 1), weight, bias, dt_bias, a, d, chunk_size=64, headdim=8, ngroups=2
    )
    return out.transpose(0, 1)


def layer_inputs(length: int, batch: int) -> Inputs:
    g = torch.Generator().manual_seed(0)
    return {
        "zxbcdt": random_tensor(g, length, batch, 16 + 28 + 2),
        "weight": random_tensor(g, 28, 4),
        "bias": random_tensor(g, 28),
        "a": -random_tensor(g, 2).exp(),
        "d": random_tensor(g, 2),
        "dt_bias": random_tensor(g, 2),
    }


@pytest.mark.parametrize("batch", [1, 3])
def test_a_layer_in_megatrons_order_of_batch_and_length(batch: int) -> None:
    inputs = layer_inputs(70, batch)
    gradients = [random_tensor(torch.Generator(), 70, batch, 16)]
    expected = values_and_gradients(layer, inputs, gradients)
    with using("native"):
        actual = values_and_gradients(layer, inputs, gradients)
        out = layer(**inputs)
    assert_close(actual, expected, 1e-12)
    assert out.is_contiguous(), "the norm and out_proj would copy it"


def test_a_layer_keeps_two_tensors_of_its_length() -> None:
    inputs = {name: value.float().requires_grad_() for name, value in layer_inputs(2 * SEGMENT, 1).items()}
    with using("native"):
        kept = kept_by_autograd(lambda: layer(**inputs))
    parameters = {value.untyped_storage().data_ptr() for name, value in inputs.items() if name != "zxbcdt"}
    # in_proj's output, the scan's output before the gate, and one state in 1,024 tokens.
    assert inputs["zxbcdt"].untyped_storage().data_ptr() in kept
    assert len(kept - parameters) <= 3


def test_states_are_kept_only_where_gradients_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    def forward(library: Any, inputs: Any, initial: None, y: Tensor, keep: bool) -> Any:
        kept.append(keep)
        return scan.scan_forward(library, inputs, initial, y, keep)

    monkeypatch.setattr(mixer, "scan_forward", forward)
    inputs = {name: value.float().requires_grad_() for name, value in layer_inputs(100, 1).items()}
    with using("native"):
        layer(**inputs)
        with torch.no_grad():
            layer(**inputs)
        layer(**{name: value.detach() for name, value in inputs.items()})
    assert kept == [True, False, False]


@pytest.mark.parametrize("dimension", [0, 1])
def test_an_expanded_input_has_gradients_of_its_own(dimension: int) -> None:
    case = ScanCase()
    inputs, gradients = case.inputs(), case.output_gradients()
    inputs["x"] = inputs["x"].narrow(dimension, 0, 1)

    def expanded(x: Tensor, **others: Tensor) -> tuple[Tensor, Tensor]:
        shape = list(x.shape)
        shape[dimension] = others["dt"].shape[dimension]
        return chunk_scan(x.expand(shape), **others)

    with using("plain"):
        expected = values_and_gradients(expanded, inputs, gradients)
    with using("native"):
        actual = values_and_gradients(expanded, inputs, gradients)
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize(
    "case",
    [
        ScanCase(batch=1, length=150, groups=2, heads_per_group=16, channels=80, state=65),
        ScanCase(batch=3, length=70, groups=1, heads_per_group=11, channels=17, state=33),
        ScanCase(batch=2, length=65, groups=8, heads_per_group=1, channels=33, state=128),
    ],
)
def test_tiles_of_several_vectors_and_tasks_of_several_heads(case: ScanCase) -> None:
    inputs, gradients = case.inputs(), case.output_gradients()
    expected = values_and_gradients(sequential_scan, inputs, gradients)
    with using("native"):
        assert_close(values_and_gradients(chunk_scan, inputs, gradients), expected, 1e-12)


def test_growth_is_computed_as_decay_is() -> None:
    case = ScanCase(length=100, documents=False)
    inputs, gradients = case.inputs(), case.output_gradients()
    inputs["a"] = inputs["a"] * torch.tensor([-0.05, 1, -0.02, 1])
    expected = values_and_gradients(sequential_scan, inputs, gradients)
    with using("native"):
        assert_close(values_and_gradients(chunk_scan, inputs, gradients), expected, 1e-12)


def test_nan_is_not_hidden() -> None:
    inputs = {**ScanCase(initial=False, documents=False).inputs()}
    inputs["x"][0, 70, 1, 2] = float("nan")
    with using("native"):
        y, last = chunk_scan(**inputs)
    assert y[0, 70:, 1, 2].isnan().all()
    assert last[0, 1, 2].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        {"dt": torch.rand(2, 136, 4)},
        {"a": torch.rand(3)},
        {"b": torch.rand(2, 137, 3, 5)},
        {"c": torch.rand(2, 137, 2, 6)},
        {"d": torch.rand(5)},
        {"initial_states": torch.rand(2, 4, 4, 6)},
        {"seq_idx": torch.zeros(2, 136)},
        {"b": torch.rand(2, 137, 2, 5)},  # float32 beside float64
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: Inputs) -> None:
    with using("native"), pytest.raises((ValueError, RuntimeError)):
        chunk_scan(**ScanCase().inputs() | change)


def with_spikes(case: ScanCase, dt: float) -> Inputs:
    """FP32 inputs with a step of `dt` every seventh token."""
    inputs = {
        name: value.float() if value is not None and value.is_floating_point() else value
        for name, value in case.inputs().items()
    }
    inputs["dt"][:, ::7] = dt
    return inputs


def widened(inputs: Inputs) -> Inputs:
    """The same numbers in float64."""
    return {
        name: value.double() if value is not None and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def errors_from_float64(inputs: Inputs, case: ScanCase) -> dict[str, float]:
    """Relative to the scan of the same numbers in float64."""
    gradients = [gradient.float() for gradient in case.output_gradients()]
    with using("native"):
        exact = values_and_gradients(chunk_scan, widened(inputs), [gradient.double() for gradient in gradients])
        found = values_and_gradients(chunk_scan, inputs, gradients)
    return {name: relative_error(found[name], exact[name]) for name in exact}


@pytest.mark.parametrize("dt", [10.0, 100.0, 1e4])
def test_fp32_stays_exact_beside_steps_that_forget_everything(dt: float) -> None:
    case = ScanCase(length=300, groups=2, heads_per_group=2, channels=16, state=16)
    errors = errors_from_float64(with_spikes(case, dt), case)
    # a's gradient is the sum of dt times what cancels to rounding.
    assert errors.pop("da") <= 1e-4
    # It is small by the first step's decay, whose exponent of up to 87 is rounded.
    assert errors.pop("dinitial_states") <= 87 * 2**-24
    # Roundings of 6e-8 in sums over a chunk. Differences of rounded exponents would be off by 6e-8 dt |a| 9.
    assert max(errors.values()) <= 1e-6, errors


@pytest.mark.parametrize("rate", [-1.0, -1e-3])
def test_rounding_of_one_document_does_not_reach_another(rate: float) -> None:
    case = ScanCase(length=200, groups=2, heads_per_group=2, channels=16, state=16, initial=False)
    inputs = with_spikes(case, 1e4)
    inputs["a"] = torch.full_like(inputs["a"], rate)
    inputs["seq_idx"] = (torch.arange(200) // 7).expand(2, -1).contiguous()
    errors = errors_from_float64(inputs, case)
    # Each document, and so the first one, begins with a spike, whose step no decay within it has.
    assert max(errors.values()) <= 1e-6, errors


def test_fp32_stays_exact_over_a_long_sequence() -> None:
    case = ScanCase(batch=1, length=16384, groups=1, heads_per_group=2, channels=8, state=16, documents=False)
    inputs = with_spikes(case, 0.0)
    inputs["a"] = torch.full_like(inputs["a"], -1e-3)
    errors = errors_from_float64(inputs, case)
    # A sum of two sums that partly cancel.
    assert errors.pop("da") <= 2e-6
    # The state is rounded once a chunk: 256 roundings of 6e-8 in a random walk. Adding token by token gave 1.2e-6.
    assert max(errors.values()) <= 8e-7, errors


MISTAKES = {
    "decay one token too long": (
        "scan.h",
        "W value = exponential(W(sum[q] - sum[k]))",
        "W value = exponential(W(sum[q] - sum[k] - dt[k]))",
    ),
    "decay between strips": (
        "scan.h",
        "exponential(W(sum[strip] - sum[k]))",
        "exponential(W(sum[strip] - sum[k])) * W(0.999)",
    ),
    "documents in a chunk": ("scan.h", "k < documents.first[q]; k++) row[k] = 0", "k < 0; k++) row[k] = 0"),
    "documents in the carried output": ("scan.h", "documents.sees_state(q) ?", "true ?"),
    "documents in the kept state": ("scan.h", "documents.sees_state(CHUNK - 1) ?", "true ?"),
    "documents in the added state": ("scan.h", "k < documents.last(); k++) to_end", "k < 0; k++) to_end"),
    "gradient of the kept state": ("scan_backward.cpp", "    return kept;", "    return 0 * kept;"),
    "gradient of the skip": ("scan_backward.cpp", "+ skip * dy[j]", ""),
    "state of the wrong segment": ("scan_backward.cpp", "s.segments() + segment)", "s.segments() + 0)"),
}


@pytest.mark.full
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str, tmp_path: Path) -> None:
    file, right, wrong = MISTAKES[mistake]
    case = ScanCase(length=SEGMENT + 300)
    inputs, gradients = case.inputs(), case.output_gradients()
    # Short documents would hide a wrong segment: nothing lives that long.
    inputs["seq_idx"] = documents(torch.Generator().manual_seed(0), 2, case.length) // 8
    expected = values_and_gradients(sequential_scan, inputs, gradients)
    with broken_kernels(file, right, wrong, tmp_path, only="scan"):
        actual: Results = values_and_gradients(chunk_scan, inputs, gradients)
    with pytest.raises(AssertionError, match="is off by"):
        assert_close(actual, expected, 1e-12)
