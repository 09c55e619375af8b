"""The portable kernels against mamba-ssm's own Triton kernels, which Triton's interpreter runs on the CPU, in fp32."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from nano_pretrain.recipe.errors import UserError
from tests.kernels.compare import assert_close
from tests.kernels.implementations import Results, using
from tests.peers.mamba_cases import FORMULAS, LARGE, OURS, SMALL, Case
from tests.peers.mamba_ssm import archive, install
from tests.peers.mamba_ssm_worker import answers

# Some roundings of fp32 (6e-8); the largest seen was 1.3e-6, in a layer whose norm magnifies them.
OURS_ROUNDING = 2e-6
# Their exponents are differences of fp32 sums over a chunk: the largest seen was 2.5e-6.
THEIRS_ROUNDING = 3e-6
# Sums over all tokens, whose terms cancel; the largest seen of any side was 4.1e-6.
SUMS, SUMS_ROUNDING = {"dA", "ddt_bias"}, 5e-6


class Proof:
    """Calls, and what mamba-ssm answered to all of them in one process."""

    def __init__(self, makers: Mapping[str, Callable[[], Case]], scratch: Path, timeout_seconds: float) -> None:
        self.cases = {name: make() for name, make in makers.items()}
        self.theirs = answers(self.cases, scratch, timeout_seconds)

    @functools.cache  # noqa: B019 - a proof lives as long as its module
    def exact(self, name: str) -> dict[str, Tensor]:
        """Of the plain references in float64."""
        return self.cases[name].results(FORMULAS, torch.float64)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Proof:
    return Proof(SMALL, tmp_path_factory.mktemp("small"), timeout_seconds=240)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Proof:
    return Proof(LARGE, tmp_path_factory.mktemp("large"), timeout_seconds=280)


@pytest.fixture(scope="module", params=["plain", "native"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels in use."""
    with using(request.param):
        yield request.param


def check(actual: Results, expected: Results, rounding: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close({name: actual[name]}, {name: value}, SUMS_ROUNDING if name in SUMS else rounding)


def check_theirs(proof: Proof, name: str) -> None:
    check(proof.theirs[name], proof.exact(name), THEIRS_ROUNDING)


def check_ours(proof: Proof, name: str) -> None:
    ours = proof.cases[name].results(OURS)
    check(ours, proof.exact(name), OURS_ROUNDING)
    check(ours, proof.theirs[name], THEIRS_ROUNDING)


@pytest.mark.parametrize("name", SMALL)
def test_theirs_is_exact_within_rounding(name: str, small: Proof) -> None:
    check_theirs(small, name)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("name", SMALL)
def test_ours_equals_theirs_in_values_and_all_gradients(name: str, small: Proof) -> None:
    check_ours(small, name)


@pytest.mark.full
@pytest.mark.parametrize("name", LARGE)
def test_theirs_is_exact_within_rounding_at_real_sizes(name: str, large: Proof) -> None:
    check_theirs(large, name)


@pytest.mark.full
@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("name", LARGE)
def test_ours_equals_theirs_at_real_sizes(name: str, large: Proof) -> None:
    check_ours(large, name)


def with_one_decay_changed(**inputs: Any) -> dict[str, Any]:
    """The rate of the first head is a thousandth too large."""
    a = inputs["A"]
    return inputs | {"A": torch.cat([1.001 * a[:1], a[1:]])}


def with_late_borders(**inputs: Any) -> dict[str, Any]:
    """A document's first token still belongs to the one before."""
    seq_idx = inputs["seq_idx"]
    return inputs | {"seq_idx": torch.cat([seq_idx[:, :1], seq_idx[:, :-1]], 1)}


def without_documents(**inputs: Any) -> dict[str, Any]:
    return inputs | {"seq_idx": None}


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("name", ["scan of documents with everything", "layer of documents with norm"])
@pytest.mark.parametrize("mistake", [with_one_decay_changed, with_late_borders, without_documents])
def test_a_mistake_is_far_outside_rounding(mistake: Callable[..., dict[str, Any]], name: str, small: Proof) -> None:
    case = small.cases[name]
    kernel = OURS[case.function]
    broken = case.results({case.function: lambda **inputs: kernel(**mistake(**inputs))})
    with pytest.raises(AssertionError, match="is off by"):
        assert_close(broken, small.theirs[name], 20 * SUMS_ROUNDING)


@pytest.mark.parametrize("damaged", [True, False])
def test_without_network_and_cache_one_line_says_so(
    damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    if damaged:
        (tmp_path / archive().name).write_bytes(b"half")
    with pytest.raises(UserError, match=r"^mamba_ssm-[^\n]* cannot be fetched [^\n]* put it there$"):
        archive(tmp_path)


def test_a_process_that_has_compiled_triton_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        install(tmp_path)
