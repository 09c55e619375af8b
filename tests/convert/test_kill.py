"""Conversions that are killed by SIGKILL at chosen places, begun again, or meet another one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from nano_pretrain.convert import native_writer
from nano_pretrain.convert.work import Work
from nano_pretrain.recipe.errors import UserError
from tests.convert.conversions import assert_equal, exported, imported, random_tensors, tensors_of, write_hf
from tests.model.recipes import small_recipe

RECIPE = small_recipe(hidden_size=96, ffn_hidden_size=512, pattern="M-M-*-M-M-*-")
CALLS = {
    "while a file is written": (os, "fsync", False),
    "before a file is noted": (Work, "add", False),
    "after a file is noted": (Work, "add", True),
}
"""Whose call the process is killed at, and whether after it."""
FIFTH = 5


def die_at(owner: object, name: str, after: bool, count: int) -> None:
    """Make the call of this number the process' last."""
    original, left = getattr(owner, name), iter(range(count - 1, -1, -1))

    def dying(*arguments: object, **named: object) -> object:
        last = next(left) == 0
        if last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = original(*arguments, **named)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, dying)


def killed(work: Callable[[], object], owner: object, name: str, after: bool, count: int = FIFTH) -> None:
    """Run it in a process that dies of SIGKILL."""

    def run() -> None:
        die_at(owner, name, after, count)
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def files(directory: Path) -> dict[str, bytes]:
    """Content of each file of weights."""
    weights = [*directory.glob("*.safetensors"), *directory.glob("*.distcp")]
    return {path.name: path.read_bytes() for path in weights}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that makes more than five files in either direction."""
    monkeypatch.setattr(native_writer, "FILE_BYTES", 200_000)
    return write_hf(tmp_path / "from", random_tensors(RECIPE.model))


def split_export(checkpoint: Path, to: Path) -> Path:
    return exported(RECIPE, checkpoint, to, file_gigabytes=2e-4)


@pytest.mark.parametrize("place", CALLS)
def test_import_goes_on_with_the_next_file(source: Path, tmp_path: Path, place: str) -> None:
    whole = imported(RECIPE, source, tmp_path / "whole")
    killed(lambda: imported(RECIPE, source, tmp_path / "run"), *CALLS[place])
    left = tmp_path / "run" / "checkpoints" / ".converting-0"
    written = {path.name: path.stat().st_mtime_ns for path in left.glob("*.distcp")}
    assert len(written) >= FIFTH - 1
    assert not (tmp_path / "run" / "checkpoints" / "0").exists()
    again = imported(RECIPE, source, tmp_path / "run")
    assert files(again) == files(whole)
    kept = [name for name, time in written.items() if (again / name).stat().st_mtime_ns == time]
    assert len(kept) == FIFTH - (place != "after a file is noted")


@pytest.mark.parametrize("place", CALLS)
def test_export_goes_on_with_the_next_file(source: Path, tmp_path: Path, place: str) -> None:
    checkpoint = imported(RECIPE, source, tmp_path / "run")
    whole = split_export(checkpoint, tmp_path / "whole")
    killed(lambda: split_export(checkpoint, tmp_path / "hf"), *CALLS[place])
    assert not (tmp_path / "hf").exists()
    again = split_export(checkpoint, tmp_path / "hf")
    assert files(again) == files(whole)
    assert_equal(tensors_of(again), random_tensors(RECIPE.model))
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.parametrize(("count", "after"), [(1, False), (1, True), (2, True)])
def test_killed_while_an_export_takes_the_place_of_another(
    source: Path, tmp_path: Path, count: int, after: bool
) -> None:
    """Before, between and after the two renames."""
    checkpoint = imported(RECIPE, source, tmp_path / "run")
    exported(RECIPE, checkpoint, tmp_path / "hf", dtype="bf16")

    def newer() -> Path:
        return exported(RECIPE, checkpoint, tmp_path / "hf")

    killed(newer, Path, "rename", after, count)
    assert_equal(tensors_of(newer()), random_tensors(RECIPE.model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from", "hf", "run"]


def test_other_options_begin_again(source: Path, tmp_path: Path) -> None:
    checkpoint = imported(RECIPE, source, tmp_path / "run")
    killed(lambda: split_export(checkpoint, tmp_path / "hf"), Work, "add", True)
    rounded = {name: tensor.bfloat16() for name, tensor in random_tensors(RECIPE.model).items()}
    assert_equal(tensors_of(exported(RECIPE, checkpoint, tmp_path / "hf", dtype="bf16")), rounded)
    assert [path.name for path in (tmp_path / "hf").glob("*.safetensors")] == ["model.safetensors"]


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    held = Work(tmp_path / "hf", {})
    with pytest.raises(UserError, match="another conversion is at work there"):
        Work(tmp_path / "hf", {})
    held.publish()
    Work(tmp_path / "hf", {})
