"""Hugging Face -> native -> Hugging Face, bit for bit, and what stands in the way of it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from nano_pretrain.checkpoint.manifest import read_manifest
from nano_pretrain.convert import assemble, native_writer
from nano_pretrain.convert.names import hf_tensors, native_tensors
from nano_pretrain.convert.native import open_checkpoint
from nano_pretrain.recipe.derived import padded_vocab_size
from nano_pretrain.recipe.errors import UserError
from tests.convert.conversions import assert_equal, exported, imported, random_tensors, tensors_of, write_hf
from tests.model.recipes import small_recipe
from tests.peers.shapes import Shape, any_shape

RECIPE = small_recipe()


@given(any_shape())
@settings(max_examples=15)
def test_every_tensor_comes_back_bit_for_bit(shape: Shape) -> None:
    recipe, tensors = shape.recipe(), random_tensors(shape.model)
    with tempfile.TemporaryDirectory() as directory:
        there = imported(recipe, write_hf(Path(directory) / "from", tensors), Path(directory) / "run")
        back = exported(recipe, there, Path(directory) / "to", dtype="stored")
        assert_equal(tensors_of(back), tensors)


@given(any_shape())
def test_table_covers_every_row_once_in_both_directions(shape: Shape) -> None:
    ours, theirs = native_tensors(shape.model), hf_tensors(shape.model)
    rows = {target.name: target.shape[0] for target in [*ours, *theirs]}
    padding = padded_vocab_size(shape.model) - shape.model.vocab_size
    for targets, uncovered in ((theirs, 0), (ours, 2 * padding)):
        read = {(part.source, part.source_start + n) for t in targets for part in t.parts for n in range(part.count)}
        made = {(t.name, part.start + n) for t in targets for part in t.parts for n in range(part.count)}
        assert len(read) == len(made) == sum(part.count for t in targets for part in t.parts)
        assert len(made) == sum(rows[t.name] for t in targets) - uncovered


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_are_kept_or_changed_as_asked(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = random_tensors(RECIPE.model, dtype)
    there = imported(RECIPE, write_hf(tmp_path / "from", tensors), tmp_path / "run")
    assert_equal(tensors_of(exported(RECIPE, there, tmp_path / "a", dtype="stored")), tensors)
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert_equal(tensors_of(exported(RECIPE, there, tmp_path / "b", dtype="bf16")), rounded)
    exact = {name: tensor.float() for name, tensor in tensors.items()}
    assert_equal(tensors_of(exported(RECIPE, there, tmp_path / "c", dtype="fp32")), exact)


def test_blocks_of_any_size_and_files_of_any_number_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = random_tensors(RECIPE.model)
    source = write_hf(tmp_path / "from", tensors)
    monkeypatch.setattr(assemble, "BLOCK_BYTES", 500)
    monkeypatch.setattr(native_writer, "FILE_BYTES", 20_000)
    there = imported(RECIPE, source, tmp_path / "run")
    assert len(list(there.glob("*.distcp"))) > 3
    back = exported(RECIPE, there, tmp_path / "to", file_gigabytes=5e-5)
    assert len(list(back.glob("*.safetensors"))) > 2
    assert_equal(tensors_of(back), tensors)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    # What was written in several files is read as well.
    again = imported(RECIPE, back, tmp_path / "again")
    assert_equal(tensors_of(exported(RECIPE, again, tmp_path / "third")), tensors)


def test_names_of_newer_transformers_are_read(tmp_path: Path) -> None:
    tensors = random_tensors(RECIPE.model)
    renamed = {name.replace("backbone.", "model."): tensor for name, tensor in tensors.items()}
    there = imported(RECIPE, write_hf(tmp_path / "from", renamed), tmp_path / "run")
    assert_equal(tensors_of(exported(RECIPE, there, tmp_path / "to")), tensors)


def test_padding_of_the_vocabulary_is_zero(tmp_path: Path) -> None:
    there = imported(RECIPE, write_hf(tmp_path / "from", random_tensors(RECIPE.model)), tmp_path / "run")
    reader = open_checkpoint(there, RECIPE.model)
    vocabulary, padded = RECIPE.model.vocab_size, padded_vocab_size(RECIPE.model)
    assert padded > vocabulary
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert not reader.rows(name, vocabulary, padded - vocabulary).any()
        assert reader.rows(name, vocabulary - 1, 1).any()


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "dtype"])
def test_other_tensors_are_refused_by_name(tmp_path: Path, change: str) -> None:
    tensors = random_tensors(RECIPE.model)
    name = "backbone.layers.0.mixer.dt_bias"
    if change == "missing":
        del tensors[name]
    elif change == "unknown":
        tensors[name := "backbone.layers.0.mixer.in_proj.bias"] = torch.zeros(3)
    else:
        tensors[name] = torch.zeros(9) if change == "shape" else tensors[name].double()
    with pytest.raises(UserError, match=name):
        imported(RECIPE, write_hf(tmp_path / "from", tensors), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, which is never loaded"):
        imported(RECIPE, tmp_path, tmp_path / "run")


def test_a_run_that_has_begun_is_not_written_over(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "from", random_tensors(RECIPE.model))
    imported(RECIPE, source, tmp_path / "run")
    with pytest.raises(UserError, match=r"run\.name: .*checkpoints/0 is there already"):
        imported(RECIPE, source, tmp_path / "run")


def test_what_is_no_export_is_not_written_over(tmp_path: Path) -> None:
    there = imported(RECIPE, write_hf(tmp_path / "from", random_tensors(RECIPE.model)), tmp_path / "run")
    with pytest.raises(UserError, match=r"hf\.path: .*is there and no export of ours"):
        exported(RECIPE, there, tmp_path / "from")


def test_an_export_is_replaced_by_a_newer_one(tmp_path: Path) -> None:
    for seed in (0, 1):
        tensors = random_tensors(RECIPE.model, seed=seed)
        there = imported(RECIPE, write_hf(tmp_path / f"from-{seed}", tensors), tmp_path / f"run-{seed}")
        back = exported(RECIPE, there, tmp_path / "hf")
        assert_equal(tensors_of(back), tensors)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


class TestDamage:
    """On either side, by a cut file and by a flipped bit."""

    def test_hf_file_is_named(self, tmp_path: Path) -> None:
        there = imported(RECIPE, write_hf(tmp_path / "from", random_tensors(RECIPE.model)), tmp_path / "run")
        back = exported(RECIPE, there, tmp_path / "to", file_gigabytes=5e-5)
        victim = sorted(back.glob("*.safetensors"))[1]
        _flip(victim)
        with pytest.raises(UserError, match=f"{victim.name}: damaged"):
            imported(RECIPE, back, tmp_path / "flipped")
        victim.write_bytes(victim.read_bytes()[:-1])
        with pytest.raises(UserError, match=f"{victim.name}: truncated"):
            imported(RECIPE, back, tmp_path / "cut")
        victim.unlink()
        with pytest.raises(UserError, match=f"{victim.name}: missing"):
            imported(RECIPE, back, tmp_path / "gone")

    @pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
    def test_native_file_is_named(self, tmp_path: Path, file: str) -> None:
        there = imported(RECIPE, write_hf(tmp_path / "from", random_tensors(RECIPE.model)), tmp_path / "run")
        _flip(there / file)
        with pytest.raises(UserError, match=f"{file}: damaged"):
            exported(RECIPE, there, tmp_path / "to")
        assert not (tmp_path / "to").exists()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_manifest_lists_every_file_with_its_checksum(tmp_path: Path) -> None:
    there = imported(RECIPE, write_hf(tmp_path / "from", random_tensors(RECIPE.model)), tmp_path / "run")
    manifest = read_manifest(there)
    assert manifest is not None
    assert manifest.weights_only
    assert sorted([*manifest.files, "manifest.json"]) == sorted(path.name for path in there.iterdir())
