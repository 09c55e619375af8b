"""Verification of conversions: what is right passes, whole and layer by layer, and every mistake is named."""

from __future__ import annotations

import json
import math
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nano_pretrain.checkpoint.manifest import Manifest, file_entries
from nano_pretrain.convert import names, sides, verify, verify_whole
from nano_pretrain.convert.config import CONFIG_NAME, hf_config
from nano_pretrain.convert.export import export
from nano_pretrain.convert.hf_files import SINGLE, HfReader
from nano_pretrain.convert.importing import import_checkpoint
from nano_pretrain.convert.native import MAIN_WEIGHTS, open_checkpoint
from nano_pretrain.convert.sides import Sides
from nano_pretrain.convert.verify_layers import compare_layers
from nano_pretrain.convert.verify_whole import compare_logits
from nano_pretrain.convert.work import JOURNAL
from nano_pretrain.platform import versions
from nano_pretrain.recipe.errors import RunError, UserError
from nano_pretrain.recipe.schema import DataConfig, HfConfig
from tests import corpora
from tests.convert.conversions import TOKENS, exported, random_tensors, write_hf
from tests.model.recipes import small_recipe

RECIPE = small_recipe("bf16", pattern="M-M*-", mamba_num_heads=8, vocab_size=512)
"""Eight heads in two groups; four query heads in two groups."""

SMALL_STEP = -8.0
"""A dt_bias whose steps, about 3e-4, are less than 0.001, at which transformers' default would clamp them."""


def full(*values: Any) -> Any:
    """A case that is one of many like it."""
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(params=["layers", pytest.param("whole", marks=pytest.mark.full)])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to verify; the second as if memory were short."""
    if request.param == "layers":
        monkeypatch.setattr(verify, "_BYTES_PER_PARAMETER", 1 << 50)
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a BF16 model with the FP32 weights that it was rounded from, nothing in it that is one or zero."""
    from megatron.core import dist_checkpointing

    path = tmp_path_factory.mktemp("run") / "checkpoints" / str(TOKENS)
    path.mkdir(parents=True)
    with sides.alone(RECIPE) as platform:
        model = sides.our_model(RECIPE, platform, 8)
        _spread(model)
        parts = sides.shards(model)
        main = {name: replace(part, key=MAIN_WEIGHTS + name) for name, part in parts.items()}
        dist_checkpointing.save(
            {"main": main, "model": {name: _rounded(part) for name, part in parts.items()}}, str(path)
        )
    Manifest(TOKENS, 1, {}, {}, "", file_entries(path, [file.name for file in path.iterdir()])).write(path)
    return path


