"""The chunked selective scan of Mamba-2 (state-space duality) as batched matrix products.

Source: Dao and Gu, "Transformers are SSMs" (2024), section 6: block decomposition of the semiseparable matrix. A
chunk is 64 tokens whatever the model's nominal chunk size is (the result does not depend on it). The heads of a group
lie side by side in the columns of each product, so B and C are never copied per head; only the decay matrix is per
head. Exponents are differences of float64 sums: in fp32, one large step would spoil those of all later tokens.

Dimension suffixes: b batch, c chunk, l tokens (q, k inside a chunk), g groups, r heads per group, h = g r heads,
p channels of a head, n state size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nano_pretrain.kernels.documents import document_numbers
from nano_pretrain.kernels.native.library import active
from nano_pretrain.kernels.native.scan import native_scan

CHUNK = 64
"""Tokens of a chunk: the fastest in the measurements of docs/log.md; independent of the model's `chunk_size`."""

SEGMENT = 16 * CHUNK
"""Tokens that the backward pass computes again at a time, from their inputs and the state before them."""


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan `S_t = exp(dt_t a) S_(t-1) + dt_t x_t B_t^T`, `y_t = S_t C_t + d x_t`, with a zero state at each document.

    Args:
        x: input [b, l, h, p]; in bf16 the plain products that give y are bf16 too, states and their sums are fp32.
        dt: step sizes after softplus [b, l, h], fp32 (float64 with float64 inputs).
        a: decay rates, negative [h].
        b: input projections [b, l, g, n].
        c: output projections [b, l, g, n].
        d: skip weights [h], or None.
        initial_states: state before the first token [b, h, p, n], or None for zero.
        seq_idx: document of each token [b, l], integers, non-decreasing; the state does not cross documents.

    Returns:
        y [b, l, h, p] in the dtype of x, and the state after the last token [b, h, p, n] in the dtype of dt.

    Raises:
        ValueError: seq_idx is not of integers, or native kernels are asked for shapes or dtypes that do not fit.
    """
    seq_idx = document_numbers(seq_idx)
    library = active(x, dt, b, c)
    if library:
        return native_scan(library, x, dt, a, b, c, d, initial_states, seq_idx)
    if initial_states is None:
        initial_states = x.new_zeros(x.shape[0], *x.shape[2:], b.shape[3], dtype=dt.dtype)
    return _scan_segments(x, dt, a, b, c, d, initial_states, seq_idx if x.shape[1] else None)


def _scan_segments(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    state: Tensor,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`chunk_scan` in plain PyTorch; keeps its inputs and the state before each segment for the backward pass."""
    outputs, document = [], None
    for x_s, dt_s, b_s, c_s, documents in zip(*(_segments(t, x.shape[1]) for t in (x, dt, b, c, seq_idx)), strict=True):
        if documents is not None and document is not None:
            state = torch.where((documents[:, 0] == document)[:, None, None, None], state, 0.0)
        document = None if documents is None else documents[:, -1]
        y, state = checkpoint(
            _scan, x_s, dt_s, a, b_s, c_s, d, state, documents, use_reentrant=False, preserve_rng_state=False
        )
        outputs.append(y)
    return torch.cat(outputs, 1), state


