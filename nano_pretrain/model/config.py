"""megatron-core's TransformerConfig from a recipe."""

from __future__ import annotations

from typing import Any

import torch

from nano_pretrain.kernels.activation import squared_relu
from nano_pretrain.platform import Platform
from nano_pretrain.precision.placement import engine_fields
from nano_pretrain.recipe.derived import parameter_dtype
from nano_pretrain.recipe.schema import ParallelConfig, Recipe


def transformer_config(recipe: Recipe, layout: ParallelConfig, platform: Platform) -> Any:
    """A TransformerConfig with the recipe's values; weights are left for `initialise_weights`."""
    from megatron.core.transformer import TransformerConfig

    model = recipe.model
    dtype = getattr(torch, parameter_dtype(recipe.precision))
    return TransformerConfig(
        num_layers=len(model.pattern),
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        mamba_num_heads=model.mamba_num_heads,
        mamba_head_dim=model.mamba_head_dim,
        mamba_num_groups=model.mamba_num_groups,
        mamba_state_dim=model.mamba_state_dim,
        is_hybrid_model=True,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        activation_func=squared_relu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        init_method_std=model.init_std,
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence,
        calculate_per_token_loss=True,
        **engine_fields(recipe.precision, platform.name),
        **platform.prepare_model(recipe, layout),
    )
