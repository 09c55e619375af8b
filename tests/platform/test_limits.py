"""The 32-bit limit of mamba-ssm's kernels, on tensors without storage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nano_pretrain.platform.limits import INT32, check_int32, guard_chunk_scan, guard_split_scan, largest_tensor
from nano_pretrain.recipe.errors import UserError

# nano_12b_v2 on one rank: in_proj has 2 x 10,240 + 2 x 8 x 128 + 128 = 22,656 rows.
HEADS, HEAD_DIM, GROUPS, STATE, CHUNK = 128, 80, 8, 128, 128
LONGEST = (INT32 - 1) // 22_656


def split_scan(length: int, batch: int = 1) -> Any:
    """Call the guarded kernel, which answers 'ran', with shapes of the 12B."""
    kernel = guard_split_scan(lambda *args, **kwargs: "ran")  # type: ignore[arg-type]
    inner, conv = HEADS * HEAD_DIM, HEADS * HEAD_DIM + 2 * GROUPS * STATE
    shapes = ((batch, length, inner + conv + HEADS), (conv, 4), (conv,), (HEADS,), (HEADS,))
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    return kernel(*tensors, D=None, chunk_size=CHUNK, headdim=HEAD_DIM, ngroups=GROUPS)


def test_the_longest_sequence_passes_and_one_more_token_does_not() -> None:
    assert LONGEST == 94_786
    assert split_scan(LONGEST) == "ran"
    with pytest.raises(UserError, match=r"sequence_length: in_proj's output .* raise parallel.context"):
        split_scan(LONGEST + 1)


def test_the_batch_counts_too() -> None:
    with pytest.raises(UserError, match="sequence_length"):
        split_scan(LONGEST // 2 + 1, batch=2)


def test_the_papers_extension_fits_on_its_layout() -> None:
    # 524,288 tokens at TP8 x CP16: a rank's share of heads is one of 128.
    assert largest_tensor(1, 524_288, 1, HEAD_DIM, 1, STATE, CHUNK)[1] < INT32
    # On TP4 alone it does not: 32 heads, two groups.
    assert largest_tensor(1, 524_288, 32, HEAD_DIM, 2, STATE, CHUNK)[1] >= INT32


def test_the_states_of_small_chunks_are_the_largest() -> None:
    name, elements = largest_tensor(1, 65_536, HEADS, HEAD_DIM, GROUPS, STATE, 32)
    assert (name, elements) == ("the states of the chunks", 2048 * HEADS * HEAD_DIM * STATE)
    with pytest.raises(UserError, match="the states of the chunks"):
        check_int32(name, elements)


def test_inference_is_guarded() -> None:
    kernel = guard_chunk_scan(lambda *args, **kwargs: "ran")
    shapes = ((1, 10**6, HEADS, HEAD_DIM), (1, 10**6, HEADS), (HEADS,), *[(1, 10**6, GROUPS, STATE)] * 2)
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    with pytest.raises(UserError, match="sequence_length"):
        kernel(*tensors, CHUNK, D=None)
    assert kernel(*(t[:, :1000] if t.dim() > 1 else t for t in tensors), CHUNK, D=None) == "ran"
