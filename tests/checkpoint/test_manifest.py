"""Which checkpoints of a run are whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_pretrain.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    all_checkpoints,
    check_history,
    damaged_files,
    file_entries,
    newest_tokens,
    read_manifest,
    whole_checkpoint,
    whole_checkpoints,
)
from nano_pretrain.recipe.acts import HISTORY, Act, written
from nano_pretrain.recipe.errors import UserError

FILES = {"__0_0.distcp": b"weights" * 20, "common.pt": b"x", "metadata.json": b"{}"}


def write(run: Path, tokens: int) -> Path:
    """A checkpoint with three files."""
    directory = run / "checkpoints" / str(tokens)
    directory.mkdir(parents=True)
    for name, content in FILES.items():
        (directory / name).write_bytes(content)
    Manifest(tokens, tokens // 8, {"tensor": 1}, {"torch": "2"}, "corpus", file_entries(directory, FILES)).write(
        directory
    )
    return directory


def test_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, 64))
    assert manifest is not None
    assert (manifest.tokens, manifest.step, manifest.corpus) == (64, 8, "corpus")
    assert {name: entry.size for name, entry in manifest.files.items()} == {n: len(c) for n, c in FILES.items()}


def told(run: Path, tokens: int, acts: int) -> None:
    """A checkpoint of a run that was told so many acts."""
    directory = write(run, tokens)
    manifest = read_manifest(directory)
    assert manifest is not None
    replace(manifest, acts=acts).write(directory)


def test_a_manifest_of_before_there_were_acts_is_read(tmp_path: Path) -> None:
    directory = write(tmp_path, 64)
    content = json.loads((directory / MANIFEST).read_text())
    del content["acts"]
    (directory / MANIFEST).write_text(json.dumps(content))
    manifest = read_manifest(directory)
    assert manifest is not None
    assert manifest.acts == 0
    check_history(tmp_path)


def test_a_history_with_fewer_acts_than_the_newest_checkpoint_knows_of_is_refused(tmp_path: Path) -> None:
    acts = [Act(tokens, "stages.s.global_batch_size", 1, 2) for tokens in (32, 64)]
    told(tmp_path, 64, 1)
    told(tmp_path, 128, 2)
    for there in (acts[:1], []):
        (tmp_path / HISTORY).write_text(written(there))
        with pytest.raises(
            UserError, match=rf"{HISTORY}: has {len(there)} of the 2 changes .* by 128 tokens; bring it"
        ):
            check_history(tmp_path)
    (tmp_path / HISTORY).write_text(written(acts))
    check_history(tmp_path)
    # The one before is gone on from if the newest is damaged: it was told less.
    shutil.rmtree(tmp_path / "checkpoints/128")
    check_history(tmp_path)


def test_newest_is_the_one_with_most_tokens_not_the_last_name(tmp_path: Path) -> None:
    for tokens in (8, 1024, 96):
        write(tmp_path, tokens)
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["1024", "96", "8"]
    assert newest_tokens(tmp_path) == 1024


def test_run_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert newest_tokens(tmp_path) is None


@pytest.mark.parametrize("name", [".writing-128", ".removing-128", "128.old", "tmp"])
def test_what_has_no_name_yet_does_not_count(tmp_path: Path, name: str) -> None:
    write(tmp_path, 64)
    write(tmp_path, 128).rename(tmp_path / "checkpoints" / name)
    assert [path.name for path in all_checkpoints(tmp_path)] == ["64"]


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_missing_file_is_not_whole(tmp_path: Path, name: str) -> None:
    write(tmp_path, 64)
    (write(tmp_path, 128) / name).unlink()
    assert newest_tokens(tmp_path) == 64
    assert len(all_checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("cut", [True, False])
def test_what_makes_a_checkpoint_not_whole_is_named(
    tmp_path: Path, name: str, cut: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, 128) / name
    if cut:
        file.write_bytes(file.read_bytes()[:-3])
    else:
        file.unlink()
    with pytest.raises(UserError, match=rf"no whole checkpoint, {file} (has|is missing)"):
        whole_checkpoint(tmp_path, None, "hf.checkpoint")
    older = write(tmp_path, 64)
    with pytest.raises(UserError, match=rf"at 128 tokens \({file} (has|is missing).*choose one of 64"):
        whole_checkpoint(tmp_path, 128, "hf.checkpoint")
    assert whole_checkpoint(tmp_path, 64, "hf.checkpoint") == older
    assert capsys.readouterr().err == ""
    assert whole_checkpoint(tmp_path, None, "hf.checkpoint") == older
    assert capsys.readouterr().err.startswith(f"{file.parent}: passed over, {file} ")


@given(name=st.sampled_from(sorted(FILES)), keep=st.floats(0, 0.99))
def test_file_of_another_length_is_not_whole(tmp_path_factory: pytest.TempPathFactory, name: str, keep: float) -> None:
    run = tmp_path_factory.mktemp("run")
    path = write(run, 64) / name
    path.write_bytes(path.read_bytes()[: int(keep * len(FILES[name]))])
    assert whole_checkpoints(run) == []


@given(cut=st.integers(0, 10_000))
def test_manifest_that_was_cut_anywhere_is_no_manifest(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    run = tmp_path_factory.mktemp("run")
    manifest = write(run, 64) / MANIFEST
    text = manifest.read_text().rstrip()
    manifest.write_text(text[: cut % len(text)])
    assert read_manifest(manifest.parent) is None
    assert newest_tokens(run) is None


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", '{"files": 3}', '{"files": {"a": {"size": 1}}}', '{"files": {}}']
)
def test_json_that_is_no_manifest_is_none(tmp_path: Path, content: str) -> None:
    directory = write(tmp_path, 64)
    (directory / MANIFEST).write_text(content)
    assert read_manifest(directory) is None


@given(name=st.sampled_from(sorted(FILES)), position=st.integers(0, 1000), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, name: str, position: int, bit: int) -> None:
    run = tmp_path_factory.mktemp("run")
    directory = write(run, 64)
    content = bytearray(FILES[name])
    content[position % len(content)] ^= 1 << bit
    (directory / name).write_bytes(content)
    manifest = read_manifest(directory)
    assert manifest is not None
    assert damaged_files(directory, manifest.files, manifest) == [name]
    assert newest_tokens(run) == 64, "content is verified when a checkpoint is loaded, not when it is listed"


def test_missing_file_counts_as_damaged(tmp_path: Path) -> None:
    directory = write(tmp_path, 64)
    manifest = read_manifest(directory)
    assert manifest is not None
    (directory / "common.pt").unlink()
    assert damaged_files(directory, manifest.files, manifest) == ["common.pt"]


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    directory = write(tmp_path, 64)
    manifest = read_manifest(directory)
    assert manifest is not None
    assert json.loads((directory / MANIFEST).read_text()) == asdict(manifest)


@pytest.mark.parametrize(("field", "value"), [("tokens", 65), ("tokens", "64"), ("tokens", "x"), ("step", None)])
def test_manifest_that_does_not_fit_its_checkpoint_does_not_count(tmp_path: Path, field: str, value: object) -> None:
    directory = write(tmp_path, 64)
    content = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps({**content, field: value}))
    assert newest_tokens(tmp_path) is None
