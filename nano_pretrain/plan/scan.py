"""The convolution and the scan of a Mamba-2 layer as the platforms' kernels compute them."""

from __future__ import annotations

from dataclasses import dataclass

from nano_pretrain.plan.work import Kernel, Passes, RankWork
from nano_pretrain.recipe.derived import mamba_shape
from nano_pretrain.recipe.schema import ModelConfig


@dataclass(frozen=True)
class ScanKernels:
    """How a platform computes the scan.

    Chunks of L tokens (Dao and Gu 2024, section 6), triangular tiles in blocks of K rows. With H heads of P channels,
    state N and G groups a token costs forward
        H (4NP + P(L + K)) + 2GLN: what a chunk adds to the state and what the state gives to its tokens, x under the
        decayed scores, and the scores C B^T;
    and backward
        H (10NP + T P(L + K)) + 6GLN: the states again, and the gradients of states, x, B, C, scores and decays.

    Attributes:
        chunk: L, tokens.
        block: K, rows.
        whole_scores: whether C B^T is computed above the diagonal too; else 2L is L + K.
        triangles: T, triangular products of a head in the backward pass.
        channels: numbers moved for each channel and token, forward and backward.
        projections: numbers moved for each entry of B and token, forward and backward.
        state_bytes: bytes moved for each entry of a state and chunk, forward and backward.
        score_bytes: bytes moved for each score, forward and backward.
    """

    chunk: int
    block: int
    whole_scores: bool
    triangles: int
    channels: tuple[int, int]
    projections: tuple[int, int]
    state_bytes: tuple[int, int]
    score_bytes: tuple[int, int]

    def flops(self, heads: int, groups: int, channels: int, state: int) -> tuple[int, int]:
        """Of one token, forward and backward."""
        states = 2 * state * channels
        triangle = channels * (self.chunk + self.block)
        scores = groups * state * (2 * self.chunk if self.whole_scores else self.chunk + self.block)
        return (
            heads * (2 * states + triangle) + scores,
            heads * (5 * states + self.triangles * triangle) + 3 * scores,
        )

    def moved(self, heads: int, groups: int, channels: int, state: int, width: int) -> tuple[float, float]:
        """Bytes of one token, forward and backward, with activations of `width` bytes."""
        forward, backward = (
            width * (heads * channels * self.channels[i] + groups * state * self.projections[i])
            + heads * channels * state * self.state_bytes[i] / self.chunk
            + groups * self.chunk * self.score_bytes[i]
            for i in (0, 1)
        )
        return forward, backward


SCANS = {
    # megatron-core's MambaMixer passes chunk_size=128; the height of blocks is tuned at run time, 64 is usual. The
    # triangles: dx, scores, decays. Bytes: the arguments of the kernels in mamba_ssm/ops/triton/ssd_combined.py, 2.3.
    "cuda": ScanKernels(128, 64, True, 3, (3, 11), (3, 10), (12, 34), (8, 32)),
    # nano_pretrain/kernels/native: chunks stay in cache; the decays' gradient follows from the scores'.
    "cpu": ScanKernels(64, 16, False, 2, (2, 3), (2, 4), (0, 0), (0, 0)),
}
"""By platform."""


def local_groups(model: ModelConfig, tensor: int, context: int) -> int:
    """Groups of B and C on a rank; where there are fewer than context-parallel ranks, each of them has a copy."""
    return max(1, model.mamba_num_groups // (tensor * context))


def convolution_and_scan(work: RankWork) -> Passes:
    """Both, over the whole sequence of the rank's heads: context-parallel ranks divide the heads, not the tokens."""
    model, scan, ranks = work.model, SCANS[work.platform], work.tensor * work.context
    tokens = work.tokens * work.context
    heads, groups = model.mamba_num_heads // ranks, local_groups(model, work.tensor, work.context)
    sizes = (heads, groups, model.mamba_head_dim, model.mamba_state_dim)
    flops, moved = scan.flops(*sizes), scan.moved(*sizes, work.width)
    forward, backward = (Kernel("scan", "scan", work.activation, tokens * flops[i], tokens * moved[i]) for i in (0, 1))
    return _convolution(work, tokens, groups) + Passes((forward,), (backward,))


def _convolution(work: RankWork, tokens: int, groups: int) -> Passes:
    """x, B and C; the backward pass computes it again before the gradients of input and weight."""
    inner = mamba_shape(work.model).inner // (work.tensor * work.context)
    numbers = tokens * (inner + 2 * groups * work.model.mamba_state_dim)
    flops = 2 * work.model.mamba_conv_width * numbers
    forward = Kernel("convolution", "scan", work.activation, flops, 2 * numbers * work.width)
    backward = Kernel("convolution", "scan", work.activation, 3 * flops, 5 * numbers * work.width)
    return Passes((forward,), (backward,))
