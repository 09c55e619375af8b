"""Runs of many ranks in this process: the trainer's loop, reader and files around a model that only remembers."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.indexed_file import IndexedFileWriter, token_dtype
from nano_pretrain.data.loader import BatchReader, MicroBatch
from nano_pretrain.data.shards import Corpus, open_corpus
from nano_pretrain.parallel.groups import Ranks
from nano_pretrain.platform import Platform
from nano_pretrain.recipe.derived import stage_layout, stage_ranks
from nano_pretrain.recipe.schema import Recipe
from nano_pretrain.train import run
from nano_pretrain.train.before import check_before, check_started_ranks, next_stage
from nano_pretrain.train.callbacks import Checkpoints, Metrics
from nano_pretrain.train.directory import only_trainer
from nano_pretrain.train.loop import Ending, run_loop
from nano_pretrain.train.session import Callback, Session, StepRecord
from nano_pretrain.train.signals import StopRequest
from nano_pretrain.train.step import StepResult
from nano_pretrain.verbs import run_directory
from tests.corpora import EOD, write_corpus
from tests.distributed.batches import in_order, the_one

CPU = torch.device("cpu")
Pass = list[list[MicroBatch]]
"""Inputs of a forward pass: of each data-parallel rank those of its context-parallel ranks."""
DOCUMENT = 37
GENERATIONS = {"alpha": [2900, 1300], "beta": [900, 300, 500], "gamma": [700]}
"""Tokens of each shard of a source; beta's are generations of their own, and gamma is read several times."""
FIRST_TOKEN = {"alpha": 1000, "beta": 10_000, "gamma": 20_000}
VOCAB_SIZE = 30_000


def write_numbered_corpus(path: Path) -> Path:
    """Sources whose tokens are numbers, source by source, so that a sample says where it was read.

    Every `DOCUMENT` tokens a document ends.
    """
    manifest = json.loads((write_corpus(path) / "manifest.json").read_text())
    manifest["tokenizer"]["vocab_size"] = VOCAB_SIZE
    for source, lengths in GENERATIONS.items():
        numbers = np.arange(FIRST_TOKEN[source], FIRST_TOKEN[source] + sum(lengths))
        numbers[DOCUMENT - 1 :: DOCUMENT] = EOD
        parts = np.split(numbers, np.cumsum(lengths)[:-1])
        shards = [_write_shard(path / "train" / f"{source}-{n:05}", part) for n, part in enumerate(parts)]
        if source == "beta":
            shards = [{**shard, "generation": n} for n, shard in enumerate(shards)]
        manifest["sources"][source]["train"].update(shards=shards, tokens=sum(lengths))
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def _write_shard(prefix: Path, numbers: NDArray[Any]) -> dict[str, Any]:
    with IndexedFileWriter(prefix, token_dtype(VOCAB_SIZE)) as writer:
        for start in range(0, len(numbers), DOCUMENT):
            writer.add(numbers[start : start + DOCUMENT])
        return asdict(writer.finish())


def source_of(row: NDArray[Any]) -> str:
    """The source of a sample of the numbered corpus."""
    return next(name for name in reversed(FIRST_TOKEN) if row.max() >= FIRST_TOKEN[name])


@dataclass(frozen=True)
class Read:
    """What all ranks were given in a step: samples of the batch in their order, [batch, length].

    Attributes:
        lr: learning rate.
        tokens, labels, documents: whole samples.
    """

    lr: float
    tokens: NDArray[Any]
    labels: NDArray[Any]
    documents: NDArray[Any]

    def equals(self, other: Read) -> bool:
        """In every bit."""
        return self.lr == other.lr and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in ("tokens", "labels", "documents")
        )


class Remembering:
    """A model whose weights are what it was trained on."""

    def __init__(self) -> None:
        self.read: list[Read] = []

    def parameters(self) -> Iterator[torch.Tensor]:
        yield torch.zeros(1, 1)

    def sharded_state_dict(self, metadata: object) -> dict[str, Any]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read = list(state["read"])


class RememberingTrainable:
    """Takes what `AllRanks` reads."""

    optimizer = None

    def __init__(self) -> None:
        self.model = Remembering()

    def gather_parameters(self) -> None:
        pass

    def step(
        self, batches: Iterator[Pass], micro_batches: int, shape: tuple[int, int], lr: float, stop: bool
    ) -> StepResult:
        passes = [_joined(batch) for batch in batches]
        assert len(passes) == micro_batches
        read = Read(lr, *(np.concatenate([given[field] for given in passes]) for field in range(3)))
        assert read.tokens.shape[1] == shape[0]
        self.model.read.append(read)
        return StepResult(float(read.tokens.mean()), 1.0, stop)


