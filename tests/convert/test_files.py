"""Files that a conversion cannot write: one line that names the path."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from nano_pretrain import verbs
from nano_pretrain.cli import STDOUT
from nano_pretrain.compose import compose
from nano_pretrain.convert.config import CONFIG_NAME, hf_config
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.schema import HfConfig, Recipe
from tests.convert.conversions import imported, random_tensors, write_hf


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes: what a full disk does, and a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Of a run that has imported its weights from tmp_path/hf."""
    made = compose(["model.pattern=M-M*-", "model.hidden_size=32", f"run.dir={tmp_path}", "run.name=run"]).recipe
    source = write_hf(tmp_path / "hf", random_tensors(made.model))
    config = hf_config(made, max_position_embeddings=64, torch_dtype="float32")
    (source / CONFIG_NAME).write_text(json.dumps(config))
    imported(made, source, tmp_path / "run")
    return made


def test_export_to_where_no_directory_can_be(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    asked = replace(recipe, hf=HfConfig(path=str(tmp_path / "file" / "x"), verify=False))
    with pytest.raises(UserError, match=r"file/.*: Not a directory; mend that"):
        verbs.export(asked, [])


def test_export_that_finds_no_room(recipe: Recipe, tmp_path: Path) -> None:
    asked = replace(recipe, hf=HfConfig(verify=False))
    with largest_file(10_000), pytest.raises(UserError, match=f"{tmp_path / 'run' / 'hf'}: File too large; mend that"):
        verbs.export(asked, [])


def test_import_that_finds_no_room(recipe: Recipe, tmp_path: Path) -> None:
    hf = HfConfig(path=str(tmp_path / "hf"), verify=False)
    asked = replace(recipe, hf=hf, run=replace(recipe.run, name="other"))
    with largest_file(10_000), pytest.raises(UserError, match=f"{tmp_path / 'other'}: File too large; mend that"):
        verbs.import_(asked, [])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", STDOUT), RuntimeError("shape")])
def test_what_is_no_file_of_the_conversion_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as found, verbs._files_named(Path("hf")):
        raise error
    assert found.value is error
