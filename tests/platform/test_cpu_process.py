"""What the CPU platform sets in its process: denormals, memory."""

from __future__ import annotations

import resource

import torch

from nano_pretrain.platform.cpu import CpuPlatform
from tests.distributed.ranks import run_ranks

THREADS = 3
TINY = 1e-30
"""A normal number of FP32 whose product with 1e-10 is a denormal."""


def denormals() -> tuple[int, int, int]:
    """Threads of the pool; how many denormals a forward pass and its backward pass yield where all values are some."""
    CpuPlatform().prepare(0, THREADS, "plain")
    # 2^20 elements: far above the 2^15 for which torch starts a thread more.
    x = torch.full((1 << 20,), TINY, requires_grad=True)
    y = x * 1e-10
    y.backward(torch.full_like(y, TINY))
    assert x.grad is not None
    return torch.get_num_threads(), int(y.count_nonzero()), int(x.grad.count_nonzero())


def page_faults() -> tuple[int, int]:
    """Of a large tensor, and of another of the same size after it is freed."""
    CpuPlatform().prepare(0, 1, "plain")
    return _faults(), _faults()


def _faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    # 64 MiB: above 32 MiB, glibc's largest threshold, each block is mapped by itself.
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_denormals_are_flushed_on_every_thread() -> None:
    assert run_ranks(denormals, 1)[0] == (THREADS, 0, 0)


def test_freed_memory_is_used_again_without_faults() -> None:
    first, second = run_ranks(page_faults, 1)[0]
    # At least one for each huge page of 2 MiB; the second time a few of the interpreter's own.
    assert first >= 32
    assert second <= first // 8
