"""config.json in both directions, and what transformers and older readers make of it."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_pretrain.compose import compose
from nano_pretrain.convert.config import CONSTANTS, hf_config, model_from_config, not_kept, read_config
from nano_pretrain.convert.names import hf_tensors
from nano_pretrain.plan.params import count_parameters
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.schema import ModelConfig, Recipe
from tests.convert.released import NAMES, RELEASED, in_the_new_spelling

RECIPES = sorted(path.stem for path in Path("recipes/recipe").glob("*.yaml"))
SMALL = ModelConfig(
    pattern="M-*-M",
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    mamba_num_heads=6,
    mamba_head_dim=8,
    mamba_num_groups=2,
    mamba_state_dim=16,
    vocab_size=512,
    init_std=0.02,
)


@cache
def named(name: str) -> Recipe:
    return compose([f"recipe={name}"]).recipe


def written(model: ModelConfig, directory: Path) -> Path:
    """A directory with its config.json."""
    config = hf_config(Recipe(model=model), max_position_embeddings=4096, torch_dtype="float32")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    groups, query_groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return ModelConfig(
        pattern=draw(st.text("M-*", min_size=1, max_size=6)),
        hidden_size=draw(st.integers(1, 100)),
        ffn_hidden_size=draw(st.integers(1, 100)),
        num_attention_heads=query_groups * draw(st.integers(1, 4)),
        num_query_groups=query_groups,
        head_dim=draw(st.integers(1, 40)),
        mamba_num_heads=groups * draw(st.integers(1, 4)),
        mamba_head_dim=draw(st.integers(1, 40)),
        mamba_num_groups=groups,
        mamba_state_dim=draw(st.integers(1, 40)),
        mamba_conv_width=draw(st.integers(2, 5)),
        vocab_size=draw(st.integers(512, 1030)),
        norm_epsilon=draw(st.floats(1e-12, 1.0)),
        init_std=draw(st.floats(1e-6, 1.0)),
    )


def peer_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the model that transformers builds from a config.json."""
    import torch
    from transformers import NemotronHConfig, NemotronHForCausalLM

    with torch.device("meta"):
        # Only drawing weights takes its logarithm.
        model = NemotronHForCausalLM(NemotronHConfig(**{**config, "time_step_min": 1e-30}))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@given(models())
def test_what_is_written_is_read(model: ModelConfig) -> None:
    config = hf_config(Recipe(model=model), max_position_embeddings=4096, torch_dtype="bfloat16")
    assert ModelConfig(**model_from_config(json.loads(json.dumps(config))), init_std=model.init_std) == model


@settings(max_examples=8)
@given(models())
def test_transformers_builds_the_tensors_of_the_table(model: ModelConfig) -> None:
    config = hf_config(Recipe(model=model), max_position_embeddings=4096, torch_dtype="bfloat16")
    # NVIDIA's prefix, which transformers renames while it loads.
    expected = {tensor.name.replace("backbone.", "model.", 1): tensor.shape for tensor in hf_tensors(model)}
    assert peer_shapes(config) == expected


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes(name: str) -> None:
    recipe = named(name)
    config = hf_config(recipe, max_position_embeddings=8192, torch_dtype="bfloat16")
    assert ModelConfig(**model_from_config(config), init_std=recipe.model.init_std) == recipe.model


def test_a_named_recipe_has_as_many_parameters_in_transformers() -> None:
    # d_inner is not twice the hidden size.
    recipe = named("nano_9b_v2")
    config = hf_config(recipe, max_position_embeddings=8192, torch_dtype="bfloat16")
    assert sum(map(math.prod, peer_shapes(config).values())) == count_parameters(recipe.model).total


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("spelling", ["remote code", *NAMES])
def test_released_models_are_the_named_recipes(name: str, spelling: str, tmp_path: Path) -> None:
    config = RELEASED[name]
    if spelling in NAMES:
        config = in_the_new_spelling(config, NAMES[spelling])
    (tmp_path / "config.json").write_text(json.dumps(config))
    fields = model_from_config(read_config(tmp_path))
    # 0.02 is what their config.json says, not what they were trained with.
    assert ModelConfig(**fields, init_std=named(name).model.init_std) == named(name).model


