"""What ranks do to be compared with other layouts: build, train, save, load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    context_parallel_place,
    data_parallel_place,
    process_groups,
    ranks_from_environment,
    reports_loss,
)
from nano_pretrain.platform import Platform, current_platform
from nano_pretrain.recipe.schema import ParallelConfig, Recipe

Change = Callable[[Any], None]
RATE = 1e-3
"""Learning rate."""


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

        self.corpus = open_corpus(Path(recipe.data.path))
        curriculum = Curriculum(recipe, self.corpus.sizes)
        self.stage = curriculum.stage_at(0)
        place, context = data_parallel_place(), context_parallel_place()
        self.reader = BatchReader(self.corpus, curriculum, place, True, torch.device("cpu"), context)
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
            results.append(self.trainable.step(batches, micro_batches, shape, lr=RATE, stop=False))
            self.step += 1
        return Steps([result.loss for result in results], [result.grad_norm for result in results])

    def save(self, directory: Path) -> None:
        """Write a checkpoint, named by the steps taken."""
        self.trainable.gather_parameters()
        with self.platform.optimizer_scope():
            save_state(sharded_state(self.trainable.model, self.trainable.optimizer, False), directory / str(self.step))

    def load(self, directory: Path, step: int) -> None:
        """Load the checkpoint written after `step` steps."""
        with self.platform.optimizer_scope():
            load_checkpoint(directory / str(step), self.trainable.model, self.trainable.optimizer)
        self.step = step


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a sharded state without what belongs to a whole checkpoint: manifest, hashes, its name at the end."""
    from megatron.core import dist_checkpointing

    path.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(state, str(path))


@contextmanager
def groups(layout: ParallelConfig, kernels: str = "auto") -> Iterator[Platform]:
    """The platform of this rank, with process groups; a rank that waits for another gives up after 60 s."""
    platform = current_platform()
    platform.prepare(0, threads=1, kernels=kernels)
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


def heldout_loss(recipe: Recipe, layout: ParallelConfig) -> dict[str, Any]:
    """Held-out loss after a step, of samples of which the last of each source is shorter than the others."""
    import torch

    from nano_pretrain.evaluate.heldout import HeldOut

    with groups(layout) as platform:
        run = Run(recipe, layout, platform)
        run.train(1)
        stage, weights = run.stage, dict.fromkeys(run.corpus.heldout, 1.0)
        shape = (stage.sequence_length, stage.micro_batch_size)
        heldout = HeldOut(run.corpus, weights, *shape, 5 * stage.sequence_length + 17, True, torch.device("cpu"))
        # As callbacks.Validation does it: data-parallel ranks need not have as many samples as each other.
        run.trainable.gather_parameters()
        run.trainable.wrapped.eval()
        return heldout.evaluate(run.trainable.run)


def length_lines(recipe: Recipe, layout: ParallelConfig) -> list[dict[str, Any]]:
    """What is evaluated for length after a step."""
    import torch

    from nano_pretrain.evaluate.length import LengthSuite, Subject, greedy
    from nano_pretrain.evaluate.room import holds_whole_model

    with groups(layout) as platform:
        run = Run(recipe, layout, platform)
        run.train(1)
        model, eod_id, complete = run.trainable.model, run.corpus.eod_id, None
        if holds_whole_model(recipe, layout, platform.name):
            complete = greedy(model, eod_id, recipe.model.vocab_size)
        suite = LengthSuite(recipe.evaluate, recipe, run.corpus)
        # As callbacks.StageEndEvaluation does it.
        run.trainable.gather_parameters()
        run.trainable.wrapped.eval()
        subject = Subject(run.trainable.run, complete, torch.device("cpu"))
        return suite.evaluate(subject, suite.shapes(layout, run.stage.config))


def harness_answers(
    recipe: Recipe, layout: ParallelConfig, asked: list[Any], prompts: list[Any], longest: int
) -> tuple[list[Any], list[str]] | None:
    """What the first rank gets to hear of a model after a step, as lm-evaluation-harness would; None on the others."""
    from functools import partial

    import torch
    from tokenizers import Tokenizer

    from nano_pretrain.evaluate.length import Subject
    from nano_pretrain.evaluate.requests import Requests
    from nano_pretrain.evaluate.room import pass_shape

    with groups(layout) as platform:
        run = Run(recipe, layout, platform)
        run.train(1)
        run.trainable.gather_parameters()
        run.trainable.wrapped.eval()
        subject = Subject(run.trainable.run, None, torch.device("cpu"))
        tokenizer = Tokenizer.from_file(str(run.corpus.tokenizer_file))
        shape_of = partial(pass_shape, recipe, layout=layout, stage=run.stage.config)
        requests = Requests(subject, run.trainable.model, tokenizer.decode, run.corpus.eod_id, shape_of, longest)
        if ranks_from_environment().rank:
            requests.serve()
            return None
        answers = requests.likelihoods(asked), requests.texts(prompts) if prompts else []
        requests.end()
        return answers


def likeliest_tokens(logits: Any, vocab_size: int) -> Any:
    """What ranks that have some columns each of logits [length, batch, padded vocabulary] find."""
    from megatron.core import parallel_state

    from nano_pretrain.evaluate.requests import likeliest_token

    ranks = ranks_from_environment().world_size
    with groups(ParallelConfig(tensor=ranks)):
        group = parallel_state.get_tensor_model_parallel_group()
        return likeliest_token(logits.chunk(ranks, -1)[group.rank()].contiguous(), vocab_size, group)
