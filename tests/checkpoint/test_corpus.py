"""Which corpus a run may go on with: its own, and its own with more shards while these change nothing of its order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nano_pretrain.checkpoint.corpus import added_since, check_order, check_run_corpus
from nano_pretrain.checkpoint.manifest import Manifest, read_manifest
from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.shards import Corpus, open_corpus
from nano_pretrain.recipe.errors import UserError
from tests.corpora import add_generation, write_corpus
from tests.data.curricula import recipe, share, stage

STEP = 32
"""Tokens of a step: 4 samples of 8."""
Content = dict[str, Any]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus whose source alpha has a second generation."""
    path = write_corpus(tmp_path_factory.mktemp("corpus") / "corpus", documents=8)
    add_generation(path, "alpha", documents=4)
    return path


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "corpus"))


def checkpoint(run: Path, tokens: int, corpus: Corpus, **fields: Any) -> Manifest:
    """A checkpoint of a run, of which only the manifest is asked; as it is read."""
    directory = run / "checkpoints" / str(tokens)
    directory.mkdir(parents=True)
    manifest = Manifest(tokens, tokens // STEP, {}, {}, corpus.fingerprint, {}, corpus.record)
    replace(manifest, **fields).write(directory)
    read = read_manifest(directory)
    assert read is not None
    return read


def change(path: Path, how: Callable[[Content], object]) -> Corpus:
    """The corpus with another manifest."""
    manifest = json.loads((path / "manifest.json").read_text())
    how(manifest)
    (path / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "other"}))
    return open_corpus(path)


def test_the_same_corpus_and_one_with_more(path: Path, tmp_path: Path) -> None:
    manifest = checkpoint(tmp_path, STEP, before := open_corpus(path))
    check_run_corpus(tmp_path, before)
    assert added_since(manifest, before) == ""
    add_generation(path, "alpha", documents=3)
    add_generation(path, "gamma", documents=3)
    change(path, lambda manifest: manifest["sources"].update(new=manifest["sources"]["beta"]))
    after = open_corpus(path)
    check_run_corpus(tmp_path, after)
    more = {name: after.train[name].tokens - before.train[name].tokens for name in ("alpha", "gamma")}
    expected = f"alpha {more['alpha']:,}, gamma {more['gamma']:,}, new {before.train['beta'].tokens:,}"
    assert added_since(manifest, after) == expected


def shards(manifest: Content, split: str = "train") -> list[Content]:
    found: list[Content] = manifest["sources"]["alpha"][split]["shards"]
    return found


REFUSED: dict[str, Callable[[Content], object]] = {
    "generation 0 of source alpha has changed": lambda manifest: shards(manifest)[0].update(bin_sha256="other"),
    "generation 1 of source alpha has changed": lambda manifest: shards(manifest)[1].update(idx_sha256="other"),
    "generation 1 of source alpha is gone": lambda manifest: shards(manifest).pop(),
    # Read as one generation, the same shards come in another order.
    "generation 0 of source alpha has": lambda manifest: shards(manifest)[1].update(generation=0),
    "held-out text of source alpha has changed": lambda manifest: shards(manifest, "heldout")[0].update(bin_sha256="x"),
    "source beta is gone": lambda manifest: manifest["sources"].pop("beta"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_has_changed_is_named(path: Path, tmp_path: Path, words: str) -> None:
    checkpoint(tmp_path, STEP, open_corpus(path))
    other = change(path, REFUSED[words])
    with pytest.raises(
        UserError, match=rf"^data\.path: the shards in [^\n]+ the run in [^\n]+: {words}[^\n]*; restore"
    ):
        check_run_corpus(tmp_path, other)


def test_another_tokenizer_is_named(path: Path, tmp_path: Path) -> None:
    corpus = open_corpus(path)
    assert corpus.record is not None
    checkpoint(tmp_path, STEP, corpus, shards={**corpus.record, "tokenizer": "other"})
    with pytest.raises(UserError, match="the tokenizer has changed"):
        check_run_corpus(tmp_path, corpus)


def test_a_checkpoint_without_the_record_takes_its_own_corpus_alone(path: Path, tmp_path: Path) -> None:
    corpus = open_corpus(path)
    manifest = checkpoint(tmp_path, STEP, corpus, shards=None)
    # As they were written before there was a record.
    file = tmp_path / "checkpoints" / str(STEP) / "manifest.json"
    file.write_text(
        json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != "shards"})
    )
    check_run_corpus(tmp_path, corpus)
    check_order(tmp_path, curriculum(corpus, steps=2))
    add_generation(path, "alpha", documents=3)
    grown = open_corpus(path)
    assert added_since(manifest, grown) == ""
    with pytest.raises(UserError, match="the fingerprint has changed"):
        check_run_corpus(tmp_path, grown)


def test_imported_weights_take_any_corpus(path: Path, tmp_path: Path) -> None:
    corpus = open_corpus(path)
    checkpoint(tmp_path, 0, replace(corpus, fingerprint="", record=None), weights_only=True)
    check_run_corpus(tmp_path, corpus)
    check_order(tmp_path, curriculum(corpus, steps=2))


def test_a_corpus_without_hashes_has_no_record(path: Path, tmp_path: Path) -> None:
    plain = change(path, lambda manifest: shards(manifest)[0].pop("bin_sha256"))
    assert plain.record is None
    checkpoint(tmp_path, STEP, plain)
    check_run_corpus(tmp_path, plain)
    with pytest.raises(UserError, match="the fingerprint has changed"):
        check_run_corpus(tmp_path, replace(plain, fingerprint="another"))


def test_every_checkpoint_that_may_be_loaded_is_asked(path: Path, tmp_path: Path) -> None:
    """The newest may turn out to be damaged, and then the one before it is loaded."""
    before = open_corpus(path)
    add_generation(path, "alpha", documents=3)
    checkpoint(tmp_path, 2 * STEP, open_corpus(path))
    assert before.record is not None
    sources = {**before.record["sources"], "gone": before.record["sources"]["beta"]}
    checkpoint(tmp_path, STEP, before, shards={**before.record, "sources": sources})
    with pytest.raises(UserError, match="source gone is gone"):
        check_run_corpus(tmp_path, open_corpus(path))


def curriculum(corpus: Corpus, steps: int) -> Curriculum:
    return Curriculum(recipe({"s": stage(steps * STEP, {"p": share(1.0, alpha=1)})}), corpus.sizes)


def test_shards_may_come_until_the_others_are_read_again(path: Path, tmp_path: Path) -> None:
    corpus = open_corpus(path)
    epoch = sum((tokens - 1) // 8 for tokens in corpus.sizes["alpha"].generations) // 4
    manifests = [checkpoint(tmp_path / str(steps), steps * STEP, corpus) for steps in (epoch, epoch + 1)]
    add_generation(path, "alpha", documents=3)
    grown = open_corpus(path)
    for manifest in manifests:
        check_run_corpus(tmp_path / str(manifest.step), grown)
    check_order(tmp_path / str(epoch), curriculum(grown, 2 * epoch))
    line = r"^data\.path: source alpha has shards that were added after the run [^\n]+ choose another run\.name$"
    with pytest.raises(UserError, match=line):
        check_order(tmp_path / str(epoch + 1), curriculum(grown, 2 * epoch))
    # Without the new shards it is what it was.
    check_order(tmp_path / str(epoch + 1), curriculum(corpus, 2 * epoch))
