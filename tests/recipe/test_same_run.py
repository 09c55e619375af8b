"""What a run that is continued may change, for every field of the schema."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_pretrain.compose import compose
from nano_pretrain.recipe.acts import continuation
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.load import recorded_recipe, to_yaml
from nano_pretrain.recipe.schema import ParallelConfig, Recipe, Resume

TINY = compose([]).recipe
LONG = compose(["recipe=nano_12b_v2"]).recipe


def unchanged(recipe: Recipe, directory: Path) -> None:
    """Go on with a run by a command that names nothing."""
    assert not continuation(recipe, [], directory, 0).told


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Resume]]:
    """Dotted name and resume class of every plain field."""
    for item in fields(node):
        value, name = getattr(node, item.name), prefix + item.name
        if is_dataclass(value):
            yield from leaves(value, f"{name}.")
        elif isinstance(value, dict) and value and all(map(is_dataclass, value.values())):
            for key, part in value.items():
                yield from leaves(part, f"{name}.{key}.")
        else:
            yield name, item.metadata["resume"]


def changed(recipe: Recipe, field: str) -> Recipe:
    """A copy with another value in one field."""
    other = copy.deepcopy(recipe)
    *path, last = field.split(".")
    node: Any = other
    for part in path:
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    setattr(node, last, another(getattr(node, last)))
    return other


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return f"{value}-"
    if isinstance(value, dict):
        return {**value, "another": 1.0}
    return [*value, "another"] if isinstance(value, list) else 1


def recorded(directory: Path, recipe: Recipe) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "recipe.yaml").write_text(to_yaml(recipe))
    return directory


CASES = [(TINY, *leaf) for leaf in leaves(TINY)] + [(LONG, *leaf) for leaf in leaves(LONG) if "long_context" in leaf[0]]
REFUSED = [(recipe, field) for recipe, field, resume in CASES if resume != Resume.FREE]
TAKEN = [(recipe, field) for recipe, field, resume in CASES if resume == Resume.FREE]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A run of each recipe, by the recipe's id."""
    return {id(recipe): recorded(tmp_path_factory.mktemp("run"), recipe) for recipe in (TINY, LONG)}


@pytest.mark.parametrize(("recipe", "field"), REFUSED, ids=[field for _, field in REFUSED])
def test_field_that_is_not_free_is_named(runs: dict[int, Path], recipe: Recipe, field: str) -> None:
    with pytest.raises(UserError) as caught:
        unchanged(changed(recipe, field), runs[id(recipe)])
    message = str(caught.value)
    assert message.startswith(f"{field}: ")
    assert f"write {field}=" in message
    assert "choose another run.name" in message


@pytest.mark.parametrize(("recipe", "field"), TAKEN, ids=[field for _, field in TAKEN])
def test_free_field_may_change(runs: dict[int, Path], recipe: Recipe, field: str) -> None:
    unchanged(changed(recipe, field), runs[id(recipe)])


@pytest.mark.parametrize("name", ["tiny", "nano_12b_v2", "nano_12b_v2_thin"])
def test_recipe_is_the_same_after_its_file(tmp_path: Path, name: str) -> None:
    recipe = compose([f"recipe={name}", "run.name=x"]).recipe
    unchanged(recipe, recorded(tmp_path, recipe))
    assert recorded_recipe(tmp_path) == recipe


@given(
    pattern=st.text("M-*", min_size=1, max_size=12),
    lr=st.floats(1e-12, 1e3),
    weights=st.dictionaries(st.text("aeno01_~", min_size=1, max_size=6), st.floats(0, 1e6), min_size=1, max_size=4),
)
def test_any_value_is_the_same_after_its_file(
    tmp_path_factory: pytest.TempPathFactory, pattern: str, lr: float, weights: dict[str, float]
) -> None:
    recipe = copy.deepcopy(TINY)
    recipe.model.pattern = pattern
    recipe.stages["pretrain"].schedule.lr = lr
    recipe.stages["pretrain"].phases["p1"].blend = weights
    unchanged(recipe, recorded(tmp_path_factory.mktemp("run"), recipe))


def test_layout_of_a_stage_may_come_and_go(tmp_path: Path) -> None:
    other = copy.deepcopy(TINY)
    other.stages["pretrain"].parallel = ParallelConfig(tensor=2)
    unchanged(other, recorded(tmp_path, TINY))
    unchanged(TINY, recorded(tmp_path, other))


def test_other_stages_are_refused(tmp_path: Path) -> None:
    other = copy.deepcopy(LONG)
    del other.stages["long_context"]
    with pytest.raises(UserError, match=r"^stages: \[pretrain\] differs from \[pretrain, long_context\] .*run.name$"):
        unchanged(other, recorded(tmp_path, LONG))


def test_value_to_go_back_to_is_written_as_on_the_command_line(tmp_path: Path) -> None:
    before = compose(["stages.pretrain.phases.p1.blend={a: 0.5, b: 1}", "data.max_bytes_per_source=null"]).recipe
    with pytest.raises(UserError, match=r"write data\.max_bytes_per_source=null to continue"):
        unchanged(changed(before, "data.max_bytes_per_source"), recorded(tmp_path, before))
    with pytest.raises(UserError) as caught:
        unchanged(changed(before, "stages.pretrain.phases.p1.blend"), recorded(tmp_path, before))
    written = str(caught.value).partition(", or write ")[2].partition(" to continue")[0]
    assert compose([written]).recipe.stages["pretrain"].phases["p1"].blend == {"a": 0.5, "b": 1.0}


def test_fields_of_one_group_are_said_together_and_those_that_are_told_are_not(tmp_path: Path) -> None:
    schedule, batch = "stages.pretrain.schedule", "stages.pretrain.global_batch_size"
    overrides = [f"{schedule}.lr=1e-3", f"{schedule}.min_lr=1e-5", "stages.pretrain.sequence_length=256", f"{batch}=32"]
    before = compose([]).recipe
    with pytest.raises(UserError) as caught:
        continuation(compose(overrides).recipe, overrides, recorded(tmp_path, before), 0)
    assert str(caught.value).endswith(", or write stages.pretrain.sequence_length=512 to continue that run")
    with pytest.raises(UserError) as caught:
        continuation(compose(overrides[:2]).recipe, overrides[:2], tmp_path, 0)
    now = before.stages["pretrain"].schedule
    way_back = f"write {schedule}.lr={now.lr} {schedule}.min_lr={now.min_lr} to continue that run"
    assert str(caught.value).endswith(way_back)


@pytest.mark.parametrize("text", ["{", "", "model: 3", "- a", "model:\n  pattern: [1"])
def test_damaged_recipe_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=r"recipe\.yaml: no recipe of this version"):
        unchanged(TINY, tmp_path)
    with pytest.raises(UserError, match=r"recipe\.yaml: no recipe of this version"):
        recorded_recipe(tmp_path)


def test_directory_without_a_recipe_is_free(tmp_path: Path) -> None:
    unchanged(TINY, tmp_path / "nothing")
    unchanged(TINY, tmp_path)
