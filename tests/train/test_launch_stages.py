"""`launch` goes on with a stage that needs other ranks, and stops where it was asked to, in whichever stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nano_pretrain import verbs
from nano_pretrain.launch import local
from nano_pretrain.recipe.schema import Recipe
from tests.corpora import write_corpus
from tests.model.recipes import small_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Two stages on the same ranks."""
    found = small_recipe(corpus=write_corpus(tmp_path / "corpus"))
    found.stages = {"a": found.stages["pretrain"], "b": replace(found.stages["pretrain"])}
    found.run.name, found.run.dir = "run", str(tmp_path)
    return found


def ends(directory: Path, monkeypatch: pytest.MonkeyPatch, answers: list[tuple[int, bool]]) -> Callable[[], int]:
    """Let each start of ranks end with a code and whether it asks for others; the function counts the starts."""
    left = list(answers)

    def start(*_: object, **__: object) -> int:
        code, restart = left.pop(0)
        directory.mkdir(exist_ok=True)
        (directory / "exit.json").write_text(json.dumps({"code": code, "restart": restart}))
        return code

    monkeypatch.setattr(local, "launch_local", start)
    return lambda: len(answers) - len(left)


@pytest.mark.parametrize(
    ("answers", "code", "starts"),
    [
        ([(75, False), (0, False)], 75, 1),
        ([(75, True), (0, False)], 0, 2),
        ([(75, True), (75, False), (0, False)], 75, 2),
        ([(1, False)], 1, 1),
        ([(2, True)], 2, 1),
    ],
)
def test_only_ranks_that_ask_for_others_are_followed_by_them(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answers: list[tuple[int, bool]],
    code: int,
    starts: int,
) -> None:
    started = ends(tmp_path / "run", monkeypatch, answers)
    assert verbs.launch(recipe, []) == code
    assert started() == starts
