"""Running the kernels' tests with the plain and the native implementation, and what only the latter promises."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from nano_pretrain.kernels.native import library
from nano_pretrain.kernels.native.build import BuildError, build

Results = dict[str, Tensor]


@contextmanager
def using(name: str) -> Iterator[None]:
    """The `plain` or `native` kernels inside; without a compiler the test is skipped, but never in CI."""
    if name == "native":
        _require_compiler()
    with library.implementation(name):
        yield


@functools.cache
def _require_compiler() -> None:
    try:
        build()
    except BuildError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the native kernels cannot be compiled here: {error}")


def assert_bits_do_not_depend_on_threads(work: Callable[[], Results]) -> None:
    """The native kernels' results are equal to the bit for 1, 2 and 3 threads, and when repeated."""
    before = torch.get_num_threads()
    try:
        with using("native"):
            found = [_with_threads(work, threads) for threads in (1, 2, 3, 3)]
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


def _with_threads(work: Callable[[], Results], threads: int) -> Results:
    torch.set_num_threads(threads)
    return work()


def assert_rounded_once(actual: Results, expected: Results) -> None:
    """Bf16 results are the float64 ones rounded, but for rare ties.

    Sums in fp32 are off by less than 2e-6 of the largest result (20 roundings of 2^-24 each); a value that lies this
    near to the middle between two bf16 numbers may round to the other of them. Of numbers with 8 bits at random places
    it happens to about 2 * 2e-6 * 2^8 = 0.1 %, of small ones beside a large one, more often.
    """
    assert actual.keys() == expected.keys()
    for name, reference in expected.items():
        assert actual[name].dtype == torch.bfloat16
        found, rounded = actual[name].double(), reference.bfloat16().double()
        neighbour = 2**-7 * reference.abs() + 2e-6 * reference.abs().max()
        assert ((found - rounded).abs() <= neighbour).all(), f"{name} is not the nearest bf16 number"
        assert (found != rounded).double().mean() <= 0.005, f"{name} is often not the nearest bf16 number"


def kept_by_autograd(work: Callable[[], object]) -> set[int]:
    """Addresses of the storage of all tensors that are kept for the backward pass of `work`."""
    kept: set[int] = set()

    def pack(t: Tensor) -> Tensor:
        kept.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        work()
    return kept