def test_transformers_reads_it_without_a_clamp(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torch import full, tensor
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = written(SMALL, tmp_path)
    weights = {tensor.name: full(tensor.shape, 0.01) for tensor in hf_tensors(SMALL)}
    # softplus(-12) is 6e-6, far below transformers' default of 0.001.
    weights["backbone.layers.0.mixer.dt_bias"] = full((6,), -12.0)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(directory)
    mixer = model.model.layers[0].mixer
    assert mixer.time_step_limit == (0.0, math.inf)
    assert mixer.dt_bias.tolist() == [-12.0] * 6
    assert model(tensor([[3, 4, 5]])).logits.isfinite().all()
    with pytest.raises(ValueError, match="math domain error"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))


def test_what_transformers_saves_again_is_read(tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.from_pretrained(written(SMALL, tmp_path)).save_pretrained(tmp_path / "again")
    config = read_config(tmp_path / "again")
    assert "layers_block_type" in config
    assert ModelConfig(**model_from_config(config), init_std=SMALL.init_std) == SMALL


def test_readers_whose_layer_types_are_a_property(tmp_path: Path) -> None:
    """The configuration classes of NVIDIA's remote code and of vLLM are like this one."""
    from transformers import PreTrainedConfig

    class OldConfig(PreTrainedConfig):  # type: ignore[misc]
        model_type = "nemotron_h"

        def __init__(self, num_hidden_layers: int = 52, hybrid_override_pattern: str = "M", **kwargs: Any) -> None:
            self.num_hidden_layers = num_hidden_layers
            self.hybrid_override_pattern = hybrid_override_pattern
            super().__init__(**kwargs)

        @property
        def layers_block_type(self) -> list[str]:
            return [{"M": "mamba", "-": "mlp", "*": "attention"}[letter] for letter in self.hybrid_override_pattern]

    config = read_config(written(SMALL, tmp_path))
    old = OldConfig.from_dict(config)
    assert old.layers_block_type == ["mamba", "mlp", "attention", "mlp", "mamba"]
    assert (old.num_hidden_layers, old.n_groups, old.conv_kernel, old.attention_head_dim) == (5, 2, 4, 16)
    with pytest.raises(AttributeError):
        OldConfig.from_dict({**config, "layers_block_type": old.layers_block_type})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mamba2"}, 'model_type="mamba2": only "nemotron_h"'),
        ({"architectures": ["NemotronHForSequenceClassification"]}, "architectures="),
        ({"rope_scaling": {"factor": 8}}, 'rope_scaling={"factor": 8}: not known'),
        ({"time_step_limit": [0.001, math.inf]}, "time_step_limit=[0.001, Infinity]: only [0.0, Infinity]"),
        ({"time_step_limit": [0.0, 0.1]}, "time_step_limit=[0.0, 0.1]"),
        ({"mamba_dt_limit": [1e-4, math.inf]}, "mamba_dt_limit=[0.0001, Infinity]: only"),
        ({"hybrid_override_pattern": "M-E*M"}, 'hybrid_override_pattern="E": layer 3'),
        ({"hybrid_override_pattern": None}, "hybrid_override_pattern: missing"),
        ({"hybrid_override_pattern": ""}, "it has no layer"),
        ({"hybrid_override_pattern": {"M": 1}}, "neither a pattern nor a list"),
        ({"layers_block_type": ["mamba", "moe"]}, 'layers_block_type="moe": layer 2'),
        ({"layers_block_type": ["mamba", "mlp"]}, 'layers_block_type="M-": hybrid_override_pattern says "M-*-M"'),
        ({"num_hidden_layers": 52}, "num_hidden_layers=52: the layers' types are 5"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1"),
        ({"attention_bias": True}, "attention_bias=true: only false"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"use_bias": True}, "use_bias=true"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias=true"),
        ({"use_conv_bias": False}, "use_conv_bias=false: only true"),
        ({"mamba_conv_bias": False}, "mamba_conv_bias=false: only true"),
        ({"sliding_window": 4096}, "sliding_window=4096: only null"),
        ({"mlp_hidden_act": "silu"}, 'mlp_hidden_act="silu": only "relu2"'),
        ({"mamba_hidden_act": "gelu"}, 'mamba_hidden_act="gelu": only "silu"'),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=true"),
        ({"residual_in_fp32": True}, "residual_in_fp32=true"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
        ({"attention_head_dim": 64}, "attention_head_dim=64: head_dim says 16"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06: layer_norm_epsilon says 1e-05"),
        ({"mamba_n_groups": 8}, "mamba_n_groups=8: n_groups says 2"),
        ({"n_groups": 4}, "n_groups=4: does not divide 6 Mamba-2 heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3: does not divide 4 heads"),
        ({"hidden_size": "32"}, 'hidden_size="32": not a whole number above 0'),
        ({"intermediate_size": [48, 64]}, "intermediate_size=[48, 64]: not a whole number"),
        ({"vocab_size": True}, "vocab_size=true: not a whole number"),
        ({"layer_norm_epsilon": 0.0, "rms_norm_eps": 0.0}, "layer_norm_epsilon=0.0: not a number above 0"),
        ({"id2label": {"0": "x" * 99}, "pruned_heads": {"0": "x" * 99}}, " ...: not known"),
    ],
)
def test_refusals_name_the_key(change: dict[str, Any], said: str) -> None:
    config = hf_config(Recipe(model=SMALL), max_position_embeddings=4096, torch_dtype="float32")
    assert model_from_config(config)
    with pytest.raises(UserError) as refused:
        model_from_config({**config, **change})
    message = str(refused.value)
    assert message.startswith("config.json: ")
    assert said in message
    assert "\n" not in message


def test_nothing_is_assumed_of_a_missing_key() -> None:
    config = hf_config(Recipe(model=SMALL), max_position_embeddings=4096, torch_dtype="float32")
    del config["head_dim"], config["attention_head_dim"]
    with pytest.raises(UserError, match="head_dim: missing"):
        model_from_config(config)


def test_constants_that_are_missing_are_what_transformers_takes_them_for() -> None:
    from transformers import NemotronHConfig

    config = hf_config(Recipe(model=SMALL), max_position_embeddings=4096, torch_dtype="float32")
    constants = {name: key.value for key in CONSTANTS for name in key.names if name != "model_type"}
    assert model_from_config({name: config[name] for name in config if name not in constants}) == model_from_config(
        config
    )
    theirs = NemotronHConfig()
    for name, value in constants.items():
        if hasattr(theirs, name) and name != "architectures":
            assert getattr(theirs, name) == (tuple(value) if isinstance(value, list) else value), name


def test_special_ids_that_an_import_does_not_keep_are_said() -> None:
    config = hf_config(Recipe(model=SMALL), max_position_embeddings=4096, torch_dtype="float32")
    assert not_kept(config) == not_kept({}) == not_kept({**config, "bos_token_id": None}) == []
    bos, eos = not_kept({**config, "eos_token_id": [2, 12], "bos_token_id": 3})
    assert "bos_token_id=3 is not kept" in bos
    assert eos == "config.json: eos_token_id=[2, 12] is not kept: documents end by 2"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is none"),
        (b"{", "cannot be read as JSON"),
        (b"\xff", "cannot be read"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_no_config(content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=said) as refused:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_tag_that_is_none_is_left(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": {"__float__": []}}')
    assert read_config(tmp_path) == {"model_type": {"__float__": []}}


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^hf\.path: .*file is no directory"):
        read_config(tmp_path / "file")
