"""Recomputation: what the backward pass computes again instead of keeping it from the forward pass.

megatron-core 0.16 recomputes in its transformer layers only and says nothing of it: `recompute_granularity=full` has no
effect on a MambaStack. Here its functions are put around whole layers, or around parts of them. Nothing random happens
in a layer, so losses and gradients are equal bit for bit to those without recomputation.

Under FP8 on a GPU (`config.fp8`; not run so far) the FP8 context has to be entered again, by Transformer Engine's own
checkpoint of a layer and by megatron-core's of a part; and the linears behind the parts must keep their input as it is,
where they would keep a quantised copy that nobody empties.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import CheckpointWithoutOutput, checkpoint, get_cuda_rng_tracker
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from nano_pretrain.model.layers import DocumentMixer


def recompute(model: Any, granularity: str) -> None:
    """Make a built model recompute.

    Args:
        model: HybridModel.
        granularity: `none`; `selective` for what is large and cheap: convolution, scan, gate and norm between the
            projections of a Mamba-2 layer, and the squared ReLU; `full` for whole layers. Attention is not among the
            former: flash attention keeps little, and its work grows with the square of the sequence.
    """
    if granularity == "full":
        for layer in model.decoder.layers:
            layer.forward = _keeping_its_input(layer, model.pg_collection.tp)
    if granularity == "selective":
        for module in model.modules():
            if isinstance(module, MLP):
                module.activation_func = Emptied(module.activation_func, module.linear_fc2)
            elif isinstance(module, DocumentMixer):
                module.mix = Emptied(module.mix, module.out_proj)  # type: ignore[method-assign,assignment]


def _keeping_its_input(layer: Any, tensor_group: Any) -> Callable[..., Any]:
    """The layer's `forward`, keeping what it is given and nothing that it makes of it."""
    forward = layer.forward

    def recomputed(hidden_states: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Any:
        run = partial(forward, **others)
        if not _is_training(layer):
            return run(hidden_states, attention_mask)
        if not layer.config.fp8:
            return checkpoint(run, False, hidden_states, attention_mask)
        from megatron.core.extensions.transformer_engine import te_checkpoint

        return te_checkpoint(run, False, get_cuda_rng_tracker, tensor_group, hidden_states, attention_mask)

    return recomputed


class Emptied:
    """A function that is computed again: its result is emptied when the linear behind it has read it.

    The linear keeps the result for its own backward pass, before which it is filled again.

    Args:
        function: of tensors or None, all that it depends on but parameters.
        linear: the module that reads the result, and nothing else does.
    """

    def __init__(self, function: Callable[..., Tensor], linear: Any) -> None:
        self._function = function
        self._linear = linear
        self._read: CheckpointWithoutOutput | None = None
        linear.register_forward_hook(self._empty)
        if linear.config.fp8:
            from megatron.core.extensions.transformer_engine import set_save_original_input

            set_save_original_input(linear)

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """The function's result."""
        if not _is_training(self._linear):
            return self._function(*inputs)
        self._read = CheckpointWithoutOutput(fp8=self._linear.config.fp8)
        result: Tensor = self._read.checkpoint(self._function, *inputs)
        return result

    def _empty(self, linear: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._read is not None:
            self._read.discard_output_and_register_recompute(outputs[0])
            self._read = None


def _is_training(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled()