def _segments(t: Tensor | None, length: int) -> Sequence[Tensor | None]:
    """[b, l, ...] as segments [b, SEGMENT, ...], the last shorter."""
    return [None] * max(1, -(-length // SEGMENT)) if t is None else t.split(SEGMENT, 1)


def _scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_states: Tensor,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`chunk_scan` of one segment."""
    length, groups = x.shape[1], b.shape[2]
    x_, dt_, b_, c_ = (_chunks(t) for t in (x, dt, b, c))
    documents = None if seq_idx is None else _chunks(seq_idx, pad_last=True)
    cumulative = (dt_.double() * a.double()).cumsum(2)
    xdt = (x_ * dt_.unsqueeze(-1)).unflatten(3, (groups, -1))
    scores = torch.einsum("bcqgn,bckgn->bcgqk", c_, b_)
    weights = (scores.unsqueeze(3) * _decay(cumulative, documents, groups, dt.dtype)).to(x.dtype)
    added = _added_states(xdt, b_, cumulative, documents)
    before, last = _pass_states(added, cumulative[:, :, -1], documents, _to_grouped(initial_states, groups))
    y = _carried_output(c_, before, cumulative, documents)
    if d is not None:
        y = y + x_ * d.to(x.dtype).unsqueeze(-1)
    # The last of the products: the backward pass needs its inputs only, and computes again no further than to them.
    y = y + torch.einsum("bcgrqk,bckgrp->bcqgrp", weights, xdt.to(x.dtype)).flatten(3, 4)
    return y.flatten(1, 2)[:, :length], _from_grouped(last)


def _chunks(t: Tensor, pad_last: bool = False) -> Tensor:
    """[b, l, ...] -> [b, c, CHUNK, ...], at least one chunk; padding has dt = 0, that is no decay and no input."""
    missing = -t.shape[1] % CHUNK if t.shape[1] else CHUNK
    if missing:
        fill = t[:, -1:].expand(-1, missing, *t.shape[2:]) if pad_last else t.new_zeros(1)
        t = torch.cat([t, fill], 1) if pad_last else F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing))
    chunks: Tensor = t.unflatten(1, (-1, CHUNK))
    return chunks


def _decay(cumulative: Tensor, documents: Tensor | None, groups: int, dtype: torch.dtype) -> Tensor:
    """exp(sum of dt a over (k, q]) for k <= q in one document, else 0: [b, c, g, r, q, k]."""
    by_head = cumulative.transpose(2, 3).unflatten(2, (groups, -1))
    allowed = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=cumulative.device).tril()
    if documents is not None:
        allowed = (allowed & (documents.unsqueeze(-1) == documents.unsqueeze(-2)))[:, :, None, None]
    # Masked before the exponential: above the diagonal it overflows, and its gradient would be NaN.
    difference: Tensor = by_head.unsqueeze(-1) - by_head.unsqueeze(-2)
    return difference.to(dtype).masked_fill_(~allowed, -torch.inf).exp_()


def _added_states(xdt: Tensor, b: Tensor, cumulative: Tensor, documents: Tensor | None) -> Tensor:
    """What each chunk adds to the state at its end: [b, c, g, n, r, p], in the dtype of xdt [b, c, l, g, r, p]."""
    to_end = (cumulative[:, :, -1:] - cumulative).to(xdt.dtype).exp()
    if documents is not None:
        to_end = to_end * (documents == documents[:, :, -1:]).unsqueeze(-1)
    weighted = xdt * to_end.view(xdt.shape[:-1]).unsqueeze(-1)
    return torch.einsum("bckgn,bckgrp->bcgnrp", b.to(xdt.dtype), weighted)


def _pass_states(added: Tensor, total: Tensor, documents: Tensor | None, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Carry the state over the chunks: the state before each [b, c, g, n, r, p], and the last [b, g, n, r, p]."""
    keep = total.to(added.dtype).exp().unflatten(2, (added.shape[2], -1))
    if documents is not None:
        last = documents[:, :, -1]
        same = last == torch.cat([documents[:, :1, 0], last[:, :-1]], 1)
        keep = keep * same[:, :, None, None]
    before, state = [], initial.to(added.dtype)
    # unbind, not indexing: the backward of an index fills a tensor of the full size for every chunk.
    for added_c, keep_c in zip(added.unbind(1), keep.unbind(1), strict=True):
        before.append(state)
        state = torch.addcmul(added_c, state, keep_c[:, :, None, :, None])
    return torch.stack(before, 1), state


def _carried_output(c: Tensor, before: Tensor, cumulative: Tensor, documents: Tensor | None) -> Tensor:
    """What the state before a chunk gives to its tokens: [b, c, q, h, p]."""
    from_start = cumulative.to(before.dtype).exp()
    if documents is not None:
        previous = torch.cat([documents[:, :1, 0], documents[:, :-1, -1]], 1)
        from_start = from_start * (documents == previous.unsqueeze(-1)).unsqueeze(-1)
    out: Tensor = torch.einsum("bcqgn,bcgnrp->bcqgrp", c, before.to(c.dtype)).flatten(3, 4)
    return out * from_start.unsqueeze(-1).to(c.dtype)


def _to_grouped(states: Tensor, groups: int) -> Tensor:
    """[b, h, p, n] -> [b, g, n, r, p]."""
    by_group: Tensor = states.unflatten(1, (groups, -1))
    return by_group.permute(0, 1, 4, 2, 3)


def _from_grouped(states: Tensor) -> Tensor:
    """[b, g, n, r, p] -> [b, h, p, n]."""
    return states.permute(0, 1, 3, 4, 2).flatten(1, 2)


def state_update(
    state: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None
) -> Tensor:
    """One token of the scan, in fp32; `state` [b, h, p, n] is updated in place.

    Args:
        state: recurrent state [b, h, p, n].
        x: input [b, h, p].
        dt: step size after softplus [b, h], fp32.
        a: decay rates [h].
        b: input projection [b, g, n].
        c: output projection [b, g, n].
        d: skip weights [h], or None.

    Returns:
        y [b, h, p] in the dtype of x.
    """
    repeats = x.shape[1] // b.shape[1]
    b_h, c_h = (t.to(dt.dtype).repeat_interleave(repeats, 1) for t in (b, c))
    x_ = x.to(dt.dtype)
    new = state.to(dt.dtype) * (dt * a).exp()[..., None, None]
    new = new + torch.einsum("bhp,bhn->bhpn", x_ * dt.unsqueeze(-1), b_h)
    y = torch.einsum("bhpn,bhn->bhp", new, c_h)
    if d is not None:
        y = y + x_ * d.to(dt.dtype).unsqueeze(-1)
    state.copy_(new)
    return y.to(x.dtype)
