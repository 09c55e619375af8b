"""A small corpus on disk in the prepared form, made in a moment: for tests that train."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from nano_pretrain.data.indexed_file import IndexedFileWriter, token_dtype
from nano_pretrain.data.shards import MANIFEST_FORMAT

VOCAB_SIZE = 512
EOD = 2
SOURCES = {"alpha": "crawl-high", "beta": "code", "gamma": "math"}
BLEND = "{alpha: 0.5, beta: 0.3, gamma: 0.2}"


def write_corpus(path: Path, documents: int = 60, seed: int = 0) -> Path:
    """Three sources of random walks over the vocabulary, each with a step of its own: there is much to learn."""
    for split in ("train", "heldout"):
        (path / split).mkdir(parents=True)
    tokenizer = _write_tokenizer(path / "tokenizer.json")
    sources: dict[str, Any] = {}
    for number, (name, category) in enumerate(SOURCES.items()):
        rng = random.Random(f"{seed}/{name}")
        entry: dict[str, Any] = {"category": category}
        for split, count in (("train", documents), ("heldout", documents // 4)):
            entry[split] = _write_split(path / split / f"{name}-00000", count, rng, step=number + 3)
        sources[name] = entry
    _write_manifest(path, {"sources": sources, "tokenizer": tokenizer, "format": MANIFEST_FORMAT})
    return path


def add_generation(path: Path, source: str, documents: int) -> None:
    """Give a source of such a corpus one more generation of shards, as `prepare` with data.add=true does."""
    content = json.loads((path / "manifest.json").read_text())
    entry = content["sources"][source]["train"]
    number = len(entry["shards"])
    rng = random.Random(f"{source}/{number}")
    added = _write_split(path / "train" / f"{source}-{number:05}", documents, rng, step=number)
    entry["shards"].append({**added.pop("shards")[0], "generation": number})
    entry.update({name: entry[name] + count for name, count in added.items()})
    _write_manifest(path, {name: value for name, value in content.items() if name != "fingerprint"})


def _write_manifest(path: Path, content: dict[str, Any]) -> None:
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**content, "fingerprint": fingerprint}))


def _write_tokenizer(path: Path) -> dict[str, Any]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *letters]
    tokens += [a + b for a in letters for b in letters][: VOCAB_SIZE - len(tokens)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"bytes": path.stat().st_size, "vocab_size": VOCAB_SIZE, "eod_id": EOD, "sha256": digest}


def _write_split(prefix: Path, documents: int, rng: random.Random, step: int) -> dict[str, Any]:
    with IndexedFileWriter(prefix, token_dtype(VOCAB_SIZE)) as writer:
        for _ in range(documents):
            writer.add([*_walk(rng, step), EOD])
        written = writer.finish()
    text_bytes = written.tokens - written.documents
    return {"shards": [asdict(written)], "tokens": written.tokens, "documents": written.documents, "bytes": text_bytes}


def _walk(rng: random.Random, step: int) -> list[int]:
    length = rng.randrange(20, 300)
    position = rng.randrange(VOCAB_SIZE)
    ids = []
    for _ in range(length):
        position += step if rng.random() < 0.8 else rng.randrange(VOCAB_SIZE)
        ids.append(3 + position % (VOCAB_SIZE - 3))
    return ids
