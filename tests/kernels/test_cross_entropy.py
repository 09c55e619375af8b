"""Cross-entropy over a divided and padded vocabulary against torch's in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nano_pretrain.kernels import cross_entropy
from nano_pretrain.kernels.cross_entropy import vocabulary_cross_entropy
from tests.distributed.ranks import run_ranks
from tests.kernels.compare import assert_close, random_tensor, values_and_gradients
from tests.kernels.implementations import Results, assert_rounded_once, kept_by_autograd
from tests.kernels.loss_ranks import gathered_loss_and_gradient

pytestmark = pytest.mark.usefixtures("implementation")

FLOAT32 = 1e-6
"""Rounding of fp32 (6e-8): of the largest logit, below 5, and of the sum, in pieces of 1,024 and of 16 lanes each."""


@dataclass(frozen=True)
class Case:
    """Logits [length, batch, columns] of which `vocab` are true."""

    length: int = 5
    batch: int = 2
    columns: int = 40
    vocab: int = 33
    seed: int = 0

    def logits(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Standard normal; the columns of the padding are large."""
        g = torch.Generator().manual_seed(self.seed)
        logits = random_tensor(g, self.length, self.batch, self.columns)
        logits[..., self.vocab :] += 100
        return logits.to(dtype)

    def labels(self) -> Tensor:
        """[batch, length]."""
        g = torch.Generator().manual_seed(self.seed)
        return torch.randint(self.vocab, (self.batch, self.length), generator=g)

    def loss_gradients(self) -> list[Tensor]:
        """Of each token's loss, all different."""
        return [random_tensor(torch.Generator().manual_seed(self.seed + 1), self.batch, self.length)]

    def reference(self, logits: Tensor) -> Tensor:
        """The definition."""
        flat, labels = logits[..., : self.vocab].flatten(0, 1), self.labels().t().flatten()
        losses: Tensor = F.cross_entropy(flat, labels, reduction="none")
        return losses.view(self.length, self.batch).t()

    def loss(self, logits: Tensor) -> Tensor:
        """What is tested."""
        return vocabulary_cross_entropy(logits, self.labels(), self.vocab)

    def compared(self, dtype: torch.dtype) -> tuple[Results, Results]:
        """Found values and gradients, and those of the reference."""
        logits = self.logits(dtype)
        expected = values_and_gradients(self.reference, {"logits": logits.double()}, self.loss_gradients())
        return values_and_gradients(self.loss, {"logits": logits}, self.loss_gradients()), expected


@st.composite
def cases(draw: st.DrawFn) -> Case:
    columns = draw(st.integers(1, 70) | st.integers(1020, 1100))
    vocab = draw(st.integers(1, columns))
    return Case(draw(st.integers(1, 5)), draw(st.integers(1, 3)), columns, vocab, draw(st.integers(0, 1000)))


@given(cases(), st.sampled_from([(torch.float64, 1e-13), (torch.float32, FLOAT32)]))
def test_equals_the_definition(case: Case, precision: tuple[torch.dtype, float]) -> None:
    dtype, tolerance = precision
    actual, expected = case.compared(dtype)
    assert_close(actual, expected, tolerance)
    assert actual["0"].dtype == dtype


@given(cases())
def test_bf16_logits_have_an_fp32_loss_and_a_gradient_rounded_once(case: Case) -> None:
    actual, expected = case.compared(torch.bfloat16)
    assert actual["0"].dtype == torch.float32
    assert (actual["0"] - expected["0"]).abs().max() < FLOAT32 * expected["0"].abs().max().clamp(min=1)
    if case.vocab > 1:
        assert_rounded_once({"dlogits": actual["dlogits"]}, {"dlogits": expected["dlogits"]})


def test_padding_has_no_gradient() -> None:
    actual, _ = Case().compared(torch.float32)
    assert not actual["dlogits"][..., 33:].any()
    assert actual["dlogits"][..., :33].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_vocabulary_is_summed_without_loss(dtype: torch.dtype) -> None:
    case = Case(2, 1, 131072, 131000)
    actual, expected = case.compared(dtype)
    # Sums one after the other would be off by sqrt(131072) roundings of 6e-8, 2e-5.
    assert_close(actual, expected, FLOAT32)


