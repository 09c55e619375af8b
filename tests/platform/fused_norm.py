"""Modules with the parameters of Transformer Engine's, whose linears hold the norm before them; they run on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nano_pretrain.kernels.norm import RMSNorm, rms_norm
from nano_pretrain.platform.base import LayerModules
from nano_pretrain.platform.cpu import CpuPlatform


class FusedNormLinear(ColumnParallelLinear):  # type: ignore[misc]
    """Named and sharded as megatron-core's TELayerNormColumnParallelLinear."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **others: Any) -> None:
        super().__init__(input_size, output_size, config=config, **others)
        self.epsilon = config.layernorm_epsilon
        self.layer_norm_weight = nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Any:
        """Norm, then the linear."""
        return super().forward(rms_norm(x, self.layer_norm_weight, self.epsilon))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """As TELayerNormColumnParallelLinear's."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0, "bias": 0}, sharded_offsets)


class NormWithState(RMSNorm):
    """As Transformer Engine's RMSNorm, whose state for FP8 is always empty."""

    def get_extra_state(self) -> Tensor:
        """Empty."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set."""


class FusedPlatform(CpuPlatform):
    """The CPU with CUDA's division of a layer into modules."""

    def layer_modules(self) -> LayerModules:
        """As CUDA's: the norm is part of the linear that follows it."""
        return replace(super().layer_modules(), column_linear=FusedNormLinear, norm=None)
