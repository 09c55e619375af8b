"""Learning-rate schedules on the token clock: warmup-stable-decay, cosine, constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import ScheduleConfig

KINDS = ("wsd", "cosine", "constant")


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _minus_sqrt(progress: float) -> float:
    return 1.0 - math.sqrt(progress)


DECAY_SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "minus_sqrt": _minus_sqrt,
}
"""Share of the way from `min_lr` up to `lr` that is left, as a function of the progress of the decay in [0, 1]."""


def learning_rate(schedule: ScheduleConfig, stage_tokens: int, consumed_in_stage: int) -> float:
    """Learning rate of the step that ends after `consumed_in_stage` tokens of a stage of `stage_tokens` tokens.

    Warm-up is linear from 0 to `lr`. Then `wsd` (Hu et al. 2024, arXiv 2404.06395) stays at `lr` until the last
    `decay_tokens`; `minus_sqrt` is the 1 - sqrt(x) cooldown of Haegele et al. 2024 (arXiv 2405.18392). `cosine`
    (Loshchilov and Hutter 2017, arXiv 1608.03983) decays from the end of the warm-up. Both end at `min_lr`;
    `constant` stays at `lr`. At the borders of these parts the result is exactly `lr` or `min_lr`. The last step of
    a stage may end after `stage_tokens` and counts as ending there.

    Raises:
        ValueError: `consumed_in_stage` is negative.
    """
    if consumed_in_stage < 0:
        raise ValueError(f"consumed_in_stage is {consumed_in_stage}; tokens consumed cannot be negative")
    consumed = min(consumed_in_stage, stage_tokens)
    if consumed < schedule.warmup_tokens:
        return schedule.lr * (consumed / schedule.warmup_tokens)
    start, shape = _decay(schedule, stage_tokens)
    if consumed <= start:
        return schedule.lr
    remaining = shape((consumed - start) / (stage_tokens - start))
    return schedule.lr * remaining + schedule.min_lr * (1.0 - remaining)


def _decay(schedule: ScheduleConfig, stage_tokens: int) -> tuple[int, Callable[[float], float]]:
    """Tokens of the stage at which the decay begins (its end where there is none), and the decay's shape."""
    if schedule.kind == "wsd":
        return stage_tokens - schedule.decay_tokens, DECAY_SHAPES[schedule.decay_shape]
    if schedule.kind == "cosine":
        return schedule.warmup_tokens, _cosine
    return stage_tokens, _linear


def validate_schedule(schedule: ScheduleConfig, stage_tokens: int, field: str) -> None:
    """Check a schedule against the length of its stage.

    Args:
        schedule: what the recipe says.
        stage_tokens: tokens of the stage.
        field: dotted name of the schedule, for example "stages.pretrain.schedule".

    Raises:
        RecipeError: an unknown kind or shape, a number that the kind does not use, `min_lr` above `lr`, or a warm-up
            and decay that do not fit into the stage.
    """
    _check_choice(f"{field}.kind", schedule.kind, KINDS)
    _check_choice(f"{field}.decay_shape", schedule.decay_shape, tuple(DECAY_SHAPES))
    _check_unused(schedule, field)
    if schedule.min_lr > schedule.lr:
        problem = f"{schedule.min_lr} is above the peak {field}.lr={schedule.lr}"
        raise RecipeError(f"{field}.min_lr", problem, "lower min_lr or raise lr")
    _check_lengths(schedule, stage_tokens, field)


def check_end(schedule: ScheduleConfig, field: str) -> None:
    """Check that `extend_to` leaves room for warm-up and decay.

    Raises:
        RecipeError: it does not.
    """
    warmup, decay = schedule.warmup_tokens, schedule.decay_tokens if schedule.kind == "wsd" else 0
    if schedule.extend_to is not None and schedule.extend_to < warmup + decay:
        problem = f"{schedule.extend_to} is less than the {warmup} tokens of warm-up and the {decay} of the decay"
        raise RecipeError(f"{field}.extend_to", problem, f"write at least {warmup + decay}")


def _check_unused(schedule: ScheduleConfig, field: str) -> None:
    """Refuse what is written for another kind; of a constant rate, `min_lr` may say that it ends as it is."""
    unused = schedule.kind == "constant" and schedule.min_lr not in (0, schedule.lr)
    for name, nothing in (("min_lr", unused), ("decay_tokens", schedule.kind != "wsd" and schedule.decay_tokens)):
        if nothing:
            problem = f"{getattr(schedule, name)} does nothing with {field}.kind={schedule.kind}"
            raise RecipeError(f"{field}.{name}", problem, f"write {field}.{name}=0, or another kind")


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RecipeError(field, f"unknown value {value!r}", f"write one of {', '.join(choices)}")


def _check_lengths(schedule: ScheduleConfig, stage_tokens: int, field: str) -> None:
    warmup = schedule.warmup_tokens
    if warmup > stage_tokens:
        problem = f"{warmup} is more than the {stage_tokens} tokens of the stage"
        raise RecipeError(f"{field}.warmup_tokens", problem, f"write at most {stage_tokens}")
    if schedule.kind == "wsd" and warmup + schedule.decay_tokens > stage_tokens:
        problem = f"{schedule.decay_tokens} and {warmup} tokens of warm-up are more than the stage's {stage_tokens}"
        raise RecipeError(f"{field}.decay_tokens", problem, f"write at most {stage_tokens - warmup}")