def _joined(ranks: Pass) -> list[NDArray[Any]]:
    """Tokens, labels and documents of a forward pass of all ranks, [data-parallel ranks x micro-batch, length]."""
    joins = {"tokens": in_order, "labels": in_order, "documents": the_one}
    return [
        np.concatenate([join([getattr(part, field).numpy() for part in parts]) for parts in ranks])
        for field, join in joins.items()
    ]


class AllRanks:
    """The readers of all data- and context-parallel ranks."""

    def __init__(self, corpus: Corpus, curriculum: Curriculum, data: int, context: int) -> None:
        self._readers = [
            [BatchReader(corpus, curriculum, (rank, data), True, CPU, (part, context)) for part in range(context)]
            for rank in range(data)
        ]

    def micro_batches(self, consumed: int) -> Iterator[Pass]:
        replicas = [zip(*(reader.micro_batches(consumed) for reader in parts), strict=True) for parts in self._readers]
        for batch in zip(*replicas, strict=True):
            yield [list(parts) for parts in batch]


class KilledError(Exception):
    """The process is no more."""


@dataclass(frozen=True)
class Kill:
    """The end of a process.

    Attributes:
        steps: that it takes.
        written: what it still writes of the last one: 0 nothing, 1 its line of metrics.jsonl, 2 its checkpoint.
    """

    steps: int
    written: int = 0


class _Killer:
    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_start(self, session: Session) -> None:
        pass

    def on_step(self, session: Session, record: StepRecord, stopping: bool) -> None:
        self.left -= 1
        if not self.left:
            raise KilledError

    def on_end(self, session: Session) -> None:
        pass


@dataclass(frozen=True)
class Ended:
    """What a process leaves beside the files.

    Attributes:
        session: as it was at its end.
        begun: what the model had read when it was built or loaded.
        ending: None where it was killed or has finished.
    """

    session: Session
    begun: list[Read]
    ending: Ending | None

    @property
    def read(self) -> list[Read]:
        """What its model was trained on."""
        model: Any = self.session.trainable.model
        return list(model.read)


def start(recipe: Recipe, platform: Platform, overrides: Sequence[str] = (), kill: Kill | None = None) -> Ended:
    """A process that trains from the newest checkpoint on; the layout and number of ranks are those of its stage.

    Args:
        recipe: of the numbered corpus.
        platform: with process groups of one rank.
        overrides: fields that the command names.
        kill: when it is killed.

    Raises:
        RecipeError: the run cannot be told this.
    """
    directory = run_directory(recipe)
    curriculum = check_before(recipe, overrides, directory, first_rank=True)
    return _train(curriculum, directory, platform, kill)


def uninterrupted(curriculum: Curriculum, directory: Path, platform: Platform) -> Ended:
    """One rank that was told everything before it began, with a checkpoint at the end of each stage."""
    recipe = replace(curriculum.recipe, checkpoint=replace(curriculum.recipe.checkpoint, every=0))
    recipe.stages = {
        name: replace(stage, micro_batch_size=1, gpus=1, parallel=None) for name, stage in recipe.stages.items()
    }
    alone = Curriculum(recipe, curriculum.sizes, curriculum.acts)
    return _train(alone, directory, platform, None)


def _train(curriculum: Curriculum, directory: Path, platform: Platform, kill: Kill | None) -> Ended:
    recipe, corpus = curriculum.recipe, open_corpus(Path(curriculum.recipe.data.path))
    stage = next_stage(directory, curriculum)
    layout, world = stage_layout(recipe, stage.config), stage_ranks(recipe, stage.config)
    check_started_ranks(recipe, directory, curriculum, world)
    data = world // layout.context
    trainable: Any = RememberingTrainable()
    reader: Any = AllRanks(corpus, curriculum, data, layout.context)
    session = Session(recipe, directory, Ranks(0, world, 0), platform, corpus, curriculum, layout, trainable)
    callbacks: list[Callback] = [Metrics(), Checkpoints()]
    if kill:
        callbacks.insert(kill.written, _Killer(kill.steps))
    ending = None
    with only_trainer(directory), pytest.MonkeyPatch.context() as patch:
        _stand_in_for_ranks(patch, data)
        run._resume(session)
        begun = list(trainable.model.read)
        with suppress(KilledError):
            ending = run_loop(session, reader, callbacks, StopRequest())
    return Ended(session, begun, ending)


def _stand_in_for_ranks(patch: pytest.MonkeyPatch, data: int) -> None:
    """What asks other ranks, and the serialiser of sharded tensors."""

    def save(state: dict[str, Any], path: str) -> None:
        (Path(path) / "state").write_bytes(pickle.dumps(state))

    def load(state: dict[str, Any], path: str) -> Any:
        return pickle.loads((Path(path) / "state").read_bytes())

    patch.setattr("megatron.core.dist_checkpointing.save", save)
    patch.setattr("megatron.core.dist_checkpointing.load", load)
    patch.setattr("nano_pretrain.train.loop.data_parallel_place", lambda: (0, data))
    patch.setattr("nano_pretrain.train.run.environment", lambda session: {})
