"""Shapes and inputs of the selective scan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from nano_pretrain.kernels.ssd import CHUNK
from tests.kernels.compare import Inputs, random_tensor

LENGTHS = (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 3 * CHUNK - 5)
"""On both sides of the chunk borders."""


@dataclass(frozen=True)
class ScanCase:
    """Shape of a scan and what is optional in it."""

    batch: int = 2
    length: int = 2 * CHUNK + 9
    groups: int = 2
    heads_per_group: int = 2
    channels: int = 4
    state: int = 5
    skip: bool = True
    initial: bool = True
    documents: bool = True
    seed: int = 0

    def inputs(self) -> Inputs:
        """Float64 inputs whose decays span all scales: exp(dt a) from nearly 1 to nearly 0."""
        g = torch.Generator().manual_seed(self.seed)
        heads = self.groups * self.heads_per_group
        b_shape = (self.batch, self.length, self.groups, self.state)
        return {
            "x": random_tensor(g, self.batch, self.length, heads, self.channels),
            "dt": torch.nn.functional.softplus(random_tensor(g, self.batch, self.length, heads) - 2),
            "a": -random_tensor(g, heads).exp(),
            "b": random_tensor(g, *b_shape),
            "c": random_tensor(g, *b_shape),
            "d": random_tensor(g, heads) if self.skip else None,
            "initial_states": random_tensor(g, self.batch, heads, self.channels, self.state) if self.initial else None,
            "seq_idx": documents(g, self.batch, self.length) if self.documents else None,
        }

    def output_gradients(self) -> tuple[Tensor, Tensor]:
        """Of y and of the last state."""
        g = torch.Generator().manual_seed(self.seed + 1)
        heads = self.groups * self.heads_per_group
        return (
            random_tensor(g, self.batch, self.length, heads, self.channels),
            random_tensor(g, self.batch, heads, self.channels, self.state),
        )


def documents(generator: torch.Generator, batch: int, length: int) -> Tensor:
    """Document of each token [batch, length], int32: borders anywhere, on average every 25 tokens."""
    starts = torch.rand(batch, length, generator=generator) < 0.04
    return starts.cumsum(1, dtype=torch.int32)


cases = st.builds(
    ScanCase,
    batch=st.integers(1, 2),
    length=st.sampled_from(LENGTHS) | st.integers(1, 3 * CHUNK),
    groups=st.integers(1, 3),
    heads_per_group=st.integers(1, 3),
    channels=st.integers(1, 5),
    state=st.integers(1, 6),
    skip=st.booleans(),
    initial=st.booleans(),
    documents=st.booleans(),
    seed=st.integers(0, 1000),
)
