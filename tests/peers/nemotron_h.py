"""The same hybrid in Hugging Face transformers, and the names of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nano_pretrain.recipe.schema import ModelConfig

EMBEDDING, HEAD, FINAL_NORM = "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_norm.weight"

LAYER_NAMES = {
    "M": {
        "norm.weight": "norm.weight",
        **{
            f"mixer.{name}": f"mixer.{name}"
            for name in (
                *("in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D"),
                *("norm.weight", "out_proj.weight"),
            )
        },
    },
    "-": {
        "pre_mlp_layernorm.weight": "norm.weight",
        "mlp.linear_fc1.weight": "mixer.up_proj.weight",
        "mlp.linear_fc2.weight": "mixer.down_proj.weight",
    },
    "*": {"input_layernorm.weight": "norm.weight", "self_attention.linear_proj.weight": "mixer.o_proj.weight"},
}
"""Name in a layer -> name in a layer of transformers, where the tensors are equal."""


def peer(config: ModelConfig) -> Any:
    """A NemotronHForCausalLM of this shape, with weights of its own."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    return NemotronHForCausalLM(
        NemotronHConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            hybrid_override_pattern=config.pattern,
            intermediate_size=config.ffn_hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_query_groups,
            head_dim=config.head_dim,
            mamba_num_heads=config.mamba_num_heads,
            mamba_head_dim=config.mamba_head_dim,
            n_groups=config.mamba_num_groups,
            ssm_state_size=config.mamba_state_dim,
            conv_kernel=config.mamba_conv_width,
            layer_norm_epsilon=config.norm_epsilon,
            # transformers clamps the step size from below at this, whatever time_step_limit says; 0 fails in its
            # initialisation, which takes the logarithm.
            time_step_min=1e-30,
        )
    )


def peer_tensors(ours: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights, or their gradients, under transformers' names; rows of the vocabulary padding are left out.

    Raises:
        KeyError: a tensor has no place there.
    """
    left = dict(ours)
    found = {
        "model.embeddings.weight": left.pop(EMBEDDING)[: config.vocab_size],
        "lm_head.weight": left.pop(HEAD)[: config.vocab_size],
        "model.norm_f.weight": left.pop(FINAL_NORM),
    }
    for number, letter in enumerate(config.pattern):
        prefix, peer_prefix = f"decoder.layers.{number}.", f"model.layers.{number}."
        if letter == "*":
            for name, part in _query_key_value(left.pop(f"{prefix}self_attention.linear_qkv.weight"), config).items():
                found[f"{peer_prefix}mixer.{name}_proj.weight"] = part
        for name, peer_name in LAYER_NAMES[letter].items():
            found[peer_prefix + peer_name] = left.pop(prefix + name)
    if left:
        raise KeyError(f"no place for {sorted(left)}")
    return found


def _query_key_value(fused: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """megatron-core interleaves: for each group its query heads, its key, its value."""
    heads = config.num_attention_heads // config.num_query_groups
    by_group: Tensor = fused.unflatten(0, (config.num_query_groups, heads + 2, config.head_dim))
    parts = by_group.split([heads, 1, 1], 1)
    return {name: part.flatten(0, 2) for name, part in zip("qkv", parts, strict=True)}
