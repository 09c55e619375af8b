"""`nano-pretrain prepare`: the corpus of a recipe, from packages to shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from nano_pretrain.data.shards import TOKENIZER_NAME
from nano_pretrain.prepare.corpus_file import (
    CorpusFile,
    DerivedSource,
    Package,
    Source,
    load_corpus_file,
    load_package_file,
)
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
from nano_pretrain.prepare.tokenizer import train_bpe
from nano_pretrain.prepare.workspace import workspace
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
    if is_prepared(target, wanted):
        console.print(f"{target}: already prepared and whole, nothing to do")
        return
    with workspace(target) as directory, _progress(console) as progress:
        manifest = _Builder(recipe, corpus, writer, directory, progress).build(wanted)
    console.print(summary_table(manifest))
    console.print(f"{target}: prepared; the details are in {target / REPORT_NAME}")


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
        selections = self._select(wheels)
        tokenizer = self._tokenizer(selections, wheels)
        tokenizer_file = self._directory / TOKENIZER_NAME
        tokenizer_file.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        derived = self._derive(tokenizer, selections)
        sources = self._encode(tokenizer, selections, derived)
        manifest = build_manifest(wanted, self._corpus, tokenizer_file, tokenizer.get_vocab_size(), sources)
        (self._directory / REPORT_NAME).write_text(report_text(manifest), encoding="utf-8")
        write_manifest(self._directory, manifest)
        return manifest

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

    def _select(self, wheels: Mapping[str, Path]) -> dict[str, Selection]:
        data = self._recipe.data
        task = self._progress.add_task("reading and filtering", total=len(self._corpus.sources) + 1)
        seen: set[bytes] = set()
        selections: dict[str, Selection] = {}
        for source in self._corpus.sources:
            texts = extract(source, wheels[source.package])
            selections[source.name] = select(texts, seen, data.heldout_share, data.max_bytes_per_source)
            self._progress.advance(task)
        drop_near_duplicates(selections.values())
        self._progress.advance(task)
        return selections

    def _tokenizer(self, selections: Mapping[str, Selection], wheels: Mapping[str, Path]) -> Tokenizer:
        data = self._recipe.data
        task = self._progress.add_task("making the tokenizer", total=1)
        if data.tokenizer.kind == "tekken":
            tokenizer = load_tekken(wheels["mistral-common"])
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
        self, tokenizer: Tokenizer, selections: Mapping[str, Selection], derived: Mapping[str, Derived]
    ) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        everything = {**selections, **{name: each.selection for name, each in derived.items()}}
        total = sum(d.bytes for s in everything.values() for d in [*s.train, *s.heldout])
        task = self._progress.add_task("writing shards", total=total)
        sources: list[Source | DerivedSource] = [*self._corpus.sources, *self._corpus.derived]
        for source in sorted(sources, key=lambda source: source.name):
            selection = everything[source.name]
            written: dict[str, Written] = {}
            for split, documents in (("train", selection.train), ("heldout", selection.heldout)):
                prefix = self._directory / split / source.name
                prefix.parent.mkdir(exist_ok=True)
                written[split] = write_shards(
                    tokenizer, documents, prefix, done=lambda size: self._progress.advance(task, size)
                )
            entries[source.name] = source_entry(self._corpus, source, selection, written)
            if isinstance(source, DerivedSource):
                made = questions_entry(source, derived[source.name], self._recipe.data.long_qa)
                entries[source.name]["questions"] = made
        return entries
