"""What ranks do to be compared with other layouts: build, train, save, load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano_pretrain.checkpoint.sharded import load_checkpoint, sharded_state
from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.loader import BatchReader
from nano_pretrain.data.shards import open_corpus
from nano_pretrain.parallel.groups import (
    all_ranks_max,
    data_parallel_place,
    process_groups,
    ranks_from_environment,
    reports_loss,
)
from nano_pretrain.platform import Platform, current_platform
from nano_pretrain.recipe.schema import ParallelConfig, Recipe

Change = Callable[[Any], None]


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
        change: applied to the model before the optimizer sees it.
    """

    def __init__(
        self, recipe: Recipe, layout: ParallelConfig, platform: Platform, change: Change | None = None
    ) -> None:
        import torch

        from nano_pretrain.model.hybrid import build_model
        from nano_pretrain.train.step import Trainable

        corpus = open_corpus(Path(recipe.data.path))
        curriculum = Curriculum(recipe, {name: stream.tokens for name, stream in corpus.train.items()})
        self.stage = curriculum.stage_at(0)
        self.reader = BatchReader(corpus, curriculum, data_parallel_place(), True, torch.device("cpu"))
        model = build_model(recipe, layout, platform, self.stage.sequence_length)
        if change is not None:
            change(model)
        self.platform = platform
        self.trainable = Trainable(recipe, layout, platform, model)
        self.step = 0

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
        """Write a checkpoint, named by the steps taken; before the first the optimizer has no state to write."""
        from megatron.core import dist_checkpointing

        path = directory / str(self.step)
        path.mkdir(parents=True, exist_ok=True)
        optimizer = self.trainable.optimizer if self.step else None
        with self.platform.optimizer_scope():
            dist_checkpointing.save(sharded_state(self.trainable.model, optimizer, loading=False), str(path))

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


@dataclass(frozen=True)
class Place:
    """Where a rank stands, and whether its process groups are gone afterwards."""

    data_parallel: tuple[int, int]
    reports_loss: bool
    largest: float
    initialised_after: bool


def place(layout: ParallelConfig) -> Place:
    """This rank's place; `largest` is the largest of ten times the ranks' numbers."""
    import torch
    import torch.distributed as dist

    with groups(layout):
        largest = all_ranks_max(10.0 * ranks_from_environment().rank, torch.device("cpu"))
        found = data_parallel_place(), reports_loss(), largest
    return Place(*found, initialised_after=dist.is_initialized())


def train_and_save(recipe: Recipe, layout: ParallelConfig, directory: Path) -> tuple[Steps, Steps]:
    """Save the initial weights, take three steps, save again, and take three more."""
    with groups(layout) as platform:
        run = Run(recipe, layout, platform)
        run.save(directory)
        first = run.train(3)
        run.save(directory)
        return first, run.train(3)


def load_and_train(recipe: Recipe, layout: ParallelConfig, source: Path, copy: Path) -> Steps:
    """Load the third step of the run in `source`, save it again in `copy`, and take three more steps."""
    with groups(layout) as platform:
        run = Run(recipe, layout, platform)
        run.load(source, 3)
        run.save(copy)
        return run.train(3)


def train_changed(recipe: Recipe, layout: ParallelConfig, change: Change) -> Steps:
    """Three steps of a changed model."""
    with groups(layout) as platform:
        return Run(recipe, layout, platform, change).train(3)


def differences(expected: Path, others: Mapping[str, Path], step: int) -> dict[str, dict[str, float]]:
    """Relative difference in norm of each whole tensor of each checkpoint, by run and name; infinite if it is missing.

    What replicated optimizer state does not hold, the FP32 copy of FP32 weights, is left out.
    """
    with groups(ParallelConfig()):
        wanted = _tensors(expected / str(step))
        return {name: _differences(wanted, _tensors(path / str(step))) for name, path in others.items()}


def _tensors(path: Path) -> dict[str, Any]:
    import torch
    from megatron.core import dist_checkpointing

    loaded: dict[str, Any] = dist_checkpointing.load_plain_tensors(str(path))
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def _differences(expected: dict[str, Any], actual: dict[str, Any]) -> dict[str, float]:
    if not any(".param." in name for name in actual):
        expected = {name: value for name, value in expected.items() if ".param." not in name}
    result = dict.fromkeys(expected.keys() ^ actual.keys(), float("inf"))
    for name in expected.keys() & actual.keys():
        difference = (expected[name].double() - actual[name].double()).norm()
        result[name] = float(difference / expected[name].double().norm()) if difference else 0.0
    return result


def unmark_sharded_weights(model: Any) -> None:
    """A mistake: each rank's part of a weight is taken for a copy of the others'."""
    for parameter in model.parameters():
        parameter.tensor_model_parallel = False


def unmark_norms(model: Any) -> None:
    """A mistake: gradients of the norms are not summed over the ranks that share a sequence."""
    for parameter in model.parameters():
        parameter.sequence_parallel = False


def build_with_rank_seed(model: Any) -> None:
    """A mistake: the ranks' weights differ where they should be copies."""
    import torch
    import torch.distributed as dist

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-3 * dist.get_rank())
