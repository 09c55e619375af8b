"""What a prepared corpus says of itself, and whether it may be used again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from nano_pretrain.data.indexed_file import bin_path, idx_path
from nano_pretrain.data.shards import MANIFEST_FORMAT, MANIFEST_NAME, TOKENIZER_NAME, open_corpus, read_manifest
from nano_pretrain.prepare.corpus_file import CorpusFile, DerivedSource, Source
from nano_pretrain.prepare.documents import Document
from nano_pretrain.prepare.encode import Written
from nano_pretrain.prepare.fetch import file_sha256
from nano_pretrain.prepare.long_qa.derive import Derived
from nano_pretrain.prepare.select import Selection
from nano_pretrain.prepare.tokenizer import EOD_ID
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.schema import LongQaConfig, Recipe

PIPELINE_VERSION = 1
"""Raised whenever the same settings give other shards than before."""
LENGTHS = tuple(1024 * factor for factor in (1, 4, 8, 32, 128, 512))
"""The manifest says how many tokens lie in documents of at least each of these lengths."""
HASHED_AT_REUSE = 1 << 30
"""A corpus of up to this many bytes is hashed before it is used again (about a second); of a larger one only the sizes
are checked."""


def settings(recipe: Recipe, corpus: CorpusFile) -> dict[str, Any]:
    """All that the shards depend on, by the name under which the user can change it."""
    data = recipe.data
    own: dict[str, Any] = {}
    if data.tokenizer.kind == "bpe":
        own["data.tokenizer.train_bytes"] = data.tokenizer.train_bytes
    elif data.tokenizer.kind == "file":
        own["data.tokenizer.file"] = f"contents {_contents(str(data.tokenizer.file))}"
    asked = {"data.long_qa.writer": data.long_qa.writer} if corpus.derived else {}
    if asked and data.long_qa.writer == "openai":
        asked["data.long_qa.model"] = str(data.long_qa.model)
    return {
        "data.corpus": f"{corpus.name} (contents {corpus.sha256[:16]})",
        "data.max_bytes_per_source": data.max_bytes_per_source,
        "data.heldout_share": data.heldout_share,
        "data.tokenizer.kind": data.tokenizer.kind,
        **own,
        **asked,
        "model.vocab_size": recipe.model.vocab_size,
        "the version of prepare": PIPELINE_VERSION,
    }


def _contents(tokenizer_file: str) -> str:
    try:
        return file_sha256(Path(tokenizer_file))[:16]
    except OSError as error:
        raise UserError(f"data.tokenizer.file: {tokenizer_file} cannot be read ({error.strerror})") from error


ADDABLE = frozenset({"data.corpus", "data.max_bytes_per_source", "data.heldout_share"})
"""Settings that say which documents there are: of others, documents may be added to a corpus."""


def is_prepared(path: Path, wanted: Mapping[str, Any], add: bool) -> bool:
    """Whether `path` holds a whole corpus of these settings.

    Returns:
        False if there is nothing, or, with `add`, one to which documents may be added.

    Raises:
        UserError: it holds a corpus of other settings, a damaged one, or something else.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    if not (path / MANIFEST_NAME).is_file():
        raise UserError(f"data.path: {path} exists and is not a prepared corpus; choose another data.path")
    manifest = read_manifest(path)
    found = manifest.get("settings", {})
    differing = {name for name in [*wanted, *found] if found.get(name) != wanted.get(name)}
    refused = differing - ADDABLE if add else differing
    for name in [*wanted, *found]:
        if name in refused:
            raise UserError(
                f"{name}: {path} was prepared with {found.get(name)}, the recipe says {wanted.get(name)}; "
                "choose another data.path, or remove that directory"
                + (", or write data.add=true to add what it lacks" if refused <= ADDABLE else "")
            )
    open_corpus(path)
    _check_hashes(path, manifest)
    return not differing


def _check_hashes(path: Path, manifest: Mapping[str, Any]) -> None:
    files = {path / TOKENIZER_NAME: manifest["tokenizer"]["sha256"]}
    for split, shard in _shards(manifest["sources"]):
        prefix = path / split / shard["name"]
        files |= {bin_path(prefix): shard["bin_sha256"], idx_path(prefix): shard["idx_sha256"]}
    if sum(file.stat().st_size for file in files) > HASHED_AT_REUSE:
        return
    for file, expected in files.items():
        if file_sha256(file) != expected:
            raise UserError(
                f"{file}: damaged (its hash has changed); remove {path} and run `nano-pretrain prepare` again"
            )


def _shards(sources: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    for _, source in sorted(sources.items()):
        for split in ("heldout", "train"):
            for shard in source[split]["shards"]:
                yield split, shard


def source_entry(
    corpus: CorpusFile, source: Source | DerivedSource, selection: Selection, written: Mapping[str, Written]
) -> dict[str, Any]:
    """A source in the manifest: what came in, what was dropped and why, and what was written of either split."""
    return {
        "category": source.category,
        "licence": corpus.licence(source),
        "in": {"documents": selection.documents_in, "bytes": selection.bytes_in},
        "dropped": {
            reason.value: {"documents": count, "bytes": selection.dropped_bytes[reason]}
            for reason, count in sorted(selection.dropped_documents.items())
        },
        "train": _split_entry(selection.train, written["train"]),
        "heldout": _split_entry(selection.heldout, written["heldout"]),
    }


def questions_entry(source: DerivedSource, derived: Derived, settings: LongQaConfig) -> dict[str, Any]:
    """How a derived source was made, with its counts by split."""
    return {
        "writer": settings.writer if settings.writer == "extractive" else f"{settings.writer} {settings.model}",
        "parents": list(source.parents),
        "min_tokens": source.min_tokens,
        "chunk_tokens": source.chunk_tokens,
        **derived.counts,
    }


def _split_entry(documents: Sequence[Document], written: Written) -> dict[str, Any]:
    return {
        "documents": len(documents),
        "bytes": sum(document.bytes for document in documents),
        "tokens": written.tokens,
        "tokens_by_length": tokens_by_length(written.lengths),
        "shards": [dataclasses.asdict(pair) for pair in written.pairs],
    }


def tokens_by_length(lengths: Sequence[int]) -> dict[str, int]:
    """Tokens that lie in documents of at least each of `LENGTHS`, from the documents' lengths."""
    return {str(least): sum(length for length in lengths if length >= least) for least in LENGTHS}


def build_manifest(
    wanted: Mapping[str, Any], corpus: CorpusFile, tokenizer_file: Path, vocab_size: int, sources: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest of a corpus whose files are written."""
    tokenizer_hash = file_sha256(tokenizer_file)
    hashes = [
        f"{split} {shard['name']} {shard['bin_sha256']} {shard['idx_sha256']}" for split, shard in _shards(sources)
    ]
    return {
        "format": MANIFEST_FORMAT,
        "settings": dict(wanted),
        "fingerprint": hashlib.sha256("\n".join([tokenizer_hash, *hashes]).encode()).hexdigest(),
        "tokenizer": {
            "bytes": tokenizer_file.stat().st_size,
            "sha256": tokenizer_hash,
            "vocab_size": vocab_size,
            "eod_id": EOD_ID,
            "made_by": f"tokenizers {tokenizers.__version__}",
        },
        "packages": {name: dataclasses.asdict(package) for name, package in sorted(corpus.packages.items())},
        "sources": dict(sources),
    }


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest.json` into the corpus directory."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    (path / MANIFEST_NAME).write_text(text, encoding="utf-8")
