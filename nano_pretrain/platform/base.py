"""The interface of a platform."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    # The preflight lives in this package and answers before torch is imported.
    import torch
    from torch import nn

    from nano_pretrain.recipe.schema import ParallelConfig, Recipe


PlatformName = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Memory:
    """What holds the tensors of one rank, or of several.

    Attributes:
        name: of the device or machine, for people.
        capacity: bytes.
        ranks: how many share it.
    """

    name: str
    capacity: float
    ranks: int = 1


@dataclass(frozen=True)
class LayerModules:
    """Modules that the layer specs are made of; a norm of None is fused into the linear that follows it."""

    column_linear: type[nn.Module]
    row_linear: type[nn.Module]
    norm: type[nn.Module] | None
    core_attention: type[nn.Module]


class Platform(Protocol):
    """Everything the rest of the code asks of the machine's kind."""

    name: PlatformName
    backend: str

    def memory(self, local_rank: int) -> Memory:
        """Where the rank's tensors will be; the answer needs no preparation.

        Args:
            local_rank: number of the rank on its host.
        """

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
        """Which kernels compute the Mamba-2 layers, for the log: the first word names them, the rest may say why."""

    def layer_modules(self) -> LayerModules:
        """Modules for the layer specs."""

    def prepare_model(self, recipe: Recipe, layout: ParallelConfig) -> dict[str, Any]:
        """Make ready what the layers of a model need, once there are process groups.

        Args:
            recipe: the recipe.
            layout: layout of the process groups.

        Returns:
            Fields of megatron-core's TransformerConfig that depend on the platform.

        Raises:
            RecipeError: the layout asks for what this platform does not have.
        """

    def optimizer_scope(self) -> AbstractContextManager[None]:
        """Around the construction, each step, and saving and loading of megatron-core's optimizers."""

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Dense peak of one rank in FLOP/s for matrix products of `dtype`; None if it is not known."""

    def synchronize(self) -> None:
        """Wait for the device."""
