"""What a machine cannot run is refused before anything starts."""

from dataclasses import replace
from importlib.util import find_spec

import pytest

from nano_pretrain.platform import preflight, versions
from nano_pretrain.platform.preflight import UNDECLARED, check_dependencies
from nano_pretrain.recipe.errors import RecipeError, UserError
from nano_pretrain.recipe.schema import ParallelConfig
from tests.model.recipes import small_recipe


def test_what_is_installed_here_is_enough() -> None:
    check_dependencies(small_recipe())


@pytest.mark.parametrize("package", UNDECLARED)
def test_a_package_that_megatron_core_forgets_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(UserError, match=f"^{package}: not installed, .*pip install {package}$"):
        check_dependencies(small_recipe())


def test_a_package_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_installed", lambda name: "0.1")
    with pytest.raises(UserError, match=r"^torch: 0\.1 is installed, "):
        check_dependencies(small_recipe())


@pytest.mark.parametrize("name", ["fp8_blockwise", "fp8_current_scaling"])
def test_fp8_is_refused_and_not_left_out(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"^precision.name: {name} is not available in this version; write"):
        check_dependencies(small_recipe(name))


def test_context_parallelism_is_refused_and_not_left_out() -> None:
    layout = ParallelConfig(context=2)
    with pytest.raises(RecipeError, match=r"^parallel\.context: .* write parallel\.context=1"):
        check_dependencies(replace(small_recipe(), parallel=layout))
    recipe = small_recipe()
    recipe.stages["pretrain"].parallel = layout
    with pytest.raises(RecipeError, match=r"^stages\.pretrain\.parallel\.context: .* write stages"):
        check_dependencies(recipe)
