"""`prepare` with data.add=true: what is added, what stays as it was, and what a kill leaves."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_pretrain.data.shards import Corpus, TokenStream, open_corpus, read_manifest
from nano_pretrain.prepare.add import keep_new
from nano_pretrain.prepare.clean import Drop
from nano_pretrain.prepare.documents import Document
from nano_pretrain.prepare.overlap import MAX_CONTAINMENT, admitted, containment
from nano_pretrain.prepare.run import prepare
from nano_pretrain.prepare.select import Selection
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.schema import Recipe
from tests.prepare.small_corpus import corpus_content, members, prose, recipe_in, small_recipe, tree_hashes, write_wheel
from tests.prepare.test_overlap import sentences
from tests.prepare.test_run import documents, run_in_child

CAP = 20_000
WHEEL = "packages/prose-1.0-py3-none-any.whl"


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a corpus of a part of its wheel."""
    directory = tmp_path_factory.mktemp("capped")
    recipe = small_recipe(directory)
    recipe.data.max_bytes_per_source = CAP
    prepare(recipe)
    return directory


@pytest.fixture
def copied(capped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(capped, tmp_path / "copy"))


def adding(directory: Path, **settings: Any) -> Recipe:
    """The recipe without the cap, or with other settings, that adds."""
    recipe = recipe_in(directory)
    recipe.data.add = True
    for name, value in settings.items():
        setattr(recipe.data, name, value)
    return recipe


