"""config.json of a Hugging Face checkpoint: written from a recipe and read into one, by one table of its keys.

Three programs read it, each its own way (their code as of 2026):

- transformers from 5.20 on: NemotronHConfig, without remote code.
- The remote code of NVIDIA's repositories, and vLLM, whose configuration class is descended from it.
- llama.cpp's and MLX's converters, which follow the remote code.

The length of a Mamba-2 time step. Nemotron-H is trained with dt = softplus(...) unclamped. `time_step_limit` is the
clamp of the remote code, whose default is (0, Infinity); vLLM and megatron-core never clamp. `time_step_min`,
`time_step_max` and `time_step_floor` are where `dt_bias` is drawn from before training, and released checkpoints have
0.001, 0.1 and 1e-4; transformers alone takes `time_step_min` for a clamp and ignores `time_step_limit`. Hence:

- written is `time_step_min` 0.0 and `time_step_limit` [0, Infinity]: no reader clamps. What transformers cannot do then
  is draw new weights (`from_config`, or a checkpoint without a `dt_bias`): it takes log(0), "math domain error".
- read is `time_step_limit`: anything but (0, Infinity) is refused. The three others are not, else nothing released
  could be read. A model that transformers itself has trained with `time_step_min` 0.001 cannot be told from a released
  one, and is run without its clamp.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano_pretrain.prepare.tokenizer import EOD_ID, SPECIAL_TOKENS
from nano_pretrain.recipe.derived import mamba_shape
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.schema import ModelConfig, Recipe

CONFIG_NAME = "config.json"
SPECIAL_IDS = {"bos_token_id": SPECIAL_TOKENS.index("<s>"), "eos_token_id": EOD_ID, "pad_token_id": 0}
"""Padding is <unk>, as in NVIDIA's checkpoints: no text has it, a byte-level tokenizer knows every word."""
_USES = {
    "bos_token_id": "nothing begins a document, and an export says",
    "eos_token_id": "documents end by",
    "pad_token_id": "an export says",
}


