"""The interface of a platform."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    # The preflight lives in this package and answers before torch is imported.
    import torch
    from torch import nn


@dataclass(frozen=True)
class LayerModules:
    """Modules that the layer specs are made of; a norm of None is fused into the linear that follows it."""

    column_linear: type[nn.Module]
    row_linear: type[nn.Module]
    norm: type[nn.Module] | None
    core_attention: type[nn.Module]


class Platform(Protocol):
    """Everything the rest of the code asks of the machine's kind."""

    name: str
    backend: str

    def prepare(self, local_rank: int, threads: int | None, kernels: str = "auto") -> torch.device:
        """Make torch and megatron-core ready on this machine; returns the rank's device.

        Args:
            local_rank: number of the rank on its host.
            threads: CPU threads of the rank, or None for the default.
            kernels: `cluster.cpu_kernels` of the recipe.

        Raises:
            UserError: something is not installed.
        """

    def kernels(self) -> str:
        """Which kernels compute the Mamba-2 layers, in a few words for the log."""

    def layer_modules(self) -> LayerModules:
        """Modules for the layer specs."""

    def config_overrides(self) -> dict[str, Any]:
        """Fields of megatron-core's TransformerConfig that depend on the platform."""

    def optimizer_scope(self) -> AbstractContextManager[None]:
        """Around the construction, each step, and saving and loading of megatron-core's optimizers."""

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Dense peak of one rank in FLOP/s for matrix products of `dtype`; None if it is not known."""

    def synchronize(self) -> None:
        """Wait for the device."""
