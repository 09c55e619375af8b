"""What a machine cannot hold is refused before anything is built; the smallest and largest numbers do train."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from nano_pretrain.compose import compose
from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.ranges import SourceSize
from nano_pretrain.parallel.groups import Ranks
from nano_pretrain.plan.memory import stage_memory
from nano_pretrain.platform.base import Memory
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import ParallelConfig, Recipe
from nano_pretrain.train.run import _check_room
from tests.train.small_run import STEPS, SmallRuns, exit_json, steps

ZEROS = [
    *(f"{section}.every=0" for section in ("validation", "checkpoint", "log")),
    *(f"optimizer.{name}=0" for name in ("beta1", "beta2", "weight_decay")),
    *(f"stages.pretrain.schedule.{name}=0" for name in ("min_lr", "warmup_tokens", "decay_tokens")),
    *("run.seed=0", "data.seed=0", "generate.seed=0", "generate.temperature=0", "validation.prompts=[ab]"),
    *("generate.max_new_tokens=1", "log.tensorboard=true"),
]
LARGEST = [
    "optimizer.clip_grad=1e30", "data.max_epochs=1000000", "checkpoint.keep=1000000", "cluster.peak_tflops=1000000",
    "cluster.timeout_seconds=10000000", f"parallel.bucket_size={10**12}",
]  # fmt: skip


def test_a_model_that_the_machine_cannot_hold_is_refused_at_once(small: SmallRuns) -> None:
    done = small.run("train", "too_large", "model.hidden_size=65536", "model.ffn_hidden_size=1000000", timeout=30)
    has = f"{psutil.virtual_memory().total / 1e9:.1f}"
    line = rf"nano-pretrain: stages\.pretrain: needs \d{{4}}\.\d GB on its largest rank, this machine has {has} GB; .*"
    assert done.code == 2
    assert re.fullmatch(line, done.text.strip()), done.text
    assert {path.name for path in small.path("too_large").iterdir()} == {".lock", "exit.json"}
    assert exit_json(small.path("too_large"))["code"] == 2


@pytest.fixture
def two_stages() -> Recipe:
    """A stage and one with 16 times its activations."""
    recipe = compose(["recipe=tiny", "extension=none", "cluster.gpus=1"]).recipe
    first = recipe.stages["pretrain"]
    second = replace(
        first, micro_batch_size=16 * first.micro_batch_size, global_batch_size=16 * first.global_batch_size
    )
    return replace(recipe, stages={"pretrain": first, "later": second})


def check_room(recipe: Recipe, begun: int, world_size: int, memory: Memory) -> None:
    """What a CPU rank is asked whose next stage is number `begun`."""
    sizes = dict.fromkeys(recipe.stages["pretrain"].phases["p1"].blend, SourceSize((10**12,)))
    stages = Curriculum(recipe, sizes).stages
    machine: Any = SimpleNamespace(name="cpu", memory=lambda local_rank: memory)
    _check_room(recipe, machine, Ranks(0, world_size, 0), stages[begun:])


def test_what_these_ranks_train_has_room(two_stages: Recipe) -> None:
    need = {name: stage_memory(two_stages, name, platform="cpu")[0].total for name in two_stages.stages}
    assert need["pretrain"] < need["later"]
    check_room(two_stages, 0, 1, Memory("this machine", need["later"]))
    little = Memory("this machine", need["later"] - 1)
    for begun in (0, 1):
        with pytest.raises(RecipeError, match=r"^stages\.later: needs .*; write recompute\.granularity=selective$"):
            check_room(two_stages, begun, 1, little)
    # On another layout it is for other ranks, perhaps on another machine.
    elsewhere = replace(two_stages.stages["later"], parallel=ParallelConfig(tensor=2))
    check_room(replace(two_stages, stages={**two_stages.stages, "later": elsewhere}), 0, 1, little)


def test_the_ranks_that_were_started_count(two_stages: Recipe) -> None:
    alone = stage_memory(two_stages, "later", platform="cpu")[0].total
    # Two share the optimizer's state, and each keeps weights, gradients and activations of its own.
    check_room(two_stages, 1, 2, Memory("a machine each", alone - 1))
    with pytest.raises(RecipeError, match="on 2 ranks together"):
        check_room(two_stages, 1, 2, Memory("one machine", alone, ranks=2))


@pytest.mark.full
def test_a_run_with_the_smallest_and_largest_numbers(small: SmallRuns) -> None:
    done = small.run("train", "extremes", *ZEROS, *LARGEST)
    assert done.code == 0, done.text
    assert steps(small.path("extremes")) == STEPS
