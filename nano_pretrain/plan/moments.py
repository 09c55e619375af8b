"""The moments of a step at which a rank may hold most, for one pipeline position."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from nano_pretrain.plan.activations import HeadActivations, LayerActivations
from nano_pretrain.recipe.pattern import LayerType


@dataclass(frozen=True)
class Activations:
    """Bytes kept for the backward pass, by what keeps them.

    Attributes:
        mamba: Mamba-2 layers, without their states.
        feed_forward: feed-forward layers.
        attention: attention layers.
        rest: final norm and head; the outputs that a pipeline position keeps of what it sent on.
    """

    mamba: int = 0
    feed_forward: int = 0
    attention: int = 0
    rest: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.mamba + self.feed_forward + self.attention + self.rest


@dataclass(frozen=True)
class Moment:
    """Bytes beside weights, gradients and optimizer."""

    activations: Activations
    states: int
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.activations.total + self.states + self.logits + self.buffers


@dataclass(frozen=True)
class Work:
    """What one pipeline position does with a micro-batch, in bytes.

    Attributes:
        layers: type and activations of each layer, in order.
        head: final norm, head and loss, on the last position.
        sent: the output, which the schedule keeps until its gradient is back; 0 on the last position.
        ending: what the end of a forward pass needs beside what is kept, before the last position.
        embedding: gradient of the embedding with that of its output, on the first position.
        reduced: copies of gradients that are being reduced while each layer, and then the embedding, has its backward
            pass for the last micro-batch.
        update: what the reduction of the gradients and the optimizer need beside them.
        held: buffers that stay, and the gradient that was sent back last, which the schedule keeps.
    """

    layers: tuple[tuple[LayerType, LayerActivations], ...]
    head: HeadActivations | None
    sent: int
    ending: int
    embedding: int
    reduced: tuple[int, ...]
    update: int
    held: int


def moments(work: Work, in_flight: int) -> Iterator[Moment]:
    """The moments of the backward passes of a micro-batch while others wait and of the last one, and the update.

    Args:
        work: what a pipeline position does.
        in_flight: micro-batches between their forward and backward pass at most.
    """
    yield from _backward(work, in_flight, (0,) * len(work.reduced))
    yield from _backward(work, 1, work.reduced)
    yield _Kept().moment(0, 0, work.held + work.update)


def _backward(work: Work, in_flight: int, reduced: tuple[int, ...]) -> Iterator[Moment]:
    """The moments of a micro-batch's backward pass, while `in_flight - 1` later ones wait for theirs.

    They are: the end of the forward pass, or the loss and the head, each layer from the last to the first, the
    embedding. A layer releases what it kept as its backward pass goes on, so the layers before it are still whole. The
    schedule keeps the gradient of the output, with which the last layer begins, to the end.
    """
    kept = [_Kept(), *itertools.accumulate(map(_Kept.of, work.layers))]
    waiting = kept[-1].times(in_flight - 1)
    outputs = work.sent * in_flight
    now = waiting + kept[-1]
    if work.head is None:
        yield now.moment(outputs, 0, work.held + work.ending)
    else:
        yield now.moment(outputs + work.head.kept, work.head.logits, work.held + work.head.working)
    for (_, layer), until, copies in zip(work.layers, kept[1:], reduced[:-1], strict=True):
        now = waiting + until + _Kept(states=layer.working_states)
        received = 0 if until is kept[-1] else work.sent
        yield now.moment(outputs, 0, work.held + received + layer.working + copies)
    yield waiting.moment(outputs, 0, work.held + work.sent + work.embedding + reduced[-1])


@dataclass(frozen=True)
class _Kept:
    """Bytes that some layers keep."""

    mamba: int = 0
    feed_forward: int = 0
    attention: int = 0
    states: int = 0

    @classmethod
    def of(cls, layer: tuple[LayerType, LayerActivations]) -> _Kept:
        kind, found = layer
        return cls(
            mamba=found.kept if kind == LayerType.MAMBA else 0,
            feed_forward=found.kept if kind == LayerType.FEED_FORWARD else 0,
            attention=found.kept if kind == LayerType.ATTENTION else 0,
            states=found.states,
        )

    def __add__(self, other: _Kept) -> _Kept:
        return _Kept(
            self.mamba + other.mamba,
            self.feed_forward + other.feed_forward,
            self.attention + other.attention,
            self.states + other.states,
        )

    def times(self, count: int) -> _Kept:
        return _Kept(count * self.mamba, count * self.feed_forward, count * self.attention, count * self.states)

    def moment(self, rest: int, logits: int, buffers: int) -> Moment:
        activations = Activations(self.mamba, self.feed_forward, self.attention, rest)
        return Moment(activations, self.states, logits, buffers)
