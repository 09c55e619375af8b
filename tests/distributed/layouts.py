"""The layouts that are compared with one rank, and courses that are taken once, when a test first asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from nano_pretrain.recipe.schema import ParallelConfig, Recipe
from tests.distributed import comparing, courses
from tests.distributed.batches import Samples, samples
from tests.distributed.comparing import Differences
from tests.distributed.courses import END, Course, Layout, Mistake
from tests.distributed.ranks import run_ranks
from tests.distributed.training import Steps
from tests.model.recipes import small_recipe

T = TypeVar("T")

MIXER_BUCKETS = 300
"""Bucket size with which a mixer's convolution and norm share a bucket, and in_proj has one of its own."""

LAYOUTS = {
    "one rank": Layout(1, ParallelConfig()),
    "TP2": Layout(2, ParallelConfig(tensor=2)),
    "TP2 with SP": Layout(2, ParallelConfig(tensor=2, sequence=True)),
    "TP4": Layout(4, ParallelConfig(tensor=4)),
    "PP2": Layout(2, ParallelConfig(pipeline=2)),
    "PP2, written split": Layout(2, ParallelConfig(pipeline=2, pipeline_layers=[2, 7])),
    "PP4": Layout(4, ParallelConfig(pipeline=4)),
    "PP4, written split": Layout(4, ParallelConfig(pipeline=4, pipeline_layers=[3, 1, 3, 2])),
    "CP2": Layout(2, ParallelConfig(context=2)),
    "CP2, plain kernels": Layout(2, ParallelConfig(context=2), kernels="plain"),
    "CP4": Layout(4, ParallelConfig(context=4)),
    "DP2": Layout(2, ParallelConfig()),
    "DP2, many buckets": Layout(2, ParallelConfig(bucket_size=MIXER_BUCKETS)),
    "DP2, no overlap": Layout(2, ParallelConfig(overlap=False)),
    "one rank, replicated": Layout(1, ParallelConfig(distributed_optimizer=False)),
    "DP2, replicated": Layout(2, ParallelConfig(distributed_optimizer=False)),
    "DP4": Layout(4, ParallelConfig(bucket_size=2000), micro_batch=1),
    "DP4, replicated": Layout(4, ParallelConfig(distributed_optimizer=False, bucket_size=2000), micro_batch=1),
    "TP2, replicated": Layout(2, ParallelConfig(tensor=2, distributed_optimizer=False)),
    "TP2 x PP2": Layout(4, ParallelConfig(tensor=2, pipeline=2)),
    "TP2 x CP2 with SP": Layout(4, ParallelConfig(tensor=2, context=2, sequence=True)),
    "PP2 x CP2": Layout(4, ParallelConfig(pipeline=2, context=2)),
    "CP2 x DP2": Layout(4, ParallelConfig(context=2, bucket_size=1)),
    "TP2 x PP2 x DP2": Layout(8, ParallelConfig(tensor=2, pipeline=2, bucket_size=2000)),
    "TP2 x CP2 x DP2": Layout(8, ParallelConfig(tensor=2, context=2)),
    "TP2 x PP2 x CP2 with SP": Layout(8, ParallelConfig(tensor=2, pipeline=2, context=2, sequence=True)),
    # Of the four groups, ranks that share a sequence hold the same one.
    "TP4 x CP2": Layout(8, ParallelConfig(tensor=4, context=2)),
}
"""By name; "replicated" is the optimizer that is not distributed."""

QUICK = ("TP2 with SP", "PP2", "CP2", "DP2, many buckets", "DP4, replicated")
"""What `make test` takes; with them all that changes in a layout is tested at least once."""

GRADIENTS = 1e-5
"""Largest difference of the gradient of a tensor: sums in another order.

In a bias whose gradient is the rest of thousands of terms that cancel, FP32's 6e-8 becomes up to 4e-6 (measured).
"""
REPORTED = 1e-6
"""Of a loss or a gradient norm over ten steps; measured up to 4e-7."""
WEIGHTS = 5e-6
"""Of a tensor of weights after ten steps; measured up to 1.5e-6."""
MOMENTS = 3e-5
"""Of a tensor of moments: means of gradients that change their sign, so as in GRADIENTS; measured up to 1.1e-5."""


