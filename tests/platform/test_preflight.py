"""What a machine cannot run is refused before anything starts."""

from importlib.util import find_spec

import pytest

from nano_pretrain.platform import preflight, versions
from nano_pretrain.platform.preflight import UNDECLARED, check_dependencies
from nano_pretrain.recipe.errors import UserError
from tests.model.recipes import small_recipe


@pytest.mark.parametrize("precision", ["fp32", "fp8_blockwise"])
def test_what_is_installed_here_is_enough(precision: str) -> None:
    check_dependencies(small_recipe(precision))


@pytest.mark.parametrize("package", UNDECLARED)
def test_a_package_that_megatron_core_forgets_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(UserError, match=f"^{package}: not installed, .*pip install {package}$"):
        check_dependencies(small_recipe())


def test_a_package_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_installed", lambda name: "0.1")
    with pytest.raises(UserError, match=r"^torch: 0\.1 is installed, "):
        check_dependencies(small_recipe())
