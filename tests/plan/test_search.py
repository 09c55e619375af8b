"""The search lists what the rules and the memory allow, fastest first, and says why the rest does not go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nano_pretrain.plan import search as module
from nano_pretrain.plan.memory import stage_memory
from nano_pretrain.plan.search import Candidate, Search, search_stage
from nano_pretrain.plan.step_time import step_time
from nano_pretrain.recipe.rules import check
from nano_pretrain.recipe.schema import ParallelConfig, Recipe, RecomputeConfig
from tests.plan.recipes import STAGE, device, named

TRIED = len(module.TENSOR) * len(module.PIPELINE) * len(module.CONTEXT) * len(module.MICRO_BATCHES)
H100 = device("h100")


@pytest.fixture(scope="module")
def found() -> Search:
    return search_stage(named("nano_12b_v2", "plan.search=true"), STAGE, H100, 1.0)


def laid_out(recipe: Recipe, candidate: Candidate) -> Recipe:
    """The recipe with a candidate's layout."""
    sizes = (candidate.tensor, candidate.pipeline, candidate.context)
    stage = replace(
        recipe.stages[STAGE],
        parallel=ParallelConfig(*sizes, sequence=candidate.tensor > 1),
        micro_batch_size=candidate.micro_batch_size,
    )
    stages = {**recipe.stages, STAGE: stage}
    return replace(recipe, stages=stages, recompute=RecomputeConfig(candidate.recompute))


def test_every_layout_is_listed_or_explained(found: Search) -> None:
    assert len(found.fitting) + sum(reason.layouts for reason in found.rejected) == TRIED
    assert found.devices == 5888


def test_what_is_listed_passes_the_rules_and_fits_and_is_as_fast_as_it_says(found: Search) -> None:
    recipe = named("nano_12b_v2")
    assert H100.memory_bytes is not None
    for candidate in found.fitting:
        trial = laid_out(recipe, candidate)
        check(trial)
        memory = max(rank.total for rank in stage_memory(trial, STAGE))
        assert memory == candidate.memory_bytes <= H100.memory_bytes
        assert step_time(trial, STAGE, H100).total == candidate.step_seconds
        ranks = candidate.tensor * candidate.pipeline * candidate.context * candidate.data
        assert ranks == found.devices


def test_the_fastest_comes_first(found: Search) -> None:
    times = [candidate.step_seconds for candidate in found.fitting]
    assert times == sorted(times)
    own = step_time(named("nano_12b_v2"), STAGE, H100).total
    assert times[0] <= own
    assert own in times, "the recipe's own layout is one of them"


def test_reasons_name_a_rule_once_with_an_example(found: Search) -> None:
    texts = [reason.text for reason in found.rejected]
    assert len(texts) < 8
    assert sum("model.pattern: 62 is not divisible by" in text for text in texts) == 1
    pipeline = next(reason for reason in found.rejected if "model.pattern" in reason.text)
    assert pipeline.example.startswith("TP1 PP3 CP1")
    # 14 of 16 positions, with 1 to 8 tensor-parallel ranks but not 4 x 64, 8 x 32 and 8 x 64 with context.
    assert pipeline.layouts == 14 * (4 * 7 - 3) * 4


@pytest.fixture
def few_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the test needs."""
    monkeypatch.setattr(module, "TENSOR", (4, 8))
    monkeypatch.setattr(module, "PIPELINE", (1, 2))
    monkeypatch.setattr(module, "CONTEXT", (1, 2))
    monkeypatch.setattr(module, "MICRO_BATCHES", (1, 2, 4))


@pytest.mark.usefixtures("few_layouts")
def test_too_large_is_a_reason_with_what_the_smallest_would_need() -> None:
    recipe = named("nemotron_h_56b", "plan.search=true", "cluster.gpus=8", "precision=bf16")
    found = search_stage(recipe, STAGE, device("a100"), 1.0)
    assert found.fitting == []
    large = next(reason for reason in found.rejected if reason.text.startswith("memory: "))
    assert "of 80 GB on the largest rank, all layers recomputed" in large.text


@pytest.mark.usefixtures("few_layouts")
def test_recomputation_only_where_it_is_needed() -> None:
    recipe = named("nemotron_h_56b", "plan.search=true", "cluster.gpus=64", "stages.pretrain.global_batch_size=192")
    fitting = search_stage(recipe, STAGE, H100, 1.0).fitting
    assert {candidate.recompute for candidate in fitting} > {"full"}
    for candidate in fitting:
        if candidate.recompute == "full":
            less = laid_out(recipe, replace(candidate, recompute="selective"))
            assert max(rank.total for rank in stage_memory(less, STAGE)) > 80e9


def test_no_layout_of_6144_ranks_divides_736_samples() -> None:
    found = search_stage(named("nano_12b_v2", "plan.search=true", "cluster.gpus=6144"), STAGE, H100, 1.0)
    assert found.fitting == []
    assert any("global_batch_size: 736 is not divisible" in reason.text for reason in found.rejected)


def test_a_calibration_scales_every_candidate() -> None:
    recipe = named("nano_12b_v2", "plan.search=true")
    once = search_stage(recipe, "long_context", H100, 1.0).fitting
    twice = search_stage(recipe, "long_context", H100, 2.0).fitting
    assert [2 * candidate.step_seconds for candidate in once] == [candidate.step_seconds for candidate in twice]
