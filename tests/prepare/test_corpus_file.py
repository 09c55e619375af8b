"""Corpus files and blends: those that ship are sound, wrong ones are refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nano_pretrain.prepare.corpus_file import load_corpus_file
from nano_pretrain.prepare.extract import check_extractor
from nano_pretrain.recipe.errors import RecipeError, UserError
from nano_pretrain.recipe.load import tree
from tests.prepare.small_corpus import corpus_content

BLENDS = ("tiny_p1", "tiny_p2", "tiny_p3")


def blend(name: str) -> dict[str, float]:
    return dict(yaml.safe_load((tree("data_blend") / f"blends/{name}.yaml").read_text()))


def test_the_corpus_that_ships_is_sound() -> None:
    corpus = load_corpus_file("pypi")
    for source in corpus.sources:
        check_extractor(source)
    assert len({source.category for source in corpus.sources}) >= 8
    assert {source.package for source in corpus.sources} == set(corpus.packages)
    assert all(len(package.sha256) == 64 for package in corpus.packages.values())
    assert all(package.file.endswith("-none-any.whl") for package in corpus.packages.values())


@pytest.mark.parametrize("name", BLENDS)
def test_a_blend_of_tiny_uses_every_source_and_none_for_more_than_a_fifth(name: str) -> None:
    weights = blend(name)
    assert set(weights) == {source.name for source in load_corpus_file("pypi").sources}
    assert sum(weights.values()) == 100
    assert 0 < min(weights.values()) <= max(weights.values()) <= 20


def test_the_extension_of_tiny_is_four_fifths_of_its_last_phase_and_long_documents() -> None:
    (derived,) = load_corpus_file("pypi").derived
    expected = {source: 0.8 * weight for source, weight in blend("tiny_p3").items()} | {derived.name: 20}
    assert blend("tiny_lc") == pytest.approx(expected)


def test_the_phases_go_from_diversity_to_quality() -> None:
    category = {source.name: source.category for source in load_corpus_file("pypi").sources}

    def share(name: str, kinds: str) -> float:
        return sum(weight for source, weight in blend(name).items() if kinds in category[source])

    crawl, math, code, questions = ([share(name, kind) for name in BLENDS] for kind in ("crawl", "math", "code", "sft"))
    assert crawl == sorted(crawl, reverse=True)
    assert math == sorted(math)
    assert questions == sorted(questions)
    assert max(share(name, "code") - share(name, "code_sft") for name in BLENDS) == 18
    assert code[0] > 0


Change = Callable[[dict[str, Any]], None]


def without(*path: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def having(value: Any, *path: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("sources"), "sources"),
        (without("packages", "prose"), "prose"),
        (without("sources", "notes", "licence"), "licence"),
        (without("packages", "prose", "sha256"), "sha256"),
        (having({}, "sources"), "no sources"),
        (having(3, "sources"), "see data_blend/corpora/pypi.yaml"),
        (having(1.0, "packages", "prose", "version"), "version must be text"),
        (having("x", "sources", "notes", "colour"), "unknown key colour"),
        (having("other", "sources", "notes", "package"), "other"),
        (having("x", "derived", "long", "colour"), "derived source long: unknown key colour"),
        (without("derived", "long", "parents"), "key parents is missing"),
        (having([], "derived", "long", "parents"), "parents must be a list"),
        (having("notes", "derived", "long", "parents"), "parents must be a list"),
        (having(["notes", "notes"], "derived", "long", "parents"), "parents must be a list of different"),
        (having(["other"], "derived", "long", "parents"), "its parent other is not listed"),
        (having({"parents": ["talk"]}, "derived", "notes"), "a source has the same name"),
        (having("2k", "derived", "long", "min_tokens"), "whole numbers"),
        (having(True, "derived", "long", "seed"), "whole numbers"),
        (having(0, "derived", "long", "chunk_tokens"), "from 1 to min_tokens"),
        (having(2000, "derived", "long", "chunk_tokens"), "from 1 to min_tokens"),
        (having(0, "derived", "long", "share_of_chunks"), "share_of_chunks"),
        (having(3, "derived"), "see data_blend/corpora/pypi.yaml"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, change: Change, words: str) -> None:
    content = corpus_content("0" * 64)
    change(content)
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        load_corpus_file(str(path))
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_papers_values_are_the_defaults(tmp_path: Path) -> None:
    content = corpus_content("0" * 64) | {"derived": {"long": {"parents": ["talk", "notes"]}}}
    (tmp_path / "c.yaml").write_text(json.dumps(content))
    corpus = load_corpus_file(str(tmp_path / "c.yaml"))
    (source,) = corpus.derived
    # arXiv 2508.14444, section 2.6.
    assert (source.min_tokens, source.chunk_tokens, source.share_of_chunks) == (32_768, 1024, 0.1)
    assert corpus.licence(source) == "as its parents: talk (made by a test); notes (made by a test)"


def test_a_corpus_without_derived_sources_keeps_its_hash(tmp_path: Path) -> None:
    content = corpus_content("0" * 64)
    del content["derived"]
    (tmp_path / "c.yaml").write_text(json.dumps(content))
    # The hash before there were derived sources: another one would have every such corpus prepared again.
    assert load_corpus_file(str(tmp_path / "c.yaml")).sha256.startswith("543037d35ad29e5f2053af058a02e4bb")


@pytest.mark.parametrize("text", ["[", "- a\n- b\n", "\x00"])
def test_no_yaml_mapping_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml: [^\n]+$"):
        load_corpus_file(str(tmp_path / "c.yaml"))


def test_an_unknown_corpus_lists_the_known() -> None:
    with pytest.raises(RecipeError, match=r"^data\.corpus: .*known corpora: .*pypi"):
        load_corpus_file("common_crawl")
