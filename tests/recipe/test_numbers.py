"""Every number of the schema: nonsense is refused by the field's name, and what is not refused can be planned."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Optional

import pytest

from nano_pretrain.compose import compose
from nano_pretrain.data.phases import phase_lengths
from nano_pretrain.plan.whole import make_plan
from nano_pretrain.recipe.derived import stage_tokens
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.explain import check_truths
from nano_pretrain.recipe.rules import check
from nano_pretrain.recipe.schema import Recipe
from nano_pretrain.schedule.learning_rate import validate_schedule

HUGE = 10**30
NONSENSE: dict[Any, tuple[float, ...]] = {
    int: (-1, 0, HUGE, -HUGE),
    float: (-1.0, 0.0, float(HUGE), -float(HUGE), math.nan, math.inf, -math.inf),
}
"""OmegaConf lets nothing but whole numbers through where the schema says int."""

SENSE = {
    **dict.fromkeys(("every", "fp8_every", "seed", "warmup_tokens", "decay_tokens", "min_lr", "temperature"), (0,)),
    **dict.fromkeys(("bf16_first_linears", "bf16_last_linears", "ramp_tokens", "start", "increment"), (0,)),
    **dict.fromkeys(("beta1", "beta2", "weight_decay"), (0,)),
    # No gradient is ever scaled down.
    "clip_grad": (float(HUGE),),
}
"""Last name of a field -> which of `NONSENSE` means something there; tests/train/test_extremes.py trains with it."""


OPTIONAL = {Optional[kind]: kind for kind in (int, float, bool)}


@cache
def tiny() -> Recipe:
    """Never changed."""
    return compose(["recipe=tiny", "plan.hardware=cpu", "data.path=nowhere"]).recipe


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every field that holds a value; of stages and phases, of the first."""
    hints = typing.get_type_hints(type(node))
    for item in fields(node):
        name, value = prefix + item.name, getattr(node, item.name)
        if is_dataclass(value):
            yield from leaves(value, f"{name}.")
        elif isinstance(value, dict) and any(map(is_dataclass, value.values())):
            key, first = next(iter(value.items()))
            yield from leaves(first, f"{name}.{key}.")
        else:
            yield name, OPTIONAL.get(hints[item.name], hints[item.name])


NUMBERS = [(name, value) for name, kind in leaves(tiny()) for value in NONSENSE.get(kind, ())]
TRUTHS = [name for name, kind in leaves(tiny()) if kind is bool]


def test_the_walk_finds_what_is_there() -> None:
    found = {name for name, _ in NUMBERS}
    assert {"model.hidden_size", "stages.pretrain.phases.p1.share", "generate.checkpoint", "cluster.gpus"} <= found
    assert len(found) >= 50
    assert {"dry_run", "parallel.distributed_optimizer"} <= set(TRUTHS)


@pytest.mark.parametrize(("name", "value"), NUMBERS, ids=[f"{name}={value:g}" for name, value in NUMBERS])
def test_nonsense_is_refused_by_name_and_nothing_else_is(name: str, value: float) -> None:
    recipe = deepcopy(tiny())
    *path, last = name.split(".")
    node: Any = recipe
    for part in path:
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    setattr(node, last, value)
    if value in SENSE.get(last, ()):
        _check(recipe)
        make_plan(recipe)
        return
    with pytest.raises(RecipeError) as refusal:
        _check(recipe)
    assert refusal.value.field == name


def _check(recipe: Recipe) -> None:
    """What `compose` asks of a recipe."""
    check(recipe)
    for name, stage in recipe.stages.items():
        validate_schedule(stage.schedule, stage_tokens(stage), f"stages.{name}.schedule")
        phase_lengths(f"stages.{name}", stage)


@pytest.mark.parametrize("name", TRUTHS)
@pytest.mark.parametrize("value", ["-1", "2", "1e30", "1_0"])
def test_a_number_is_neither_true_nor_false(name: str, value: str) -> None:
    with pytest.raises(RecipeError, match=f"'{value}' is neither true nor false; write one of them") as refusal:
        check_truths(tiny(), ["recipe=tiny", f"++{name}={value}"])
    assert refusal.value.field == name


def test_what_is_true_or_false_or_no_truth_at_all_passes() -> None:
    truths = [f"{name}={value}" for name in TRUTHS for value in ("true", "false", "0", "1", "yes")]
    check_truths(tiny(), [*truths, "model.hidden_size=2", "run.name=2", "~launch", "+model.nothing=2", "hello"])
