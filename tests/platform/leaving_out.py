"""What a rank does to show what an adaptation is for: the whole way of a run, without it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano_pretrain.parallel.groups import process_groups, ranks_from_environment
from nano_pretrain.platform import Platform, cpu, current_platform
from tests.model.recipes import small_recipe


@dataclass(frozen=True)
class Outcome:
    """How far a run came.

    Attributes:
        losses: of each step before the checkpoint, and of each after it in the same process.
        resumed: of each step of a second model after it has loaded the checkpoint.
        error: the exception that ended it, with its type.
    """

    losses: list[float]
    resumed: list[float]
    error: str | None


def run_without(name: str | None, directory: Path) -> Outcome:
    """Build, train, save, train on; build again, load, train: with all adaptations but one."""
    if name == cpu.tensors_as_cuda.__name__:
        cpu.tensors_as_cuda = nullcontext  # type: ignore[assignment]
    cpu.ADAPTATIONS = tuple(adaptation for adaptation in cpu.ADAPTATIONS if adaptation.__name__ != name)
    outcome = Outcome([], [], None)
    try:
        _run(directory, outcome)
    except Exception as error:
        return Outcome(outcome.losses, outcome.resumed, f"{type(error).__name__}: {error}")
    return outcome


def _run(directory: Path, outcome: Outcome) -> None:
    from megatron.core import dist_checkpointing

    from nano_pretrain.checkpoint.sharded import load_checkpoint, sharded_state

    platform = current_platform()
    platform.prepare(0, threads=1)
    recipe = small_recipe("bf16")
    with process_groups(platform, ranks_from_environment(), recipe.parallel, timeout_seconds=60):
        trainable = _trainable(platform, recipe)
        outcome.losses.extend(_steps(trainable, recipe, range(2)))
        with platform.optimizer_scope():
            dist_checkpointing.save(sharded_state(trainable.model, trainable.optimizer, False), str(directory))
        outcome.losses.extend(_steps(trainable, recipe, range(2, 5)))
        again = _trainable(platform, recipe)
        with platform.optimizer_scope():
            load_checkpoint(directory, again.model, again.optimizer)
        outcome.resumed.extend(_steps(again, recipe, range(2, 5)))


def _trainable(platform: Platform, recipe: Any) -> Any:
    from nano_pretrain.train.step import Trainable
    from tests.model.building import build

    return Trainable(recipe, recipe.parallel, platform, build(platform, recipe))


def _steps(trainable: Any, recipe: Any, numbers: range) -> list[float]:
    from tests.model.building import batch

    return [
        trainable.step(iter([batch(recipe, seed=number)]), 1, (48, 2), lr=1e-2, stop=False).loss for number in numbers
    ]