def test_pieces_of_the_plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "PIECE", 100)
    case = Case(length=9)
    actual, expected = case.compared(torch.float64)
    assert_close(actual, expected, 1e-13)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_large_logits_do_not_overflow(size: float) -> None:
    case = Case(vocab=40)
    logits = case.logits(torch.float32) * size
    losses = case.loss(logits.clone())
    torch.testing.assert_close(losses.double(), case.reference(logits.double()), rtol=FLOAT32, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    case = Case()
    logits = case.logits(torch.float32)
    logits[3, 1, 7] = bad
    actual = values_and_gradients(case.loss, {"logits": logits}, case.loss_gradients())
    wrong = torch.zeros(case.batch, case.length, dtype=torch.bool)
    wrong[1, 3] = True
    assert torch.equal(actual["0"].isnan(), wrong)
    assert torch.equal(actual["dlogits"].isnan().any(-1), wrong.t())


def test_a_label_without_probability_has_an_infinite_loss() -> None:
    case = Case(1, 1)
    logits = case.logits(torch.float32)
    logits[0, 0, case.labels()[0, 0]] = -math.inf
    assert case.loss(logits).isposinf().all()


@pytest.mark.parametrize("label", [-1, 33, 39, 40, 10**9])
def test_a_label_outside_the_vocabulary_is_refused(label: int) -> None:
    case = Case()
    labels = case.labels()
    labels[1, 2] = label
    with pytest.raises(ValueError, match=rf"{label}.* not all in a vocabulary of 33"):
        vocabulary_cross_entropy(case.logits(), labels, case.vocab)


@pytest.mark.parametrize(("length", "batch"), [(0, 2), (5, 0), (0, 0)])
def test_no_tokens_have_no_loss_and_no_gradient(length: int, batch: int) -> None:
    case = Case(length=length, batch=batch)
    found = values_and_gradients(case.loss, {"logits": case.logits()}, case.loss_gradients())
    assert found["0"].shape == (batch, length)
    assert found["dlogits"].shape == (length, batch, case.columns)


def test_labels_of_another_shape_are_refused() -> None:
    case = Case()
    with pytest.raises(ValueError, match="do not fit"):
        vocabulary_cross_entropy(case.logits(), case.labels().t(), case.vocab)


def test_any_layout_of_logits_and_any_integer_labels() -> None:
    case = Case()
    expected = case.loss(case.logits())
    transposed = case.logits().transpose(0, 2).contiguous().transpose(0, 2)
    found = vocabulary_cross_entropy(transposed, case.labels().int(), case.vocab)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_takes_the_place_of_the_logits(dtype: torch.dtype) -> None:
    case = Case()
    logits = case.logits(dtype).requires_grad_() * 1
    address = logits.data_ptr()
    (gradient,) = torch.autograd.grad(case.loss(logits).sum(), logits)
    assert gradient.data_ptr() == address


def test_nothing_of_the_size_of_the_logits_is_kept_but_they() -> None:
    case = Case(columns=3000, vocab=2900)
    logits = case.logits(torch.bfloat16).requires_grad_()
    kept = kept_by_autograd(lambda: case.loss(logits))
    # Labels, peaks and sums of the ten tokens.
    assert len(kept - {logits.untyped_storage().data_ptr()}) == 3


def test_logits_that_are_gone_are_not_used_again() -> None:
    case = Case()
    logits = case.logits().requires_grad_() * 1
    losses = case.loss(logits)
    torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(losses.sum(), logits)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_have_the_loss_and_the_gradient_of_one(ranks: int, implementation: str) -> None:
    # Of three ranks the last has nothing but padding.
    case = Case(columns=66, vocab=42)
    expected = values_and_gradients(case.reference, {"logits": case.logits()}, case.loss_gradients())
    arguments = (implementation, case.logits(), case.labels(), case.vocab, case.loss_gradients()[0])
    found = run_ranks(gathered_loss_and_gradient, ranks, *arguments)
    for losses, _ in found:
        assert_close({"0": losses}, {"0": expected["0"]}, 1e-13)
    assert_close({"g": torch.cat([g for _, g in found], -1)}, {"g": expected["dlogits"]}, 1e-13)