def some_quick(values: Iterable[T], quick: Sequence[T]) -> list[Any]:
    """Test parameters; those that are not quick are for `make test-full`."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.full) for value in values]


def course_recipe(precision: str, corpus: Path) -> Recipe:
    """Nine layers, divided by their FLOPs so that each pipeline position has attention; TP4 divides all widths.

    Of the 1,024 rows of the padded vocabulary, TP4 gives two ranks true ones only, the next some of both, and the last
    only padding. The gradient is clipped in every step. Adam's epsilon is a hundredth of a usual element of it and
    keeps those that are nothing but rounding from moving by the learning rate in either direction.
    """
    widths = {"num_attention_heads": 8, "num_query_groups": 4, "mamba_num_heads": 8, "mamba_num_groups": 4}
    recipe = small_recipe(precision, corpus=corpus, pattern="M*M-*M*-*", vocab_size=600, **widths)
    stage = recipe.stages["pretrain"]
    stage.tokens = END * stage.global_batch_size * stage.sequence_length
    recipe.optimizer.clip_grad = 0.5
    recipe.optimizer.eps = 1e-5
    return recipe


@dataclass(frozen=True)
class Taken:
    """A course and where it differs from one rank's of as many steps.

    Attributes:
        steps: equal on all ranks.
        copies_that_differ: parameters of which two ranks have unlike copies.
        samples: what the models were given.
        initial: differences of the weights as the layout initialises them.
        gradients: of the first step's gradients.
        weights: of the weights at the last step that was saved.
        moments: of the optimizer's state there.
    """

    steps: Steps
    copies_that_differ: list[str]
    samples: Samples
    initial: Differences
    gradients: Differences
    weights: Differences
    moments: Differences


class Courses:
    """The courses of all layouts from one checkpoint, which one rank wrote.

    Args:
        recipe: from `course_recipe`.
        start: from `courses.write_start`.
        directory: an empty one.
    """

    def __init__(self, recipe: Recipe, start: Path, directory: Path) -> None:
        self.recipe = recipe
        self.start = start
        self.directory = directory
        self._taken: dict[str, Taken] = {}

    def of(self, name: str) -> Taken:
        """The course of a layout by its name."""
        if name not in self._taken:
            self._taken[name] = self.take(LAYOUTS[name], self.directory / name)
        return self._taken[name]

    def take(self, layout: Layout, directory: Path, mistake: Mistake = nullcontext, end: int = END) -> Taken:
        """The course of a layout, with a mistake, up to a step."""
        arguments = (self.of_layout(layout), layout, self.start, directory, mistake, end)
        found: list[Course] = run_ranks(courses.take, layout.ranks, *arguments)
        assert all(course.steps == found[0].steps for course in found), "every rank reports the same"
        expected = directory if directory.name == "one rank" else self._one_rank()
        names = ("initial", "gradients", str(end))
        initial, gradients, last = differences([(expected / name, directory / name) for name in names])
        moments = {name: value for name, value in last.items() if name.startswith("optimizer.")}
        weights = {name: value for name, value in last.items() if name not in moments}
        copies = sorted({name for course in found for name in course.copies_that_differ})
        given = samples([course.fed for course in found], end)
        return Taken(found[0].steps, copies, given, initial, gradients, weights, moments)

    def resume(self, layout: Layout, source: Path, directory: Path, begin: int, end: int) -> Steps:
        """Steps after `begin` up to `end` of a run in `source` in another layout, which saves both in `directory`."""
        arguments = (self.of_layout(layout), layout, source, directory, begin, end)
        found: list[Steps] = run_ranks(courses.resume, layout.ranks, *arguments)
        assert all(steps == found[0] for steps in found)
        return found[0]

    def of_layout(self, layout: Layout) -> Recipe:
        """The recipe with the layout's micro-batches."""
        stage = replace(self.recipe.stages["pretrain"], micro_batch_size=layout.micro_batch)
        return replace(self.recipe, stages={"pretrain": stage})

    def _one_rank(self) -> Path:
        self.of("one rank")
        return self.directory / "one rank"


def differences(pairs: Sequence[tuple[Path, Path]]) -> list[Differences]:
    """See `comparing.differences`."""
    found: list[list[Differences]] = run_ranks(comparing.differences, 1, pairs)
    return found[0]


def misfits(taken: Taken, one_rank: Taken) -> set[str]:
    """What of a course, which may be shorter, is not equal to one rank's; empty where all is right."""
    steps = len(taken.steps.losses)
    checks = {
        "samples": all(
            np.array_equal(taken.samples[field], one_rank.samples[field][:steps]) for field in taken.samples
        ),
        "initial weights": all(value == 0 for value in taken.initial.values()),
        "losses": close(taken.steps.losses, one_rank.steps.losses),
        "gradient norms": close(taken.steps.grad_norms, one_rank.steps.grad_norms),
        "gradients": max(taken.gradients.values()) < GRADIENTS,
        "weights": max(taken.weights.values()) < WEIGHTS,
        "moments": max(taken.moments.values()) < MOMENTS,
        "copies": not taken.copies_that_differ,
    }
    return {name for name, good in checks.items() if not good}


def close(actual: list[float], expected: list[float], tolerance: float = REPORTED) -> bool:
    """Whether the first of the expected values are the actual ones."""
    return actual == pytest.approx(expected[: len(actual)], rel=tolerance)
