"""Every resolved recipe is the one that was last looked at.

After a wanted change write the snapshots anew and read what `git diff` says about them:

    RENEW_SNAPSHOTS=1 pytest tests/recipe/test_recipe_snapshots.py
"""

from __future__ import annotations

import os

import pytest

from nano_pretrain.compose import compose
from nano_pretrain.recipe.load import to_yaml, tree

SNAPSHOTS = tree("recipes").parent / "tests" / "recipe" / "snapshots"
NAMES = sorted(path.stem for path in (tree("recipes") / "recipe").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_resolved_recipe_is_its_snapshot(name: str) -> None:
    snapshot = SNAPSHOTS / f"{name}.yaml"
    resolved = to_yaml(compose([f"recipe={name}"]).recipe)
    if os.environ.get("RENEW_SNAPSHOTS"):
        snapshot.write_text(resolved)
    assert resolved == snapshot.read_text(), "if this change is wanted: RENEW_SNAPSHOTS=1, see the top of this file"


def test_there_is_no_snapshot_without_a_recipe() -> None:
    assert sorted(path.stem for path in SNAPSHOTS.glob("*.yaml")) == NAMES