@dataclass(frozen=True)
class Key:
    """What config.json says under one or several names.

    Attributes:
        value: name of the field of `ModelConfig` that it is; of a constant what it must be.
        written: names it is written under, and read.
        read: other names it is read under.
    """

    value: Any
    written: tuple[str, ...] = ()
    read: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All."""
        return self.written + self.read


# `layers_block_type` is not written beside the pattern: in vLLM's class and in the remote code it is a property without
# a setter, on which loading fails ("can't set attribute"); transformers makes it from the pattern by itself.
PATTERN = Key("pattern", ("hybrid_override_pattern",), ("layers_block_type", "layer_types"))
WHOLE_NUMBERS = (
    Key("hidden_size", ("hidden_size",)),
    Key("ffn_hidden_size", ("intermediate_size",)),
    Key("num_attention_heads", ("num_attention_heads",)),
    Key("num_query_groups", ("num_key_value_heads",)),
    # Nemotron-H has the second, Nano v2 the first; transformers knows the first only, vLLM knew the second only.
    Key("head_dim", ("head_dim", "attention_head_dim")),
    Key("mamba_num_heads", ("mamba_num_heads",)),
    Key("mamba_head_dim", ("mamba_head_dim",)),
    Key("mamba_num_groups", ("n_groups",), ("mamba_n_groups",)),
    Key("mamba_state_dim", ("ssm_state_size",)),
    Key("mamba_conv_width", ("conv_kernel",), ("mamba_d_conv",)),
    Key("vocab_size", ("vocab_size",)),
)
EPSILON = Key("norm_epsilon", ("layer_norm_epsilon", "rms_norm_eps"), ("norm_eps",))
INIT_STD = Key("init_std", ("initializer_range",))
CONSTANTS = (
    Key("nemotron_h", ("model_type",)),
    Key(["NemotronHForCausalLM"], ("architectures",)),
    Key("relu2", ("mlp_hidden_act",)),
    Key("silu", ("mamba_hidden_act",)),
    Key(False, ("tie_word_embeddings",)),
    Key(False, ("attention_bias",)),
    Key(False, ("mlp_bias",)),
    Key(False, ("use_bias",)),
    Key(False, ("mamba_proj_bias",)),
    Key(True, ("use_conv_bias",), ("mamba_conv_bias",)),
    Key(False, ("residual_in_fp32",)),
    Key(0.0, ("attention_dropout",)),
    Key(0.0, ("hidden_dropout",)),
    Key(None, ("sliding_window",)),
    # Written as the token Infinity, like the released ones: Python's json reads it, and with it every reader above. The
    # tagged object that transformers 5 writes is a dict to transformers 4; a finite number would be a clamp.
    Key([0.0, math.inf], ("time_step_limit",), ("mamba_dt_limit",)),
    Key(0, (), ("num_nextn_predict_layers",)),
    Key(None, (), ("quantization_config",)),
)
IRRELEVANT = {
    "auto_map", "transformers_version", "_name_or_path", "name_or_path", "dtype", "torch_dtype",
    "_attn_implementation_autoset",
    "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "rope_theta", "partial_rotary_factor",
    "use_cache", "num_logits_to_keep", "return_dict", "output_hidden_states", "output_attentions",
    "is_encoder_decoder",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "torchscript",
    "chunk_size", "mamba_chunk_size", "expand", "mamba_expand", "use_mamba_kernels", "mamba_ssm_cache_dtype",
    "time_step_min", "time_step_max", "time_step_floor", "mamba_dt_min", "mamba_dt_max", "mamba_dt_init_floor",
    "rescale_prenorm_residual",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size", "moe_shared_expert_overlap", "routed_scaling_factor", "n_group", "topk_group",
    "norm_topk_prob",
    "output_router_logits", "mtp_layers_block_type", "mtp_hybrid_override_pattern",
}  # fmt: skip
"""Do not change a dense model's numbers: the attention has no positions whatever the rotary keys say, d_inner is heads
x head dimension whatever `expand` says (the 9B: 2 for 2.29), chunks are the kernel's, time_step_min and the like draw
the first weights, and experts and multi-token prediction need layers that are refused. Remote code (`auto_map`) is
never run."""
LETTERS = {"mamba": "M", "linear_attention": "M", "mlp": "-", "attention": "*", "full_attention": "*"}
"""Names of layer types in `layers_block_type`: transformers before 5.20 and from then on."""

_FIELDS = (PATTERN, *WHOLE_NUMBERS, EPSILON, INIT_STD)
_KNOWN = IRRELEVANT.union(("num_hidden_layers",), *(key.names for key in (*_FIELDS, *CONSTANTS)))


def hf_config(recipe: Recipe, *, max_position_embeddings: int, torch_dtype: str) -> dict[str, Any]:
    """The content of config.json.

    Args:
        recipe: of the model.
        max_position_embeddings: tokens of the longest sample that it was trained on; nothing but a number for servers.
        torch_dtype: of the weights, for example "bfloat16".
    """
    model = recipe.model
    return {
        **{name: key.value for key in CONSTANTS for name in key.written},
        **{name: getattr(model, key.value) for key in _FIELDS for name in key.written},
        **SPECIAL_IDS,
        "num_hidden_layers": len(model.pattern),
        "max_position_embeddings": max_position_embeddings,
        # The first is what transformers 5 reads, the second what all before it and TensorRT-LLM read.
        "dtype": torch_dtype,
        "torch_dtype": torch_dtype,
        # A whole number to every reader, and used by none: like NVIDIA's, not exact where d_inner is no multiple.
        "expand": max(1, round(mamba_shape(model).inner / model.hidden_size)),
        "chunk_size": 128,
        "mamba_ssm_cache_dtype": "float32",
        "time_step_min": 0.0,
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        "rescale_prenorm_residual": True,
        "num_logits_to_keep": 1,
        "use_cache": True,
        "use_mamba_kernels": True,
    }


def read_config(directory: Path) -> dict[str, Any]:
    """What the config.json of a checkpoint says.

    Raises:
        UserError: it is missing or not a JSON object.
    """
    path = directory / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_hook=_untagged)
    except FileNotFoundError:
        raise UserError(f"{path}: there is none; name the directory of a Hugging Face checkpoint") from None
    except NotADirectoryError:
        raise UserError(f"hf.path: {directory} is no directory; name that of a Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: is not a JSON object; fetch it again")
    return config


def model_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `ModelConfig` that a config.json says, by field.

    Args:
        config: its content.

    Returns:
        All fields but `init_std`: `initializer_range`, 0.02 in NVIDIA's, is not what they were trained with.

    Raises:
        UserError: it has a key that is not known, or one whose value no recipe can say; the message names it.
    """
    if config.get("model_type") != "nemotron_h":
        raise _refusal("model_type", config.get("model_type"), 'only "nemotron_h" can be imported')
    for key in CONSTANTS:
        for name in key.names:
            if name in config and config[name] != key.value:
                raise _refusal(name, config[name], f"only {_json(key.value)} can be imported")
    for name in config:
        if name not in _KNOWN:
            raise _refusal(name, config[name], "not known; remove it if the model computes the same without it")
    fields: dict[str, Any] = {
        "pattern": _pattern(config),
        **{key.value: _whole_number(config, key) for key in WHOLE_NUMBERS},
        "norm_epsilon": _positive(config, EPSILON),
    }
    _check_heads(ModelConfig(**fields))
    return fields


