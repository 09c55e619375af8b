"""Small curricula over sources of which nothing but the sizes exists."""

from __future__ import annotations

from typing import Any

from hypothesis import reject
from hypothesis import strategies as st

from nano_pretrain.data.curriculum import Curriculum, SampleAddress
from nano_pretrain.data.ranges import SourceSize
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import DataConfig, PhaseConfig, Recipe, StageConfig

KNOWN = {"code": SourceSize((4000,)), "math": SourceSize((3000,)), "web": SourceSize((9000,))}


@st.composite
def sizes(draw: st.DrawFn) -> SourceSize:
    """A source whose documents all have the same length; its first generation has a sample of any stage."""
    added = draw(st.lists(st.integers(0, 400), max_size=2))
    document = draw(st.integers(1, 100))
    return SourceSize((draw(st.integers(41, 6000)), *added), lambda token: token - token % document)


def stage(tokens: int, phases: dict[str, PhaseConfig], sequence_length: int = 8, batch: int = 4) -> StageConfig:
    return StageConfig(tokens=tokens, sequence_length=sequence_length, global_batch_size=batch, phases=phases)


def recipe(stages: dict[str, StageConfig], window: int = 10, max_epochs: float = 1e9, seed: int = 1) -> Recipe:
    return Recipe(data=DataConfig(quota_window=window, max_epochs=max_epochs, seed=seed), stages=stages)


def share(value: float, **blend: Any) -> PhaseConfig:
    return PhaseConfig(share=value, blend=blend)


def two_stages() -> Recipe:
    pretrain = stage(3200, {"p1": share(0.6, web=3, code=1), "p2": share(0.3, web=1, code=1), "p3": share(0.1, math=1)})
    extension = stage(600, {"long": PhaseConfig(tokens=600, blend={"math": 1, "web": 4})}, sequence_length=32, batch=2)
    return recipe({"pretrain": pretrain, "extension": extension})


def everything(curriculum: Curriculum) -> list[SampleAddress]:
    addresses, tokens = [], 0
    while tokens < curriculum.total_tokens:
        now = curriculum.stage_at(tokens)
        addresses += curriculum.samples(tokens, range(now.global_batch_size))
        tokens += now.tokens_per_step
    return addresses


@st.composite
def curricula(draw: st.DrawFn) -> Curriculum:
    stages = {}
    for name in draw(st.permutations(["alpha", "beta", "gamma"]))[: draw(st.integers(1, 3))]:
        weights = st.dictionaries(st.sampled_from(sorted(KNOWN)), st.integers(1, 50), min_size=1)
        length, batch = draw(st.integers(1, 40)), draw(st.integers(1, 9))
        phases = {
            phase: PhaseConfig(tokens=draw(st.integers(length * batch, 12 * length * batch)), blend=draw(weights))
            for phase in draw(st.sampled_from([["x"], ["x", "y"], ["z", "x", "y"]]))
        }
        for phase in list(phases.values())[1:]:
            phase.ramp_tokens = draw(st.sampled_from([0, 0, phase.tokens or 0]))
        stages[name] = stage(sum(phase.tokens or 0 for phase in phases.values()), phases, length, batch)
    known = {name: draw(sizes()) for name in KNOWN}
    try:
        return Curriculum(recipe(stages, window=draw(st.integers(1, 64)), seed=draw(st.integers(0, 9))), known)
    except RecipeError as error:
        if not error.field.endswith("ramp_tokens"):
            raise
        reject()
