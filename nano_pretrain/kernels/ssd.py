"""The chunked selective scan of Mamba-2 (state-space duality) as batched matrix products.

Source: Dao and Gu, "Transformers are SSMs" (2024), section 6: block decomposition of the semiseparable matrix. A
chunk is 64 tokens whatever the model's nominal chunk size is (the result does not depend on it). The heads of a group
lie side by side in the columns of each product, so B and C are never copied per head; only the decay matrix is per
head.

Dimension suffixes: b batch, c chunk, l tokens (q, k inside a chunk), g groups, r heads per group, h = g r heads,
p channels of a head, n state size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_pretrain.kernels.native.library import active
from nano_pretrain.kernels.native.scan import native_scan

CHUNK = 64
"""Tokens of a chunk: the fastest in the measurements of docs/log.md; independent of the model's `chunk_size`."""


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
        x: input [b, l, h, p]; its dtype is that of the large products.
        dt: step sizes after softplus [b, l, h], fp32 (float64 with float64 inputs).
        a: decay rates, negative [h].
        b: input projections [b, l, g, n].
        c: output projections [b, l, g, n].
        d: skip weights [h], or None.
        initial_states: state before the first token [b, h, p, n], or None for zero.
        seq_idx: document of each token [b, l], non-decreasing; the state does not cross documents.

    Returns:
        y [b, l, h, p] in the dtype of x, and the state after the last token [b, h, p, n] in the dtype of dt.
    """
    library = active(x, dt, b, c)
    if library:
        return native_scan(library, x, dt, a, b, c, d, initial_states, seq_idx)
    length = x.shape[1]
    heads_per_group = x.shape[2] // b.shape[2]
    x_, dt_, b_, c_ = (_chunks(t) for t in (x, dt, b, c))
    documents = None if seq_idx is None else _chunks(seq_idx, pad_last=True)
    cumulative = (dt_ * a).cumsum(2)
    xdt = x_ * dt_.unsqueeze(-1).to(x.dtype)
    scores = torch.einsum("bcqgn,bckgn->bcgqk", c_, b_)
    decay = _decay(cumulative, documents, heads_per_group)
    weights = (scores.unsqueeze(3) * decay).to(x.dtype)
    xdt_grouped = xdt.unflatten(3, (-1, heads_per_group))
    y = torch.einsum("bcgrqk,bckgrp->bcqgrp", weights, xdt_grouped).flatten(3, 4)
    added = _added_states(xdt_grouped, b_, cumulative, documents)
    before, last = _pass_states(added, cumulative[:, :, -1], documents, _to_grouped(initial_states, b.shape[2]))
    y = y + _carried_output(c_, before, cumulative, documents, heads_per_group)
    y = y.flatten(1, 2)[:, :length]
    if d is not None:
        y = y + x * d.to(x.dtype).unsqueeze(-1)
    return y, _from_grouped(last)


def _chunks(t: Tensor, pad_last: bool = False) -> Tensor:
    """[b, l, ...] -> [b, c, CHUNK, ...]; padding has dt = 0, that is no decay and no input."""
    missing = -t.shape[1] % CHUNK
    if missing:
        fill = t[:, -1:].expand(-1, missing, *t.shape[2:]) if pad_last else t.new_zeros(1)
        t = torch.cat([t, fill], 1) if pad_last else F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing))
    chunks: Tensor = t.unflatten(1, (-1, CHUNK))
    return chunks


def _decay(cumulative: Tensor, documents: Tensor | None, heads_per_group: int) -> Tensor:
    """exp(sum of dt a over (k, q]) for k <= q in one document, else 0: [b, c, g, r, q, k]."""
    by_head = cumulative.transpose(2, 3).unflatten(2, (-1, heads_per_group))
    difference: Tensor = by_head.unsqueeze(-1) - by_head.unsqueeze(-2)
    allowed = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=cumulative.device).tril()
    if documents is not None:
        allowed = (allowed & (documents.unsqueeze(-1) == documents.unsqueeze(-2)))[:, :, None, None]
    # Masked before the exponential: above the diagonal it overflows, and its gradient would be NaN. The diagonal is
    # constant: what it would give to the gradients of dt and a cancels, but not to the last bit.
    diagonal = torch.eye(CHUNK, dtype=torch.bool, device=cumulative.device)
    return difference.masked_fill_(diagonal, 0.0).masked_fill_(~allowed, -torch.inf).exp_()


def _added_states(xdt: Tensor, b: Tensor, cumulative: Tensor, documents: Tensor | None) -> Tensor:
    """What each chunk adds to the state at its end: [b, c, g, n, r p], fp32."""
    to_end = (cumulative[:, :, -1:] - cumulative).exp()
    if documents is not None:
        to_end = to_end * (documents == documents[:, :, -1:]).unsqueeze(-1)
    weighted = xdt * to_end.unflatten(3, (-1, xdt.shape[4])).unsqueeze(-1).to(xdt.dtype)
    return torch.einsum("bckgn,bckgv->bcgnv", b, weighted.flatten(4)).to(cumulative.dtype)


def _pass_states(
    added: Tensor, total: Tensor, documents: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Carry the state over the chunks: the state before each [b, c, g, n, r p], and the last [b, g, n, r, p]."""
    heads_per_group = total.shape[2] // added.shape[2]
    keep = total.exp().unflatten(2, (-1, heads_per_group))
    if documents is not None:
        last = documents[:, :, -1]
        same = last == torch.cat([documents[:, :1, 0], last[:, :-1]], 1)
        keep = keep * same[:, :, None, None]
    added = added.unflatten(4, (heads_per_group, -1))
    state = torch.zeros_like(added[:, 0]) if initial is None else initial.to(added.dtype)
    before = []
    # unbind, not indexing: the backward of an index fills a tensor of the full size for every chunk.
    for added_c, keep_c in zip(added.unbind(1), keep.unbind(1), strict=True):
        before.append(state)
        state = torch.addcmul(added_c, state, keep_c[:, :, None, :, None])
    return torch.stack(before, 1).flatten(4), state


def _carried_output(
    c: Tensor, before: Tensor, cumulative: Tensor, documents: Tensor | None, heads_per_group: int
) -> Tensor:
    """What the state before a chunk gives to its tokens: [b, c, q, h, p]."""
    from_start = cumulative.exp()
    if documents is not None:
        previous = torch.cat([documents[:, :1, 0], documents[:, :-1, -1]], 1)
        from_start = from_start * (documents == previous.unsqueeze(-1)).unsqueeze(-1)
    out = torch.einsum("bcqgn,bcgnv->bcqgv", c, before.to(c.dtype))
    by_head: Tensor = out.unflatten(4, (heads_per_group, -1)).flatten(3, 4)
    return by_head * from_start.unsqueeze(-1).to(c.dtype)


def _to_grouped(states: Tensor | None, groups: int) -> Tensor | None:
    """[b, h, p, n] -> [b, g, n, r, p]."""
    return None if states is None else states.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3)


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
