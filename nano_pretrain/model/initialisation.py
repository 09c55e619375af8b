"""Initial weights that depend on the seed and the parameter's name, and on nothing of the layout.

Every rank draws the full tensor of each parameter from a generator of its own, seeded by name, and keeps its shard;
names and shards are those of the sharded checkpoint, so tensor- and pipeline-parallel ranks agree with a single one
bit for bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from nano_pretrain.recipe.schema import ModelConfig

RESIDUAL_OUTPUTS = ("out_proj.weight", "linear_proj.weight", "linear_fc2.weight")
"""Projections whose output is added to the residual stream."""

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4
A_MIN, A_MAX = 1.0, 16.0


def initialise_weights(model: Any, config: ModelConfig, seed: int) -> None:
    """Fill every parameter in place.

    Normal(0, init_std) for embedding, head and linears, divided by sqrt(layers) where the output joins the residual
    stream (megatron-core's rule for hybrids). Mamba-2's own as in megatron-core's mixer: A uniform in [1, 16], D = 1,
    dt_bias the inverse softplus of a log-uniform step in [1e-3, 1e-1], convolution uniform within 1 / sqrt(width).
    Norms 1; rows of the vocabulary padding 0.

    Args:
        model: megatron-core model of this rank.
        config: shapes and init_std.
        seed: `run.seed`.

    Raises:
        KeyError: a parameter that no rule covers, or that the sharded checkpoint leaves out.
    """
    missing = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        for shard in _shards(model):
            generator = torch.Generator().manual_seed(_name_seed(seed, shard.key))
            full = _rule(shard.key, config)(tuple(shard.global_shape), generator)
            if shard.key.endswith(("word_embeddings.weight", "output_layer.weight")):
                full[config.vocab_size :] = 0
            data: Any = shard.data
            data.copy_(full[shard.global_slice()].reshape(data.shape))
            missing -= data.numel()
    if missing:
        raise KeyError(f"{missing} elements of the model's parameters are not in its sharded checkpoint")


def _shards(model: Any) -> Iterator[ShardedTensor]:
    """The sharded tensors of the checkpoint, which view the parameters; fused tensors come as their parts."""
    state: dict[str, Any] = model.sharded_state_dict()
    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            yield value


def _name_seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


def _normal(std: float) -> Draw:
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def _uniform(low: float, high: float) -> Draw:
    return lambda shape, generator: torch.rand(shape, generator=generator) * (high - low) + low


def _ones(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.ones(shape)


def _log_of_a(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return _uniform(A_MIN, A_MAX)(shape, generator).log()


def _dt_bias(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    step = _uniform(math.log(DT_MIN), math.log(DT_MAX))(shape, generator).exp().clamp(min=DT_FLOOR)
    return step + torch.log(-torch.expm1(-step))


def _rule(name: str, config: ModelConfig) -> Draw:
    """The distribution of a parameter, by the end of its checkpoint name."""
    bound = 1 / math.sqrt(config.mamba_conv_width)
    residual_std = config.init_std / math.sqrt(len(config.pattern))
    rules: list[tuple[tuple[str, ...], Draw]] = [
        (RESIDUAL_OUTPUTS, _normal(residual_std)),
        (("norm.weight", "layernorm.weight", "layer_norm_weight", ".D"), _ones),
        ((".A_log",), _log_of_a),
        ((".dt_bias",), _dt_bias),
        (
            ("linear_qkv.weight", "linear_fc1.weight", "embeddings.weight", "output_layer.weight"),
            _normal(config.init_std),
        ),
    ]
    for endings, draw in rules:
        if name.endswith(endings):
            return draw
    if ".conv1d." in name:
        return _uniform(-bound, bound)
    if ".in_proj.weight" in name:
        return _normal(config.init_std)
    raise KeyError(f"no initialisation rule for parameter {name}")
