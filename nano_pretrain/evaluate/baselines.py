"""Bigram and trigram models of the very tokens a run consumed, on the very held-out text it is measured on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.shards import Corpus
from nano_pretrain.evaluate.heldout import HeldOut
from nano_pretrain.evaluate.ngram import NgramModel

MAX_TOKENS = 50_000_000
"""Counting more than this in memory takes minutes; longer runs have no use for a trigram."""


def ngram_baselines(corpus: Corpus, curriculum: Curriculum, heldout: HeldOut) -> dict[str, Any]:
    """Bits per byte of interpolated Kneser-Ney models of order 2 and 3, per source and for the blend.

    Text that the run read more than once is counted once. Each n-gram model sees what the network sees: the samples of
    training, and each held-out sample from its first token on.

    Returns:
        {"train_tokens", "bigram": {"sources", "blend"}, "trigram": ..., "note"}.
    """
    samples = _consumed_samples(corpus, curriculum)
    lengths = np.array([sample.size for sample in samples])
    starts = np.cumsum(lengths) - lengths
    tokens = np.concatenate(samples)
    result: dict[str, Any] = {
        "train_tokens": int(tokens.size - len(samples)),
        "note": "interpolated modified Kneser-Ney, trained once on every sample the run consumed",
    }
    for name, order in (("bigram", 2), ("trigram", 3)):
        result[name] = _bits_per_byte(NgramModel(tokens, starts, corpus.vocab_size, order), heldout)
    return result


def _consumed_samples(corpus: Corpus, curriculum: Curriculum) -> list[npt.NDArray[np.int64]]:
    """Every sample of the run with its last label, each once."""
    samples: dict[tuple[str, int, int], npt.NDArray[np.int64]] = {}
    for stage in curriculum.stages:
        for sample in range(stage.samples_before(stage.end_tokens)):
            address = curriculum.locate(stage.name, sample)
            key = (address.source, address.start, stage.sequence_length)
            if key not in samples:
                samples[key] = corpus.train[address.source].read(address.start, stage.sequence_length + 1)
    return list(samples.values())


def _bits_per_byte(model: NgramModel, heldout: HeldOut) -> dict[str, Any]:
    nats = np.zeros(len(heldout.sources))
    tokens, sizes = np.zeros_like(nats), np.zeros_like(nats)
    byte_lengths = heldout.bytes_of.cpu().numpy()
    for sample in heldout.samples:
        row = heldout.streams[sample.source].read(sample.start, sample.length + 1)
        nats[sample.source] += model.nats(row, np.zeros(1, dtype=np.int64))[1:].sum()
        tokens[sample.source] += sample.length
        sizes[sample.source] += byte_lengths[row[1:]].sum()
    weights = np.array([heldout.weights[name] for name in heldout.sources])
    blend = (weights * nats / tokens).sum() / (weights * sizes / tokens).sum() / math.log(2)
    per_source = nats / sizes / math.log(2)
    return {"sources": dict(zip(heldout.sources, per_source.tolist(), strict=True)), "blend": float(blend)}
