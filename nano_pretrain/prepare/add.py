"""Adding to a prepared corpus: documents that it lacks become a generation of shards of their source.

What lies there stays byte for byte: its training shards, its held-out text and its tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from nano_pretrain.data.indexed_file import bin_path, idx_path
from nano_pretrain.data.shards import TokenShard
from nano_pretrain.prepare.clean import Drop
from nano_pretrain.prepare.documents import Document
from nano_pretrain.prepare.encode import DOCUMENTS_AT_A_TIME
from nano_pretrain.prepare.overlap import admitted
from nano_pretrain.prepare.select import Selection, drop_near_duplicates
from nano_pretrain.prepare.tokenizer import EOD_ID

SPLITS = ("train", "heldout")


def remove_unlisted(path: Path, sources: Mapping[str, Any]) -> None:
    """Remove shards that a killed run has moved into the corpus without listing them."""
    for split in SPLITS:
        prefixes = [path / split / shard["name"] for entry in sources.values() for shard in entry[split]["shards"]]
        listed = {file for prefix in prefixes for file in (bin_path(prefix), idx_path(prefix))}
        for file in (path / split).iterdir():
            if file.suffix in (".bin", ".idx") and file not in listed:
                file.unlink()


def read_documents(
    path: Path, sources: Mapping[str, Any], split: str, tokenizer: Tokenizer, done: Callable[[int], None]
) -> list[Document]:
    """The documents of a split of a corpus, decoded.

    Args:
        path: directory of the corpus.
        sources: those of its manifest.
        split: train or heldout.
        tokenizer: the corpus' own, which is byte-level: it loses nothing.
        done: called with the tokens that were read since the last call.
    """
    documents: list[Document] = []
    for entry in sources.values():
        for shard in (TokenShard(path / split / listed["name"]) for listed in entry[split]["shards"]):
            documents += _decoded(shard, tokenizer)
            done(shard.tokens)
    return documents


def _decoded(shard: TokenShard, tokenizer: Tokenizer) -> list[Document]:
    ids = shard.read(0, shard.tokens)
    *documents, _ = np.split(ids, np.flatnonzero(ids == EOD_ID) + 1)
    texts: list[str] = []
    for start in range(0, len(documents), DOCUMENTS_AT_A_TIME):
        batch = [document[:-1].tolist() for document in documents[start : start + DOCUMENTS_AT_A_TIME]]
        texts += tokenizer.decode_batch(batch, skip_special_tokens=False)
    return [Document.of(text) for text in texts]


def keep_new(selections: Mapping[str, Selection], present: Mapping[str, Sequence[Document]], known: Set[str]) -> None:
    """Leave of freshly selected documents those that may be added.

    Out stay documents that the corpus has in either split of any source; those that would be held out of a source that
    it has, whose held-out text stays as it is; and training text that near-duplicates held-out text. The held-out text
    of a new source is judged as in any preparation.

    Args:
        selections: of each source, near duplicates included; changed in place.
        present: documents of the corpus by split.
        known: sources that the corpus has.
    """
    digests = {document.digest for documents in present.values() for document in documents}
    for name, selection in selections.items():
        selection.train = _without(selection.train, digests, Drop.PRESENT, selection)
        selection.heldout = _without(selection.heldout, digests, Drop.PRESENT, selection)
        if name in known:
            held_out = {document.digest for document in selection.heldout}
            selection.heldout = _without(selection.heldout, held_out, Drop.HELD_OUT, selection)
    candidates = [document for selection in selections.values() for document in selection.train]
    texts = {split: [document.text for document in documents] for split, documents in present.items()}
    may_join = admitted(texts["heldout"], texts["train"], [document.text for document in candidates])
    near = {document.digest for document, joins in zip(candidates, may_join, strict=True) if not joins}
    for selection in selections.values():
        selection.train = _without(selection.train, near, Drop.NEAR_HELD_OUT, selection)
    drop_near_duplicates([Selection(train=list(present["train"])), *selections.values()])


def _without(documents: Sequence[Document], digests: Set[bytes], reason: Drop, selection: Selection) -> list[Document]:
    """The documents but for those with these digests, which are counted as dropped."""
    for document in documents:
        if document.digest in digests:
            selection.drop(reason, document.bytes)
    return [document for document in documents if document.digest not in digests]


def with_generation(entry: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """A source in the manifest with one more generation of shards, if any were written.

    Args:
        entry: of the source so far.
        added: of the same source, of what was added alone.

    Returns:
        What is said of what came in and was dropped is that of the addition; the splits are those of all generations.
    """
    before, more = entry["train"], added["train"]
    generation = before["shards"][-1].get("generation", 0) + 1
    lengths = more["tokens_by_length"]
    train = {
        **{name: before[name] + more[name] for name in ("documents", "bytes", "tokens")},
        "tokens_by_length": {least: tokens + lengths[least] for least, tokens in before["tokens_by_length"].items()},
        "shards": [*before["shards"], *({**shard, "generation": generation} for shard in more["shards"])],
    }
    return {**added, "train": train, "heldout": entry["heldout"]}