@pytest.fixture(scope="module")
def grown(capped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That corpus, with what the cap had left out."""
    directory = Path(shutil.copytree(capped, tmp_path_factory.mktemp("grown") / "copy"))
    prepare(adding(directory))
    return directory


def texts(corpus: Corpus, split: str) -> list[str]:
    streams: dict[str, TokenStream] = dict(getattr(corpus, split))
    return [text for name, stream in streams.items() if name != "long" for text in documents(corpus, stream)]


def test_what_lay_there_stays_and_the_rest_is_a_generation(capped: Path, grown: Path) -> None:
    before, after = (tree_hashes(directory / "prepared") for directory in (capped, grown))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"manifest.json", "report.md"}
    assert {name for name in after if name not in before} == {
        f"train/{name}-00001.{end}" for name in ("notes", "talk") for end in ("bin", "idx")
    }
    old, new = (open_corpus(directory / "prepared") for directory in (capped, grown))
    for name in ("notes", "talk"):
        generations = new.sizes[name].generations
        assert (len(generations), generations[0]) == (2, old.sizes[name].tokens)
    assert old.sizes["long"].generations == new.sizes["long"].generations


def test_all_that_one_preparation_would_train_on_is_there_once(grown: Path, tmp_path: Path) -> None:
    whole = small_recipe(tmp_path)
    prepare(whole)
    corpus, expected = open_corpus(grown / "prepared"), open_corpus(Path(whole.data.path))
    assert sorted(texts(corpus, "train")) == sorted(texts(expected, "train"))
    assert sorted(texts(corpus, "heldout")) == sorted(texts(expected, "heldout"))
    assert corpus.train["notes"].bytes == expected.train["notes"].bytes
    manifest = read_manifest(grown / "prepared")
    assert manifest["settings"] == read_manifest(Path(whole.data.path))["settings"]
    assert corpus.fingerprint in (grown / "prepared/report.md").read_text()


def test_what_came_in_is_accounted_for(capped: Path, grown: Path) -> None:
    before, after = (read_manifest(directory / "prepared")["sources"] for directory in (capped, grown))
    for name in ("notes", "talk"):
        dropped = sum(entry["documents"] for entry in after[name]["dropped"].values())
        added = after[name]["train"]["documents"] - before[name]["train"]["documents"]
        assert after[name]["in"]["documents"] == dropped + added
    of_notes = after["notes"]["dropped"]["in the corpus before"]["documents"]
    assert of_notes == before["notes"]["train"]["documents"] + before["notes"]["heldout"]["documents"]


def test_twice_is_nothing_to_do(grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in (grown / "prepared").rglob("*")}
    for recipe in (adding(grown), recipe_in(grown)):
        prepare(recipe)
        assert "nothing to do" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (grown / "prepared").rglob("*")} == before


def test_fewer_documents_than_there_are_add_nothing(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree_hashes(copied / "prepared")
    prepare(adding(copied, max_bytes_per_source=CAP // 2))
    assert "nothing to add; derived sources stay as they are: long" in capsys.readouterr().out.replace("\n", " ")
    assert tree_hashes(copied / "prepared") == before, "the settings, too, are those of what is there"


@pytest.mark.parametrize("share", [0.001, 0.3])
def test_held_out_text_is_never_trained_on(copied: Path, share: float) -> None:
    """With less to hold out what was held out is selected for training, with more the other way round."""
    before = open_corpus(copied / "prepared")
    prepare(adding(copied, heldout_share=share))
    after = open_corpus(copied / "prepared")
    assert texts(after, "heldout") == texts(before, "heldout")
    train = texts(after, "train")
    assert not set(train) & set(texts(after, "heldout"))
    assert len(train) == len(set(train)) > len(texts(before, "train"))
    dropped = read_manifest(copied / "prepared")["sources"]["notes"]["dropped"]
    assert ("to be held out" in dropped) == (share == 0.3)


def write_corpus_file(directory: Path, files: dict[str, str], **more: Any) -> None:
    """Another wheel, and a corpus file that pins it with more entries."""
    content = corpus_content(write_wheel(directory / WHEEL, files))
    for section, entries in more.items():
        content[section] |= entries
    (directory / "corpus.yaml").write_text(json.dumps(content))


def test_new_sources_and_new_documents_that_hold_held_out_text(copied: Path) -> None:
    corpus = open_corpus(copied / "prepared")
    kept_out, rng = documents(corpus, corpus.heldout["notes"])[0], random.Random(5)
    files = members()
    files["prose/notes/near.txt"] = f"{prose(rng, 90)} {kept_out} {prose(rng, 90)}"
    files["prose/notes/far.txt"] = far = prose(rng, 90)
    for number in range(30):
        files[f"prose/tales/{number}.txt"] = prose(rng, 60)
    files["prose/tales/copy.txt"] = kept_out
    tales = corpus_content("")["sources"]["notes"] | {"arguments": {"include": ["prose/tales/*.txt"]}}
    write_corpus_file(copied, files, sources={"a_tale": tales})
    prepare(adding(copied))
    after = open_corpus(copied / "prepared")
    train = texts(after, "train")
    assert far in train
    assert not [text for text in train if kept_out in text]
    assert after.train["a_tale"].documents + after.heldout["a_tale"].documents == 30
    assert after.heldout["a_tale"].documents >= 1
    assert len(after.sizes["a_tale"].generations) == 1
    sources = read_manifest(copied / "prepared")["sources"]
    assert sources["notes"]["dropped"]["near held-out text"]["documents"] == 1
    assert list(sources) == sorted(sources)


def test_a_derived_source_is_not_added(copied: Path) -> None:
    longer = corpus_content("")["derived"]["long"] | {"parents": ["talk"]}
    write_corpus_file(copied, members(), derived={"longer": longer})
    with pytest.raises(
        UserError, match=r"^data\.corpus: derived source longer cannot be added to [^\n]+; leave it out"
    ):
        prepare(adding(copied))


@pytest.mark.parametrize(("field", "named"), [("max_bytes_per_source", True), ("tokenizer", False)])
def test_the_refusal_names_the_switch_where_it_helps(capped: Path, field: str, named: bool) -> None:
    recipe = recipe_in(capped)
    if field == "tokenizer":
        recipe.data.tokenizer.train_bytes = 9_999
    with pytest.raises(UserError) as caught:
        prepare(recipe)
    assert ("data.add=true" in str(caught.value)) == named
    recipe.data.add = True
    if not named:
        with pytest.raises(UserError, match=r"^data\.tokenizer\.train_bytes: "):
            prepare(recipe)


def test_nothing_is_added_to_a_damaged_corpus(copied: Path) -> None:
    shard = copied / "prepared/train/notes-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\x05\x00")
    before = tree_hashes(copied / "prepared")
    with pytest.raises(UserError, match=r"notes-00000\.bin: damaged"):
        prepare(adding(copied))
    assert tree_hashes(copied / "prepared") == before


@pytest.mark.parametrize(
    ("event", "file"),
    [
        ("open", ".adding/train/talk-00001.idx"),
        ("os.rename", ".adding/train/notes-00001.idx"),
        ("os.rename", ".adding/report.md"),
        ("os.rename", ".adding/manifest.json"),
    ],
)
def test_a_kill_leaves_the_corpus_as_it_was(capped: Path, copied: Path, grown: Path, event: str, file: str) -> None:
    hook = f"lambda event, args: event == {event!r} and str(args[0]).endswith({file!r}) and os.kill(os.getpid(), 9)"
    switch = "from tests.prepare.test_add import adding as recipe_in"
    child = run_in_child(copied, before=f"import os, sys; sys.addaudithook({hook}); {switch}")
    output, _ = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, output
    assert open_corpus(copied / "prepared").fingerprint == open_corpus(capped / "prepared").fingerprint
    prepare(adding(copied))
    assert tree_hashes(copied / "prepared") == tree_hashes(grown / "prepared")


def test_what_a_killed_run_left_is_removed_also_if_less_is_added(copied: Path) -> None:
    for end in ("bin", "idx"):
        (copied / f"prepared/train/notes-00007.{end}").write_bytes(b"half")
    prepare(adding(copied, max_bytes_per_source=CAP // 2))
    assert not list((copied / "prepared").glob("train/notes-0000[1-9].*"))


@given(*(st.lists(sentences, max_size=5) for _ in range(3)))
def test_no_held_out_text_comes_to_the_limit(heldout: list[str], training: list[str], candidates: list[str]) -> None:
    joined: list[str] = []
    below = containment(heldout, training) < MAX_CONTAINMENT
    for text, joins in zip(candidates, admitted(heldout, training, candidates), strict=True):
        before, after = (containment(heldout, [*training, *joined, *more]) for more in ([], [text]))
        # Refused if and only if it takes a text to the limit, or adds to one that is past it.
        assert joins == (not any((after >= MAX_CONTAINMENT) & (after > before)))
        joined += [text] if joins else []
    assert all(containment(heldout, [*training, *joined])[below] < MAX_CONTAINMENT)


def test_held_out_text_of_a_new_source_is_judged_by_all_training_text() -> None:
    rng = random.Random(3)
    old, own, other, new = (Document.of(prose(rng, 60)) for _ in range(4))
    near = Document.of(f"{old.text} {prose(rng, 10)}")
    selections = {"old": Selection(heldout=[other]), "new": Selection(train=[new], heldout=[own, near])}
    keep_new(selections, {"train": [old], "heldout": []}, known={"old"})
    assert (selections["new"].train, selections["new"].heldout) == ([new], [own])
    assert selections["new"].dropped_documents == {Drop.NEAR_DUPLICATE: 1}
    assert (selections["old"].heldout, selections["old"].dropped_documents) == ([], {Drop.HELD_OUT: 1})
