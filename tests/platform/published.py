"""Published sources of the GPU libraries, read without importing them: nothing of them runs here."""

from __future__ import annotations

import ast
import tarfile
import zipfile
from functools import cache
from pathlib import Path

import yaml

from nano_pretrain.prepare.corpus_file import Package
from nano_pretrain.prepare.fetch import fetch
from tests.peers.mamba_ssm import CACHE, source_archive

PINS = Path(__file__).with_suffix(".yaml")


class Published:
    """The files of one release.

    Args:
        package: which one.
    """

    def __init__(self, package: Package) -> None:
        wheel = package.file.endswith(".whl")
        self._texts = _wheel(package) if wheel else _archive(source_archive(package))

    def text(self, path: str) -> str:
        """A file by its path in the installed package, or in the archive."""
        return self._texts[path]

    def module(self, name: str) -> ast.Module:
        """A module by its dotted name."""
        path = name.replace(".", "/")
        return ast.parse(self._texts.get(f"{path}.py") or self._texts[f"{path}/__init__.py"])

    def has_module(self, name: str) -> bool:
        """Whether there is a module of this dotted name."""
        path = name.replace(".", "/")
        return f"{path}.py" in self._texts or f"{path}/__init__.py" in self._texts


@cache
def release(name: str, version: str) -> Published:
    """A pinned release, fetched through pip where the cache lacks it."""
    (package,) = (pin for pin in _pins() if (pin.name, pin.version) == (name, version))
    return Published(package)


def versions(name: str) -> list[str]:
    """Pinned versions of a library, the newest last."""
    return [pin.version for pin in _pins() if pin.name == name]


@cache
def _pins() -> tuple[Package, ...]:
    return tuple(Package(**entry) for entry in yaml.safe_load(PINS.read_text()))


def _wheel(package: Package) -> dict[str, str]:
    path = fetch([package], CACHE, lambda done: None)[package.name]
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")}


def _archive(path: Path) -> dict[str, str]:
    """Files of Python and C++, without the directory that holds them all."""
    texts = {}
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            if member.name.endswith((".py", ".cpp")):
                file = archive.extractfile(member)
                assert file is not None
                texts[member.name.partition("/")[2]] = file.read().decode()
    return texts
