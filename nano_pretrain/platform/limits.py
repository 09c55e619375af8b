"""The 32-bit limit of mamba-ssm's kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from nano_pretrain.recipe.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

INT32 = 2**31


def largest_tensor(
    batch: int, length: int, heads: int, head_dim: int, groups: int, state: int, chunk: int
) -> tuple[str, int]:
    """Name and elements of the largest tensor that mamba-ssm's chunked scan addresses with 32-bit offsets.

    Its Triton kernels multiply offsets in 32 bits: from 2^31 elements on they read and write elsewhere, mostly without
    an error (state-spaces/mamba, issue 1015; all releases up to 2.3.2).

    Args:
        batch: samples of a micro-batch.
        length: tokens of a sample; under context parallelism the mixer sees all of them, and a share of the heads.
        heads: of this rank, as the following ones.
        head_dim: channels of a head.
        groups: of B and C.
        state: state size.
        chunk: tokens of a chunk.
    """
    inner, chunks = heads * head_dim, -(-length // chunk)
    sizes = {
        "in_proj's output": batch * length * (2 * inner + 2 * groups * state + heads),
        "the states of the chunks": batch * chunks * inner * state,
        "the scores of the chunks": batch * chunks * groups * chunk**2,
    }
    largest = max(sizes, key=lambda name: sizes[name])
    return largest, sizes[largest]


def check_int32(name: str, elements: int, field: str = "sequence_length") -> None:
    """Refuse a tensor that mamba-ssm's kernels cannot address.

    Args:
        name: of the tensor.
        elements: of the tensor.
        field: dotted name of the sequence length, where the stage is known.

    Raises:
        RecipeError: it has 2^31 elements or more.
    """
    if elements >= INT32:
        raise RecipeError(
            field,
            f"{name} would have {elements:,} elements on a rank, and mamba-ssm's kernels address {INT32 - 1:,}",
            "raise parallel.context or parallel.tensor, or lower micro_batch_size or sequence_length",
        )


def guard_split_scan(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """mamba-ssm's `mamba_split_conv1d_scan_combined`, refusing what it would compute wrongly."""

    @wraps(kernel)
    def guarded(
        zxbcdt: Tensor,
        conv1d_weight: Tensor,
        conv1d_bias: Tensor | None,
        dt_bias: Tensor,
        A: Tensor,  # noqa: N803
        D: Tensor,  # noqa: N803
        chunk_size: int,
        *,
        headdim: int,
        ngroups: int,
        **others: Any,
    ) -> Tensor:
        heads, (batch, length) = dt_bias.shape[0], zxbcdt.shape[:2]
        state = (conv1d_weight.shape[0] - heads * headdim) // (2 * ngroups)
        check_int32(*largest_tensor(batch, length, heads, headdim, ngroups, state, chunk_size))
        given = (zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size)
        return kernel(*given, headdim=headdim, ngroups=ngroups, **others)

    return guarded


def guard_chunk_scan(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """mamba-ssm's `mamba_chunk_scan_combined`, refusing what it would compute wrongly."""

    @wraps(kernel)
    def guarded(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **kwargs: Any) -> Any:  # noqa: N803
        (batch, length, heads, head_dim), (groups, state) = x.shape, B.shape[2:]
        check_int32(*largest_tensor(batch, length, heads, head_dim, groups, state, chunk_size))
        return kernel(x, dt, A, B, C, chunk_size, **kwargs)

    return guarded
