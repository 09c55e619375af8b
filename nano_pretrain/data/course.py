"""The steps of a stage and the ends of its phases, with what the run was told in mid-run."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from math import ceil
from typing import Any

from nano_pretrain.data.phases import phase_lengths
from nano_pretrain.recipe.acts import Act
from nano_pretrain.recipe.derived import batch_sizes, stage_tokens
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.rules_stages import check_ramp
from nano_pretrain.recipe.schema import StageConfig
from nano_pretrain.schedule.clock import TokenClock


def stage_clock(name: str, first: StageConfig, now: StageConfig, acts: Sequence[Act], start: int) -> TokenClock:
    """The steps of a stage.

    Args:
        name: of the stage.
        first: as the run began with it.
        now: with all acts.
        acts: of the run.
        start: tokens the run has consumed before it.

    Raises:
        RecipeError: the batch does not grow by equal steps, before the stage is over.
    """
    check_ramp(name, first)
    sizes = batch_sizes(first)
    for at, size in _of(f"stages.{name}.global_batch_size", acts, start):
        sizes = [*(earlier for earlier in sizes if earlier[0] < at), (at, size)]
    steps = [(at, samples * now.sequence_length) for at, samples in sizes]
    return TokenClock(start, stage_tokens(now), steps[0][1], tuple(steps[1:]))


def step_batches(name: str, stage: StageConfig) -> list[int]:
    """Samples of the steps of a stage, each number that there is, in a run that is told nothing in mid-run.

    Raises:
        RecipeError: as `stage_clock`.
    """
    return [size // stage.sequence_length for size, _ in stage_clock(name, stage, stage, (), 0).runs]


def phase_ends(name: str, first: StageConfig, acts: Sequence[Act], start: int) -> dict[str, Fraction]:
    """Tokens of the stage at which each phase ends, in order.

    An end that was passed stays where it was when the stage is extended; the others keep their share of it, and none
    comes before the moment of the act.

    Args:
        name: of the stage.
        first: as the run began with it.
        acts: of the run.
        start: tokens the run has consumed before it.
    """
    lengths = phase_lengths(f"stages.{name}", first)
    shares = [end / first.tokens for end in accumulate(lengths.values())]
    ends = [share * stage_tokens(first) for share in shares]
    for at, tokens in _of(f"stages.{name}.schedule.extend_to", acts, start):
        length = first.tokens if tokens is None else tokens
        moved = (max(share * length, Fraction(at)) for share in shares)
        ends = [end if end <= at else later for end, later in zip(ends, moved, strict=True)]
    return dict(zip(lengths, ends, strict=True))


def told_ends(name: str, acts: Sequence[Act], start: int) -> set[Fraction]:
    """Where in a stage it was told to end sooner, or later: phases that would have ended before end there."""
    return {Fraction(at) for at, _ in _of(f"stages.{name}.schedule.extend_to", acts, start)}


def without_step(
    name: str, phase: str, first: StageConfig, now: StageConfig, acts: Sequence[Act], clock: TokenClock
) -> RecipeError:
    """The refusal of a phase in which no step begins: of what the run was told last, if that is why.

    Args:
        name: of the stage.
        phase: of the phase.
        first: the stage as the run began with it.
        now: with all acts.
        acts: of the run.
        clock: steps of the stage.
    """
    batch, end = f"stages.{name}.global_batch_size", f"stages.{name}.schedule.extend_to"
    moment = acts[-1].tokens if acts else 0
    told = [act.field for act in acts if act.tokens == moment and act.field in (batch, end)]
    ends = phase_ends(name, first, acts, clock.start_tokens)
    begins = dict(zip(ends, [Fraction(0), *ends.values()], strict=False))
    step = clock.sizes_from(clock.border_from(begins[phase]))[0]
    problem = f"no step of {step} tokens begins in phase {phase}"
    ahead = [part for part in ends if ends[part] >= moment - clock.start_tokens]
    if told[-1:] == [batch]:
        shortest = min(ends[part] - begins[part] for part in ahead if ends[part] > begins[part])
        return RecipeError(batch, problem, f"write at most {max(1, shortest // now.sequence_length)}")
    if told or stage_tokens(now) < first.tokens:
        lengths = phase_lengths(f"stages.{name}", first)
        share = min(lengths[part] for part in ahead) / first.tokens
        least = ceil(now.global_batch_size * now.sequence_length / share)
        return RecipeError(end, problem, f"write at least {least}")
    field = f"stages.{name}.phases.{phase}"
    return RecipeError(field, f"no step of {step} tokens begins in it", "make it longer or leave it out")


def _of(field: str, acts: Sequence[Act], start: int) -> list[tuple[int, Any]]:
    """When in the stage a field was changed, and to what, ascending: what is told holds from its moment on."""
    found: list[tuple[int, Any]] = []
    for act in acts:
        if act.field == field:
            at = max(act.tokens - start, 0)
            found = [*(earlier for earlier in found if earlier[0] < at), (at, act.after)]
    return found