def _spread(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        if name.endswith("dt_bias"):
            parameter[::2] = SMALL_STEP


def _rounded(part: Any) -> Any:
    if part.key.endswith((".A_log", ".D", ".dt_bias")):
        return part
    return replace(part, data=part.data.bfloat16(), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def whole_export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = exported(RECIPE, checkpoint, tmp_path_factory.mktemp("hf") / "hf")
    # With it a changed file would be refused before it is compared.
    (directory / JOURNAL).unlink()
    return directory


@pytest.fixture
def hf(whole_export: Path, tmp_path: Path) -> Path:
    """An export in FP32 that a test may change."""
    return Path(shutil.copytree(whole_export, tmp_path / "hf"))


def export_of(checkpoint: Path, hf: Path) -> Sides:
    """An export to verify."""
    return Sides(RECIPE, HfReader(hf), open_checkpoint(checkpoint, RECIPE.model), checkpoint, exported=True)


class TestRight:
    @pytest.mark.parametrize("how", ["layers", "whole"], indirect=True)
    @pytest.mark.parametrize("dtype", ["stored", pytest.param("bf16", marks=pytest.mark.full)])
    def test_export_of_rounded_weights_passes(
        self, checkpoint: Path, tmp_path: Path, how: str, dtype: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = HfConfig(path=str(tmp_path / "hf"), dtype=dtype)
        export(RECIPE, options, checkpoint.parent.parent, checkpoint)
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("verified"))
        assert "32 tensors bit-equal" in line
        assert ("after loading" in line) == (how == "whole")

    @pytest.mark.parametrize("how", [pytest.param("layers", marks=pytest.mark.full), "whole"], indirect=True)
    def test_import_passes_whatever_clamp_transformers_makes_of_the_key(self, tmp_path: Path, how: str) -> None:
        tensors = random_tensors(RECIPE.model)
        for name, tensor in tensors.items():
            tensor.mul_(0.1)
            if name.endswith("dt_bias"):
                tensor.fill_(SMALL_STEP)
        source = write_hf(tmp_path / "from", tensors)
        written = hf_config(RECIPE, max_position_embeddings=64, torch_dtype="float32")
        (source / CONFIG_NAME).write_text(json.dumps({**written, "time_step_min": 0.001}))
        import_checkpoint(RECIPE, HfConfig(dtype="bf16"), source, tmp_path / "run")
        assert (tmp_path / "run" / "checkpoints" / "0").is_dir()

    def test_layers_one_at_a_time_find_what_whole_models_find(self, hf: Path, checkpoint: Path) -> None:
        both = export_of(checkpoint, hf)
        sample = torch.arange(100)
        layers, whole = compare_layers(both, sample, 1e-4), compare_logits(both, [sample])
        # The same logits but for the rounding of five layers.
        assert layers.largest == pytest.approx(whole.largest, rel=1e-5)
        # Rounding, and yet not one thing compared with itself.
        assert 0 < layers.layer < 1e-5
        assert 0 < whole.difference < 1e-5 * whole.largest

    def test_text_is_the_best_there_is(self, hf: Path, checkpoint: Path, tmp_path: Path) -> None:
        both = export_of(checkpoint, hf)
        assert verify._samples(both, (200, 256))[1] == "no text, but random ids"
        corpus = corpora.write_corpus(tmp_path / "corpus")
        shutil.copy(corpus / "tokenizer.json", hf)
        samples, text = verify._samples(both, (200, 256))
        assert text == "text"
        assert [len(sample) for sample in samples] == [200, 256]
        with_corpus = replace(both, recipe=replace(RECIPE, data=DataConfig(path=str(corpus))))
        assert verify._samples(with_corpus, (200, 256))[1] == "held-out text"


Change = Callable[[dict[str, Tensor]], str]
"""Changes the tensors of a file and returns the name of the first."""


def other_dt_bias(tensors: dict[str, Tensor]) -> str:
    tensors[name := "backbone.layers.2.mixer.dt_bias"].fill_(1.0)
    return name


def last_bit(tensors: dict[str, Tensor]) -> str:
    tensors[name := "lm_head.weight"].view(torch.int32)[-1, -1] ^= 1
    return name


def one_row_moved(tensors: dict[str, Tensor]) -> str:
    rows = tensors[name := "backbone.layers.3.mixer.q_proj.weight"]
    rows.copy_(rows.roll(1, 0))
    return name


@pytest.mark.parametrize("change", [other_dt_bias, last_bit, full(one_row_moved)])
def test_other_weights_are_named(hf: Path, checkpoint: Path, how: str, change: Change) -> None:
    tensors = load_file(hf / SINGLE)
    name = change(tensors)
    save_file(tensors, hf / SINGLE)
    with pytest.raises(RunError, match=rf"{name}\[.*in the Hugging Face model.*in the native"):
        verify.verify(export_of(checkpoint, hf))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    tensors = random_tensors(RECIPE.model, dtype)
    tensors[name := "backbone.layers.0.mixer.out_proj.weight"][3, 5] = value
    source = write_hf(tmp_path / "from", tensors)
    written = hf_config(RECIPE, max_position_embeddings=64, torch_dtype="float32")
    (source / CONFIG_NAME).write_text(json.dumps(written))
    with pytest.raises(RunError, match=rf"{name}\[3, 5\]: {value} is not finite"):
        import_checkpoint(RECIPE, HfConfig(), source, tmp_path / "run")


def test_weights_that_change_while_transformers_loads_them_are_named(
    hf: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = verify_whole._load

    def load_and_initialise(both: Sides) -> Any:
        model, report = load(both)
        model.model.layers[2].mixer.dt_bias.data.fill_(1.0)
        return model, report

    monkeypatch.setattr(verify_whole, "_load", load_and_initialise)
    with pytest.raises(RunError, match=r"backbone\.layers\.2\.mixer\.dt_bias\[0\]: 1 in"):
        verify.verify(export_of(checkpoint, hf))


Rows = list[tuple[str, int, int]]


def b_and_c_swapped(rows: Rows) -> Rows:
    z, x, b, c, dt = rows
    return [z, x, c, b, dt]


def groups_swapped(rows: Rows) -> Rows:
    return rows[::-1]


def value_for_key(rows: Rows) -> Rows:
    return [(source, start + count, count) for source, start, count in rows]


@pytest.mark.parametrize(
    ("tensor", "mistake", "layer"),
    [
        ("in_proj.weight", b_and_c_swapped, r"0 \(M\)"),
        ("q_proj.weight", groups_swapped, r"3 \(\*\)"),
        full("k_proj.weight", value_for_key, r"3 \(\*\)"),
    ],
)
def test_mistake_in_the_table_is_seen_though_both_sides_read_it(
    checkpoint: Path,
    tmp_path: Path,
    how: str,
    tensor: str,
    mistake: Callable[[Rows], Rows],
    layer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joined = names._joined

    def mistaken(name: str, rows: Rows, rest: tuple[int, ...]) -> names.Target:
        return joined(name, mistake(rows) if name.endswith(tensor) else rows, rest)

    monkeypatch.setattr(names, "_joined", mistaken)
    hf = exported(RECIPE, checkpoint, tmp_path / "hf")
    with pytest.raises(RunError, match=rf"backbone\.layers\.{layer}: from the same input"):
        verify.verify(export_of(checkpoint, hf))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"time_step_min": 0.001}, r"layers\.0 \(M\): from the same input"),
        ({"layer_norm_epsilon": 1e-6}, r"layers\.0 \(M\): from the same input"),
        # Tensors have the same shapes then.
        ({"n_groups": 1, "ssm_state_size": 12}, r"layers\.0 \(M\): from the same input"),
        full({"mlp_hidden_act": "silu"}, r"layers\.1 \(-\): from the same input"),
        ({"n_groups": 1}, r"layers\.0.*(in_proj|conv1d)"),
        full({"hybrid_override_pattern": "M-M-*"}, r"layers\.3"),
        ({"mamba_hidden_act": "nonsense"}, r"transformers does not load it, KeyError: 'nonsense'"),
    ],
)
def test_other_configuration_is_seen(hf: Path, checkpoint: Path, how: str, keys: dict[str, Any], named: str) -> None:
    path = hf / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    with pytest.raises(RunError, match=named):
        verify.verify(export_of(checkpoint, hf))


@pytest.mark.parametrize(("installed", "said"), [(None, "not installed"), ("4.57.1", "4.57.1 is installed")])
def test_transformers_is_asked_for_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: str | None, said: str
) -> None:
    monkeypatch.setattr(versions, "_installed", lambda _: installed)
    with pytest.raises(UserError, match=rf"hf\.verify: transformers: {said}.*pip install.*hf\.verify=false"):
        export(RECIPE, HfConfig(path=str(tmp_path / "hf")), checkpoint.parent.parent, checkpoint)
    assert list(tmp_path.iterdir()) == []
