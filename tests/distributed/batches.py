"""The samples of a step, put together from what the models of all ranks were given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.distributed.courses import Fed

Samples = dict[str, NDArray[Any]]
"""`tokens`, `labels` and `documents` [steps, samples of a step, length]."""


def samples(fed: Sequence[Fed], steps: int) -> Samples:
    """All samples, in their order; tensor- and pipeline-parallel ranks must have been given the same.

    Args:
        fed: of each rank.
        steps: that they took.
    """
    return {field: _samples(fed, steps, field) for field in ("tokens", "labels", "documents")}


def _samples(fed: Sequence[Fed], steps: int, field: str) -> NDArray[Any]:
    parts: dict[tuple[int, int], NDArray[Any]] = {}
    for rank in fed:
        given = np.array(getattr(rank, field))
        assert np.array_equal(parts.setdefault(rank.place[2:], given), given)
    contexts, replicas = (1 + max(place[i] for place in parts) for i in (0, 1))
    # Every rank knows the documents of whole samples.
    join = the_one if field == "documents" else in_order
    whole = [join([parts[context, replica] for context in range(contexts)]) for replica in range(replicas)]
    # [step, pass, data-parallel rank, batch, length] is the order of the samples.
    ordered = np.stack([given.reshape(steps, -1, *given.shape[1:]) for given in whole], axis=2)
    return ordered.reshape(steps, -1, ordered.shape[-1])


def the_one(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """An array of which all ranks have a copy."""
    assert all(np.array_equal(part, parts[0]) for part in parts)
    return parts[0]


def in_order(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """A whole sequence, the last dimension, from the parts of context-parallel ranks.

    Of 2C chunks, rank r of C has chunks r and 2C - 1 - r.
    """
    halves = [np.split(part, 2, axis=-1) for part in parts]
    return np.concatenate([first for first, _ in halves] + [last for _, last in reversed(halves)], axis=-1)
