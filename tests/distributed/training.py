"""What ranks do to be compared with other layouts: build, train, save, load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano_pretrain.checkpoint.sharded import load_checkpoint, sharded_state
from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.loader import BatchReader
from nano_pretrain.data.shards import open_corpus
from nano_pretrain.parallel.groups import data_parallel_place, process_groups, ranks_from_environment
from nano_pretrain.platform import Platform, current_platform
from nano_pretrain.recipe.schema import ParallelConfig, Recipe


@dataclass(frozen=True)
class Steps:
    """Losses and gradient norms of consecutive steps."""

    losses: list[float]
    grad_norms: list[float]


class Run:
    """Model, optimizer and data of this rank.

    Args:
        recipe: a recipe of one stage.
        layout: layout of the ranks.
        platform: the platform, with its process groups.
    """

    def __init__(self, recipe: Recipe, layout: ParallelConfig, platform: Platform) -> None:
        import torch

        from nano_pretrain.model.hybrid import build_model
        from nano_pretrain.train.step import Trainable

        corpus = open_corpus(Path(recipe.data.path))
        curriculum = Curriculum(recipe, {name: stream.tokens for name, stream in corpus.train.items()})
        self.stage = curriculum.stage_at(0)
        self.reader = BatchReader(corpus, curriculum, data_parallel_place(), True, torch.device("cpu"))
        self.platform = platform
        self.trainable = Trainable(
            recipe, layout, platform, build_model(recipe, layout, platform, self.stage.sequence_length)
        )
        self.step = 0
        self.first = ranks_from_environment().is_first

    def train(self, steps: int) -> Steps:
        """Take the next steps; all ranks report the same."""
        stage, results = self.stage, []
        micro_batches = stage.global_batch_size // (stage.micro_batch_size * self.reader.size)
        for _ in range(steps):
            batches = self.reader.micro_batches(self.step * stage.tokens_per_step)
            shape = (stage.sequence_length, stage.micro_batch_size)
            results.append(self.trainable.step(batches, micro_batches, shape, lr=3e-3, stop=False))
            self.step += 1
        return Steps([result.loss for result in results], [result.grad_norm for result in results])

    def save(self, directory: Path) -> None:
        """Write a checkpoint, named by the steps taken; before the first step the optimizer has no state to write."""
        from megatron.core import dist_checkpointing

        path = directory / str(self.step)
        if self.first:
            path.mkdir(parents=True)
        with self.platform.optimizer_scope():
            state = sharded_state(self.trainable.model, self.trainable.optimizer if self.step else None, loading=False)
            dist_checkpointing.save(state, str(path))

    def load(self, directory: Path, step: int) -> None:
        """Load the checkpoint written after `step` steps."""
        with self.platform.optimizer_scope():
            load_checkpoint(directory / str(step), self.trainable.model, self.trainable.optimizer)
        self.step = step


@contextmanager
def groups(layout: ParallelConfig) -> Iterator[Platform]:
    """The platform of this rank, with process groups; a rank that waits for another gives up after 60 s."""
    platform = current_platform()
    platform.prepare(0, threads=1)
    with process_groups(platform, ranks_from_environment(), layout, timeout_seconds=60):
        yield platform


def train_and_save(recipe: Recipe, layout: ParallelConfig, directory: Path, more: int = 0) -> list[Steps]:
    """Save the initial weights, take three steps, save again, and take `more` steps."""
    with groups(layout) as platform:
        run = Run(recipe, layout, platform)
        run.save(directory)
        first = run.train(3)
        run.save(directory)
        return [first, run.train(more)]


def load_and_train(recipe: Recipe, layout: ParallelConfig, directory: Path) -> Steps:
    """Load the checkpoint that another run wrote after three steps, and take three more."""
    with groups(layout) as platform:
        run = Run(recipe, layout, platform)
        run.load(directory, 3)
        return run.train(3)


def checkpoint_tensors(directory: Path) -> dict[int, dict[str, Any]]:
    """Every whole tensor of every checkpoint, by step and name, as one process reads it."""
    from megatron.core import dist_checkpointing

    with groups(ParallelConfig()):
        return {int(path.name): dist_checkpointing.load_plain_tensors(str(path)) for path in directory.iterdir()}
