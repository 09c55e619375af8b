"""The commands of the README and of the docs are valid, and their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from nano_pretrain.cli import OPTIONS, VERBS
from nano_pretrain.compose import compose, compose_sweep
from nano_pretrain.data.course import step_batches
from nano_pretrain.recipe.load import tree
from nano_pretrain.recipe.rules_ranks import check_batches

ROOT = tree("recipes").parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:nano-pretrain|make) [^`\n]+)`")


def commands(program: str) -> list[tuple[str, list[str]]]:
    """Page and words of every command of a program, in code blocks and in the text."""
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = [line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
        for line in [*blocks, *INLINE.findall(text)]:
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and words[0].rpartition("/")[2] == program:
                found.append((page.name, words[1:]))
    return found


NANO = commands("nano-pretrain")
MAKE = commands("make")


@pytest.mark.parametrize(("page", "words"), NANO, ids=[" ".join([page, *words]) for page, words in NANO])
def test_command_composes(page: str, words: list[str]) -> None:
    verb, *arguments = words
    if verb.startswith("-") or verb == "VERB":
        return
    assert verb in VERBS
    options = [argument for argument in arguments if argument.startswith("-")]
    assert set(options) <= set(OPTIONS)
    overrides = [argument for argument in arguments if argument not in options and argument not in ("job", "...")]
    if "--multirun" in options:
        assert len(compose_sweep(overrides)) > 1
    else:
        compose(overrides)


def test_growing_batches_go_on_the_ranks_that_are_named() -> None:
    ramped = [words[1:] for _, words in NANO if any(".batch_ramp=" in word for word in words)]
    assert ramped
    for overrides in ramped:
        recipe = compose(overrides).recipe
        for name, stage in recipe.stages.items():
            check_batches(recipe, name, step_batches(name, stage))


def test_readme_shows_every_verb() -> None:
    shown = {words[0] for page, words in NANO if page == "README.md"}
    assert set(VERBS) <= shown


@pytest.mark.parametrize(("page", "words"), MAKE, ids=[" ".join([page, *words]) for page, words in MAKE])
def test_make_target_exists(page: str, words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert next(word for word in words if "=" not in word) in targets


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:nano_pretrain|recipes|data_blend|tests|benchmarks)/[\w./-]+)`", page.read_text()):
        assert (ROOT / name).exists(), name


def test_recipes_of_the_docs_exist() -> None:
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE)
    known = {path.stem for path in (ROOT / "recipes" / "recipe").glob("*.yaml")}
    assert set(table) == known


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: str(path.name))
def test_recipe_files_are_yaml_with_a_comment(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)
