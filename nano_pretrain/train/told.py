"""Whether what a run is told in mid-run can still be done: only what lies ahead may change."""

from __future__ import annotations

from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.stage_plan import StagePlan
from nano_pretrain.recipe.acts import Act
from nano_pretrain.recipe.derived import stage_tokens
from nano_pretrain.recipe.errors import RecipeError


def check_act(act: Act, curriculum: Curriculum) -> None:
    """Refuse an act that would change the past.

    Args:
        act: what the run is told.
        curriculum: what it reads without it.

    Raises:
        RecipeError: the stage or phase has begun, or is over.
    """
    _, name, *rest = act.field.split(".")
    stage = next(stage for stage in curriculum.stages if stage.name == name)
    if act.tokens >= stage.end_tokens:
        _refuse(act, f"stage {name} ended after {stage.end_tokens:,} tokens")
    ramp = stage.config.batch_ramp
    grown = stage.start_tokens + ramp.ramp_tokens
    if rest == ["global_batch_size"] and ramp.start and act.tokens < grown:
        problem = f"the batch of stage {name} grows until {grown:,} tokens"
        raise RecipeError(act.field, problem, "change it after that")
    if rest == ["schedule", "extend_to"]:
        _check_end(act, stage)
    elif rest[0] == "phases":
        _check_phase(act, stage, rest[1])


def _check_end(act: Act, stage: StagePlan) -> None:
    """A schedule goes on as it was until the decay begins, which has not begun."""
    schedule, consumed = stage.config.schedule, act.tokens - stage.start_tokens
    if consumed <= 0:
        return
    decay = {"wsd": schedule.decay_tokens, "cosine": stage_tokens(stage.config) - schedule.warmup_tokens}
    tokens = decay.get(schedule.kind, 0)
    begins = stage_tokens(stage.config) - tokens
    if consumed > begins:
        _refuse(act, f"the decay of stage {stage.name} began after {stage.start_tokens + begins:,} tokens")
    if schedule.kind == "cosine":
        _refuse(act, f"the cosine of stage {stage.name} depends on its end from the warm-up on")
    length = stage.config.tokens if act.after is None else act.after
    if length < consumed + tokens:
        problem = f"{length} is less than the {consumed} tokens consumed and the {tokens} of the decay"
        raise RecipeError(act.field, problem, f"write at least {consumed + tokens}")


def _check_phase(act: Act, stage: StagePlan, name: str) -> None:
    phase = next((phase for phase in stage.phases if phase.name == name), None)
    if phase is not None and phase.start_tokens < act.tokens:
        _refuse(act, f"phase {name} began after {phase.start_tokens:,} tokens")


def _refuse(act: Act, problem: str) -> None:
    raise RecipeError(
        act.field,
        f"{problem}, and the run has consumed {act.tokens:,}: it can change no more",
        "leave it out, or choose another run.name",
    )
