"""The config groups: any choice goes with any other, because no two groups set the same field."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

from nano_pretrain.compose import composed_yaml
from nano_pretrain.recipe.load import tree

GROUPS = ("model", "precision", "data", "schedule", "curriculum", "layout", "extension")
OPTIONS = {group: sorted(path.stem for path in (tree("recipes") / group).glob("*.yaml")) for group in GROUPS}
RECIPES = sorted(path.stem for path in (tree("recipes") / "recipe").glob("*.yaml"))
FILES = [(group, name) for group in GROUPS for name in OPTIONS[group]]

# Hydra's, for a file that is composed by itself.
pytestmark = pytest.mark.filterwarnings("ignore:In .* Defaults list is missing `_self_`")


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every field that is set."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@cache
def set_by(group: str, name: str) -> dict[str, Any]:
    """The fields that one file sets, and the files it builds upon."""
    with hydra.initialize_config_dir(str(tree("recipes")), version_base="1.3"):
        composed = OmegaConf.to_container(hydra.compose(f"{group}/{name}"))
    assert isinstance(composed, dict)
    return dict(leaves({str(key): value for key, value in composed.items()}))


def pairs_of(row: Mapping[str, str]) -> set[tuple[tuple[str, str], ...]]:
    return set(itertools.combinations(sorted(row.items()), 2))


def pairwise() -> list[dict[str, str]]:
    """Combinations in which every choice of a group meets every choice of every other; the recipes take turns."""
    wanted = {
        pair
        for one, other in itertools.combinations(OPTIONS, 2)
        for a, b in itertools.product(OPTIONS[one], OPTIONS[other])
        for pair in pairs_of({one: a, other: b})
    }
    rows: list[dict[str, str]] = []
    while wanted:
        row = dict(min(wanted))
        for group in [group for group in OPTIONS if group not in row]:
            row[group] = max(OPTIONS[group], key=lambda name: len(wanted & pairs_of({**row, group: name})))
        wanted -= pairs_of(row)
        rows.append({**row, "recipe": RECIPES[len(rows) % len(RECIPES)]})
    return rows


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(GROUPS, 2)))
def test_no_two_groups_set_the_same_field(one: str, other: str) -> None:
    first = {field for name in OPTIONS[one] for field in set_by(one, name)}
    second = {field for name in OPTIONS[other] for field in set_by(other, name)}
    assert first & second == set()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_leaves_to_the_groups_what_they_set(name: str) -> None:
    # Else another choice on the command line would be overridden by the recipe in part.
    chosen = {field for group, option in FILES for field in set_by(group, option)}
    for path in (tree("recipes") / "recipe" / f"{name}.yaml", tree("recipes") / "base" / "nemotron.yaml"):
        body = yaml.safe_load(path.read_text())
        body.pop("defaults", None)
        assert {field for field, _ in leaves(body)} & chosen == set()


@pytest.mark.parametrize("row", pairwise(), ids=lambda row: " ".join(row[group] for group in ("recipe", *GROUPS)))
def test_any_choice_goes_with_any_other(row: dict[str, str]) -> None:
    overrides = [f"{group}={name}" for group, name in row.items()]
    composed = dict(leaves(yaml.safe_load(composed_yaml(overrides, resolve=False))))
    for group in GROUPS:
        for field, value in set_by(group, row[group]).items():
            assert composed[field] == value