def not_kept(config: Mapping[str, Any]) -> list[str]:
    """A line for each special id of a config.json that is not ours, which alone are trained with and exported."""
    said = {name: config[name] for name in SPECIAL_IDS if config.get(name) is not None}
    return [
        f"{CONFIG_NAME}: {name}={_json(value)} is not kept: {_USES[name]} {SPECIAL_IDS[name]}"
        for name, value in said.items()
        if value != SPECIAL_IDS[name]
    ]


def _pattern(config: Mapping[str, Any]) -> str:
    found = {name: _letters(name, config[name]) for name in PATTERN.names if config.get(name) is not None}
    pattern: str = _only(PATTERN, found)
    layers = config.get("num_hidden_layers")
    if layers is not None and layers != len(pattern):
        raise _refusal("num_hidden_layers", layers, f"the layers' types are {len(pattern)}; correct one of them")
    return pattern


def _letters(name: str, layers: Any) -> str:
    """A pattern as it is, a list of names as a pattern."""
    if not isinstance(layers, (list, str)):
        raise _refusal(name, layers, "neither a pattern nor a list of layers' types")
    if isinstance(layers, list):
        letters = [LETTERS.get(str(layer), "") for layer in layers]
    else:
        letters = [letter if letter in LETTERS.values() else "" for letter in layers]
    if not letters:
        raise _refusal(name, layers, "it has no layer")
    if "" in letters:
        wrong = letters.index("")
        raise _refusal(name, layers[wrong], f"layer {wrong + 1} is neither Mamba-2 nor feed-forward nor attention")
    return "".join(letters)


def _whole_number(config: Mapping[str, Any], key: Key) -> int:
    value = _only(key, config)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refusal(key.names[0], value, "not a whole number above 0")
    return value


def _positive(config: Mapping[str, Any], key: Key) -> float:
    value = _only(key, config)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise _refusal(key.names[0], value, "not a number above 0")
    return float(value)


def _only(key: Key, config: Mapping[str, Any]) -> Any:
    """What a field is, which may be said under several names."""
    said = [name for name in key.names if name in config]
    if not said:
        raise UserError(f"{CONFIG_NAME}: {key.names[0]}: missing; add it, nothing is assumed")
    for name in said[1:]:
        if config[name] != config[said[0]]:
            raise _refusal(name, config[name], f"{said[0]} says {_json(config[said[0]])}; correct one of them")
    return config[said[0]]


def _check_heads(model: ModelConfig) -> None:
    if "*" in model.pattern and model.num_attention_heads % model.num_query_groups:
        raise _refusal(
            "num_key_value_heads", model.num_query_groups, f"does not divide {model.num_attention_heads} heads"
        )
    if "M" in model.pattern and model.mamba_num_heads % model.mamba_num_groups:
        raise _refusal("n_groups", model.mamba_num_groups, f"does not divide {model.mamba_num_heads} Mamba-2 heads")


def _untagged(content: dict[str, Any]) -> Any:
    """What transformers 5 writes for a number that JSON does not have: {"__float__": "Infinity"}."""
    tag = content.get("__float__")
    return float(tag) if len(content) == 1 and tag in ("Infinity", "-Infinity", "NaN") else content


def _refusal(name: str, value: Any, why: str) -> UserError:
    return UserError(f"{CONFIG_NAME}: {name}={_json(value)}: {why}")


def _json(value: Any) -> str:
    """As it is written in the file, long values cut."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."
