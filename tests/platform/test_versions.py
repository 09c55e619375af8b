"""Versions of installed packages against the declared ranges."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.requirements import Requirement

from nano_pretrain.platform import versions
from nano_pretrain.platform.versions import EVERYWHERE, ON_CUDA, check_version, check_versions
from nano_pretrain.recipe.errors import UserError

ENGINE = Requirement("transformer-engine[pytorch]>=2.9,<2.12; extra == 'gpu'")


def test_what_is_installed_here_is_of_the_right_version() -> None:
    check_versions(EVERYWHERE)


@pytest.mark.parametrize("installed", ["2.9.0", "2.11", "2.10.0+abc123", "2.11.0rc1"])
def test_versions_in_the_range(installed: str) -> None:
    check_version(ENGINE, installed)


@pytest.mark.parametrize("installed", ["2.8.0", "2.12.0", "2.20.2", "1.13"])
def test_versions_outside_the_range(installed: str) -> None:
    message = rf"^transformer-engine: {installed} is installed, .*>=2\.9.* is needed; pip install 'transformer-engine"
    with pytest.raises(UserError, match=message):
        check_version(ENGINE, installed)


@pytest.mark.parametrize("package", ON_CUDA)
def test_a_gpu_package_that_is_missing(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_installed", lambda name: None)
    with pytest.raises(UserError, match=rf"^{package}: not installed; pip install '{package}[<>~]"):
        check_versions([package])


def test_a_package_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_installed", lambda name: "0.1" if name == "psutil" else version(name))
    with pytest.raises(UserError, match=r"^psutil: 0\.1 is installed, "):
        check_versions(EVERYWHERE)


def test_this_package_without_metadata_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "THIS", "nano-pretrain-nowhere")
    with pytest.raises(UserError, match=r"not installed, so .* make setup"):
        check_versions(EVERYWHERE)
