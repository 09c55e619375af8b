"""What a checkpoint records of its corpus, so that shards can be added to it and nothing else changes unnoticed.

A record is `{"tokenizer": sha256, "sources": {name: {"heldout": sha256, "generations": [{"tokens", "sha256"}, ...]}}}`;
the hashes come from those of the shards in the corpus' manifest, and no data is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

Record = Mapping[str, Any]


def corpus_record(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a corpus, from its manifest; None if that has no hashes of shards."""
    splits = [source[split] for source in manifest["sources"].values() for split in ("train", "heldout")]
    if not all("bin_sha256" in shard and "idx_sha256" in shard for split in splits for shard in split["shards"]):
        return None
    return {
        "tokenizer": manifest["tokenizer"]["sha256"],
        "sources": {name: _source_record(entry) for name, entry in sorted(manifest["sources"].items())},
    }


def _source_record(entry: Mapping[str, Any]) -> dict[str, Any]:
    generations: dict[int, list[Mapping[str, Any]]] = {0: []}
    for shard in entry["train"]["shards"]:
        generations.setdefault(shard.get("generation", 0), []).append(shard)
    return {
        "heldout": _hash(entry["heldout"]["shards"]),
        "generations": [
            {"tokens": sum(shard["tokens"] for shard in shards), "sha256": _hash(shards)}
            for shards in generations.values()
        ],
    }


def _hash(shards: Sequence[Mapping[str, Any]]) -> str:
    lines = (f"{shard['bin_sha256']} {shard['idx_sha256']}" for shard in shards)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def generation_tokens(record: Record) -> dict[str, list[int]]:
    """Tokens of each generation of each source."""
    return {
        name: [generation["tokens"] for generation in source["generations"]]
        for name, source in record["sources"].items()
    }


def first_change(then: Record, now: Record) -> str | None:
    """The first thing in words that is not as it was; None if there may be more, and all else is the same."""
    if then["tokenizer"] != now["tokenizer"]:
        return "the tokenizer has changed"
    for name, source in then["sources"].items():
        if name not in now["sources"]:
            return f"source {name} is gone"
        if change := _change_of_source(name, source, now["sources"][name]):
            return change
    return None


def _change_of_source(name: str, then: Record, now: Record) -> str | None:
    if then["heldout"] != now["heldout"]:
        return f"held-out text of source {name} has changed"
    pairs = zip_longest(then["generations"], now["generations"][: len(then["generations"])])
    for number, (before, after) in enumerate(pairs):
        if before != after:
            return f"generation {number} of source {name} {'has changed' if after else 'is gone'}"
    return None


def added_tokens(then: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """Tokens that each source has more; one that has no more is left out."""
    more = {name: tokens - then.get(name, 0) for name, tokens in now.items()}
    return {name: tokens for name, tokens in more.items() if tokens}


def in_words(tokens: Mapping[str, int]) -> str:
    """Tokens by source, on one line."""
    return ", ".join(f"{name} {count:,}" for name, count in tokens.items())
