"""The portable kernels against mamba-ssm's on a GPU; skipped, with the reason, where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nano_pretrain.kernels import mamba

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_split_conv_scan_equals_mamba_ssm() -> None:
    ssd_combined = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined", reason="needs mamba-ssm")
    torch.manual_seed(0)
    heads, head_dim, groups, state, length = 16, 64, 4, 128, 500
    inner, conv = heads * head_dim, heads * head_dim + 2 * groups * state
    shapes = [(2, length, inner + conv + heads), (conv, 4), (conv,), (heads,), (heads,), (heads,)]
    inputs = [torch.randn(shape, device="cuda") for shape in shapes]
    inputs[4] = -inputs[4].exp()
    seq_idx = (torch.rand(2, length, device="cuda") < 0.02).cumsum(1).int()
    results = []
    functions: list[Callable[..., torch.Tensor]] = [
        mamba.mamba_split_conv1d_scan_combined,
        ssd_combined.mamba_split_conv1d_scan_combined,
    ]
    for function in functions:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        y = function(
            *leaves, chunk_size=128, seq_idx=seq_idx, activation="silu", headdim=head_dim, ngroups=groups,
            norm_before_gate=False,
        )  # fmt: skip
        y.square().mean().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for mine, original in zip(*results, strict=True):
        # The Triton kernels multiply in TF32 on a GPU: ten bits of mantissa, errors of some 1e-3 of the norm.
        assert torch.linalg.vector_norm(mine - original) < 5e-3 * torch.linalg.vector_norm(original)
