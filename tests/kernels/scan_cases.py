"""Shapes and inputs of the selective scan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from nano_pretrain.kernels.ssd import CHUNK
from tests.kernels.compare import Inputs, Kernel, random_tensor

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
    layout: str = "dense"
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

    def kernel(self, scan: Kernel) -> Kernel:
        """The scan, called with what it has of each token in this layout."""
        lay_out = LAYOUTS[self.layout]

        def laid_out(**inputs: Any) -> Tensor | tuple[Tensor, ...]:
            return scan(**inputs | {name: lay_out(inputs[name]) for name in PER_TOKEN})

        return laid_out

    def output_gradients(self) -> tuple[Tensor, Tensor]:
        """Of y and of the last state."""
        g = torch.Generator().manual_seed(self.seed + 1)
        heads = self.groups * self.heads_per_group
        return (
            LAYOUTS[self.layout](random_tensor(g, self.batch, self.length, heads, self.channels)),
            random_tensor(g, self.batch, heads, self.channels, self.state),
        )


PER_TOKEN = ("x", "dt", "b", "c")

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "length before batch": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "part of wider rows": lambda t: F.pad(t.flatten(2), (2, 3))[..., 2:-3].unflatten(2, t.shape[2:]),
    "channels before length": lambda t: t.transpose(1, -1).contiguous().transpose(1, -1),
}
"""The same values [batch, length, ...] elsewhere in memory; the second and third are the mixer's."""


def documents(generator: torch.Generator, batch: int, length: int) -> Tensor:
    """Document of each token [batch, length], int32: borders anywhere, on average every 25 tokens."""
    starts = torch.rand(batch, length, generator=generator) < 0.04
    return starts.cumsum(1, dtype=torch.int32)


WIDTHS = st.sampled_from([8, 9, 16, 17])
"""One and two vectors of 8 or 16 numbers, whole and with one more."""

cases = st.builds(
    ScanCase,
    batch=st.integers(1, 2),
    length=st.sampled_from(LENGTHS) | st.integers(1, 3 * CHUNK),
    groups=st.integers(1, 3),
    heads_per_group=st.integers(1, 3) | st.just(5),
    channels=st.integers(1, 5) | WIDTHS,
    state=st.integers(1, 6) | WIDTHS,
    skip=st.booleans(),
    initial=st.booleans(),
    documents=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 1000),
)
