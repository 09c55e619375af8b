"""What stands in for numbers that are not published is part of the recipe, and true of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nano_pretrain.compose import compose
from nano_pretrain.recipe.acts import continuation
from nano_pretrain.recipe.load import recorded_recipe, to_yaml, tree
from nano_pretrain.recipe.schema import Recipe

NAMES = sorted(path.stem for path in (tree("recipes") / "recipe").glob("*.yaml"))
DECAY = "stages.pretrain.schedule.decay_shape=minus_sqrt"
BLENDS = [f"stages.pretrain.phases.p{phase}.blend=nemotron_h_p{theirs}" for phase, theirs in ((1, 1), (2, 3), (3, 4))]


def unchanged(recipe: Recipe, directory: Path) -> None:
    """Go on with a run by a command that names nothing."""
    assert not continuation(recipe, [], directory, 0).told


def stand_ins(*overrides: str) -> dict[str, str]:
    return compose(overrides).recipe.stand_ins


def test_each_that_is_written_is_true_of_a_named_recipe() -> None:
    # One with a mistake in field or value would be dropped everywhere.
    files = (yaml.safe_load(path.read_text()) for path in tree("recipes").rglob("*.yaml"))
    written = {said for content in files for said in (content.get("stand_ins") or {})}
    assert written == {said for name in NAMES for said in stand_ins(f"recipe={name}")}


def test_the_12b_says_what_its_paper_does_not() -> None:
    expected = {"optimizer.eps=1e-08", DECAY, *BLENDS, "parallel.tensor=8", "cluster.gpus=5888"}
    assert expected <= set(stand_ins("recipe=nano_12b_v2"))


def test_the_12b_as_printed_says_that_it_leaves_the_paper() -> None:
    found = stand_ins("recipe=nano_12b_v2_paper")
    assert "22,688 rows" in found["parallel.tensor=2"]
    assert "160 heads" in found["stages.long_context.parallel.tensor=2"]
    assert "stages.long_context.parallel.pipeline=2" in found
    assert "parallel.tensor=8" not in found, "that of the recipe it builds upon"


@pytest.mark.parametrize(
    ("overrides", "gone"),
    [
        (["stages.pretrain.schedule.decay_shape=linear"], {DECAY}),
        (["schedule=cosine_20t"], {DECAY}),
        (["stages.pretrain.phases.p1.blend=nemotron_h_p2"], {BLENDS[0]}),
        (["curriculum=nemotron_h_20t"], {*BLENDS}),
        (["optimizer.eps=1e-6"], {"optimizer.eps=1e-08"}),
        (["layout=tp4", "cluster.gpus=2944"], {"parallel.tensor=8", "cluster.gpus=5888"}),
        (["parallel.tensor=8"], set()),
    ],
)
def test_what_is_chosen_otherwise_is_no_stand_in_any_more(overrides: list[str], gone: set[str]) -> None:
    before = set(stand_ins("recipe=nano_12b_v2"))
    after = set(stand_ins("recipe=nano_12b_v2", *overrides))
    assert before - after == gone


def test_another_group_brings_its_own() -> None:
    said = "stages.pretrain.phases.p2.blend=nemotron_h_p2"
    assert said in stand_ins("recipe=nano_12b_v2", "curriculum=nemotron_h_20t")
    assert set(BLENDS) <= set(stand_ins("recipe=nemotron_h_56b", "curriculum=nano_v2"))


def test_a_recipe_of_our_own_has_none() -> None:
    assert stand_ins("recipe=tiny") == stand_ins("recipe=nano_12b_v2_thin") == {}


def test_they_are_recorded_and_free_on_resume(tmp_path: Path) -> None:
    recipe = compose(["recipe=nano_9b_v2"]).recipe
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert recorded_recipe(tmp_path).stand_ins == recipe.stand_ins
    recipe.stand_ins, recipe.pretraining_of = {}, None
    unchanged(recipe, tmp_path)
