"""Hugging Face -> native -> Hugging Face, bit for bit, and what stands in the way of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save_file

from nano_pretrain.checkpoint.manifest import MANIFEST, read_manifest
from nano_pretrain.convert import assemble, native_writer
from nano_pretrain.convert.hf_files import INDEX, SINGLE, HfReader
from nano_pretrain.convert.names import hf_tensors, native_tensors
from nano_pretrain.convert.native import open_checkpoint, present
from nano_pretrain.convert.work import JOURNAL, Work
from nano_pretrain.recipe.derived import padded_vocab_size
from nano_pretrain.recipe.errors import RunError, UserError
from nano_pretrain.recipe.schema import Recipe
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
    assert not (tmp_path / "run" / "checkpoints").exists()


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

    @pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "common.pt", "metadata.json"])
    def test_native_file_is_named(self, tmp_path: Path, file: str) -> None:
        there = imported(RECIPE, write_hf(tmp_path / "from", random_tensors(RECIPE.model)), tmp_path / "run")
        _flip(there / file)
        with pytest.raises(UserError, match=f"{file}: damaged"):
            exported(RECIPE, there, tmp_path / "to")
        assert not (tmp_path / "to").exists()

    @pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
    def test_manifest_without_a_file_is_named(self, tmp_path: Path, file: str) -> None:
        there = imported(RECIPE, write_hf(tmp_path / "from", random_tensors(RECIPE.model)), tmp_path / "run")
        content = json.loads((there / MANIFEST).read_text())
        del content["files"][file]
        (there / MANIFEST).write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"{MANIFEST}: damaged, it does not name {file}"):
            exported(RECIPE, there, tmp_path / "to")

    @pytest.mark.parametrize("opened", [False, True])
    def test_a_checkpoint_that_retention_removes_is_named(self, tmp_path: Path, opened: bool) -> None:
        there = imported(RECIPE, write_hf(tmp_path / "from", random_tensors(RECIPE.model)), tmp_path / "run")
        reader = open_checkpoint(there, RECIPE.model) if opened else None
        shutil.rmtree(there)
        with pytest.raises(UserError, match=rf"{there}: gone, .*checkpoint\.keep"), present(there):
            (reader or open_checkpoint(there, RECIPE.model)).rows("decoder.final_norm.weight", 0, 1)

    def test_what_else_fails_is_not_taken_for_it(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), present(tmp_path):
            _ = 1 / 0
        with pytest.raises(RunError, match="other weights"), present(tmp_path / "gone"):
            raise RunError("other weights")

    @pytest.mark.parametrize(
        "content",
        ["{", "[]", '{"identity": 1, "files": {"model.safetensors": {}}}', '{"identity": 1, "files": {"a": 3}}'],
    )
    def test_journal_is_named(self, tmp_path: Path, content: str) -> None:
        source = write_hf(tmp_path / "from", {})
        (source / JOURNAL).write_text(content)
        with pytest.raises(UserError, match=f"{JOURNAL}: damaged"):
            HfReader(source)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ('{"weight_map": {"a": "x\\u0000"}}', r"names 'x\\x00', which is not beside it"),
            ('{"weight_map": {"a": "\\ud800"}}', r"names '\\ud800', which is not beside it"),
            ("[" * 100_000, "damaged"),
        ],
    )
    def test_index_is_named(self, tmp_path: Path, content: str, said: str) -> None:
        (tmp_path / INDEX).write_text(content)
        with pytest.raises(UserError, match=f"{INDEX}: {said}"):
            HfReader(tmp_path)


class TestIndex:
    """Files and index that contradict each other, or themselves."""

    def reader(self, directory: Path, files: dict[str, list[str]], index: dict[str, str]) -> HfReader:
        """Of a checkpoint with one number for each tensor."""
        for file, names in files.items():
            save_file({name: torch.ones(1) for name in names}, directory / file)
        if index:
            (directory / INDEX).write_text(json.dumps({"weight_map": index}))
        return HfReader(directory)

    def test_one_tensor_under_both_prefixes(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"tensor (model|backbone)\.x is there twice, also as (model|backbone)\.x"):
            self.reader(tmp_path, {SINGLE: ["backbone.x", "model.x"]}, {})

    def test_one_tensor_in_two_files(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"b\.safetensors: tensor x is there twice"):
            self.reader(
                tmp_path,
                {"a.safetensors": ["x"], "b.safetensors": ["x", "y"]},
                {"x": "a.safetensors", "y": "b.safetensors"},
            )

    @pytest.mark.parametrize(
        ("said", "message"),
        [("a", r"a\.safetensors: has no tensor x"), ("b", r"a\.safetensors: has a tensor w, which the index does not")],
    )
    def test_a_tensor_is_in_another_file_than_said(self, tmp_path: Path, said: str, message: str) -> None:
        files = {"a.safetensors": ["v", "w"], "b.safetensors": ["x", "y"]}
        right = {name: file for file, names in files.items() for name in names}
        with pytest.raises(UserError, match=message):
            self.reader(tmp_path, files, {**right, {"a": "x", "b": "w"}[said]: f"{said}.safetensors"})

    def test_a_tensor_is_not_said_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"a\.safetensors: has a tensor y, which the index"):
            self.reader(tmp_path, {"a.safetensors": ["x", "y"]}, {"x": "a.safetensors"})


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


class TestWhatIsThere:
    """Nothing of the user's is written over, and what is said to be there is."""

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        return imported(RECIPE, write_hf(tmp_path / "from", random_tensors(RECIPE.model)), tmp_path / "run")

    def test_files_added_to_an_export_stop_the_next(self, checkpoint: Path, tmp_path: Path) -> None:
        hf = exported(RECIPE, checkpoint, tmp_path / "hf")
        (hf / "LICENSE").write_text("mine")
        with pytest.raises(UserError, match=r"hf\.path: .* holds LICENSE beside the export"):
            exported(RECIPE, checkpoint, hf, dtype="bf16")
        assert (hf / "LICENSE").read_text() == "mine"

    @pytest.mark.parametrize("place", ["checkpoints/0", "checkpoints/999", "checkpoints"])
    def test_checkpoints_are_no_place_for_an_export(self, checkpoint: Path, tmp_path: Path, place: str) -> None:
        before = sorted(checkpoint.iterdir())
        with pytest.raises(UserError, match="lies among the run's checkpoints"):
            exported(RECIPE, checkpoint, tmp_path / "run" / place)
        assert sorted(checkpoint.iterdir()) == before

    def test_an_imported_checkpoint_of_another_run_is_no_export(self, checkpoint: Path, tmp_path: Path) -> None:
        other = imported(RECIPE, tmp_path / "from", tmp_path / "other")
        with pytest.raises(UserError, match="is there and no export of ours"):
            exported(RECIPE, checkpoint, other)

    @pytest.mark.parametrize("file", ["config.json", "model.safetensors", "README.md"])
    def test_a_damaged_or_incomplete_export_is_made_again(self, checkpoint: Path, tmp_path: Path, file: str) -> None:
        hf = exported(RECIPE, checkpoint, tmp_path / "hf")
        content = (hf / file).read_bytes()
        _flip(hf / file)
        exported(RECIPE, checkpoint, hf)
        assert (hf / file).read_bytes() == content
        (hf / file).unlink()
        exported(RECIPE, checkpoint, hf)
        assert (hf / file).read_bytes() == content

    def test_a_link_leads_to_the_export(self, checkpoint: Path, tmp_path: Path) -> None:
        hf = exported(RECIPE, checkpoint, tmp_path / "hf")
        (tmp_path / "link").symlink_to(hf)
        exported(RECIPE, checkpoint, tmp_path / "link", dtype="bf16")
        assert (tmp_path / "link").is_symlink()
        assert all(tensor.dtype == torch.bfloat16 for tensor in tensors_of(hf).values())

    @pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl"])
    def test_a_run_that_has_begun_takes_no_import(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "begun").mkdir()
        (tmp_path / "begun" / name).write_text("mine")
        with pytest.raises(UserError, match=rf"run\.name: .*{name} is there already"):
            imported(RECIPE, write_hf(tmp_path / "from", random_tensors(RECIPE.model)), tmp_path / "begun")
        assert (tmp_path / "begun" / name).read_text() == "mine"

    def test_a_run_at_work_takes_no_import(self, tmp_path: Path) -> None:
        source = write_hf(tmp_path / "from", random_tensors(RECIPE.model))
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match="another trainer"):
                imported(RECIPE, source, tmp_path / "run")
            holder.kill()


HOLD = """
import sys
from pathlib import Path
from nano_pretrain.train.directory import only_trainer
with only_trainer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_an_import_for_another_model_begins_anew(tmp_path: Path) -> None:
    """Of the same shapes, with other heads: the rows go elsewhere."""
    other = small_recipe(num_attention_heads=8, num_query_groups=2, head_dim=5)
    tensors = random_tensors(other.model)
    source = write_hf(tmp_path / "from", tensors)
    regrouped = small_recipe(num_attention_heads=4, num_query_groups=1, head_dim=10)
    process = multiprocessing.get_context("fork").Process(target=_import_and_die, args=(regrouped, source, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    there = imported(other, source, tmp_path / "run")
    assert_equal(tensors_of(exported(other, there, tmp_path / "to")), tensors)


def _import_and_die(recipe: Recipe, source: Path, directory: Path) -> None:
    Work.publish = lambda self: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    imported(recipe, source, directory / "run")
