"""Versions of packages against the ranges that this package declares; imports none of them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from nano_pretrain.recipe.errors import UserError

THIS = "nano-pretrain"
EVERYWHERE = ("torch", "megatron-core", "psutil", "triton", "einops")
"""Packages of which another version fails late, or trains something else."""

ON_CUDA = ("transformer-engine", "mamba-ssm", "causal-conv1d")
"""As `EVERYWHERE`, where a GPU is used."""


def check_versions(packages: Iterable[str]) -> None:
    """Refuse packages that are missing or outside the range of this package's own metadata.

    Args:
        packages: names of distributions that this package requires, extras included.

    Raises:
        UserError: the first that is wrong, or this package was never installed.
    """
    declared = _declared()
    for package in packages:
        check_version(declared[package], _installed(package))


def check_version(requirement: Requirement, installed: str | None) -> None:
    """Compare one version.

    Args:
        requirement: name and range.
        installed: version; None if there is none.

    Raises:
        UserError: it is missing or outside the range.
    """
    wanted = f"{requirement.name}{requirement.specifier}"
    if installed is None:
        raise UserError(f"{requirement.name}: not installed; pip install '{wanted}'")
    if not requirement.specifier.contains(installed, prereleases=True):
        raise UserError(
            f"{requirement.name}: {installed} is installed, {requirement.specifier} is needed; pip install '{wanted}'"
        )


def _declared() -> dict[str, Requirement]:
    """Requirements of this package on this system, by name; all extras."""
    try:
        found = [Requirement(line) for line in requires(THIS) or ()]
    except PackageNotFoundError as error:
        raise UserError(
            f"{THIS}: not installed, so versions cannot be checked; make setup, or pip install ."
        ) from error
    return {requirement.name: requirement for requirement in found}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
