"""config.json like those of released checkpoints.

Written for these tests from the published shapes, not copied: which keys there are, and how they are spelt, after the
test fixtures of Megatron-Bridge and TensorRT-LLM and the configuration class of transformers.
"""

from __future__ import annotations

import math
from typing import Any

COMMON: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
        "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
    },
    "bos_token_id": 1,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": 2,
    "expand": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 128,
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "n_groups": 8,
    "num_key_value_heads": 8,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rms_norm_eps": 1e-05,
    "sliding_window": None,
    "ssm_state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, math.inf],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.0.dev0",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
    "vocab_size": 131072,
}
RELEASED: dict[str, dict[str, Any]] = {
    "nemotron_h_8b": {
        **COMMON,
        "attention_head_dim": 128,
        "chunk_size": 256,
        "hidden_size": 4096,
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        "intermediate_size": 21504,
        "mamba_head_dim": 64,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 52,
    },
    "nano_9b_v2": {
        **COMMON,
        "head_dim": 128,
        "hidden_size": 4480,
        "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        "intermediate_size": 15680,
        "mamba_head_dim": 80,
        "max_position_embeddings": 131072,
        "num_attention_heads": 40,
        "num_hidden_layers": 56,
    },
    "nano_12b_v2": {
        **COMMON,
        "head_dim": 128,
        "hidden_size": 5120,
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
        "intermediate_size": 20480,
        "mamba_head_dim": 80,
        "max_position_embeddings": 131072,
        "num_attention_heads": 40,
        "num_hidden_layers": 62,
    },
}
NAMES = {"before 5.20": ("mamba", "mlp", "attention"), "since": ("linear_attention", "mlp", "full_attention")}
"""Of the layer types M, - and *, in transformers."""


def in_the_new_spelling(config: dict[str, Any], names: tuple[str, str, str]) -> dict[str, Any]:
    """As a conversion to transformers 5 writes it: no pattern, no number of layers, no remote code."""
    gone = {"hybrid_override_pattern", "num_hidden_layers", "auto_map", "torch_dtype", "attention_head_dim"}
    letters = dict(zip("M-*", names, strict=True))
    return {
        **{key: value for key, value in config.items() if key not in gone},
        "layers_block_type": [letters[letter] for letter in config["hybrid_override_pattern"]],
        "head_dim": 128,
        "dtype": "bfloat16",
        "n_routed_experts": 8,
        "mtp_layers_block_type": ["full_attention", "moe"],
        "num_nextn_predict_layers": 0,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    }
