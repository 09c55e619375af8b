"""The search lists what the rules and the memory allow, fastest first, and says why the rest does not go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nano_pretrain.plan import search as module
from nano_pretrain.plan.memory import stage_memory
from nano_pretrain.plan.search import Candidate, Reason, Search, search_stage
from nano_pretrain.plan.search_tables import show_search
from nano_pretrain.plan.step_time import step_time
from nano_pretrain.plan.tables import new_console
from nano_pretrain.recipe.rules import check
from nano_pretrain.recipe.schema import ParallelConfig, Recipe, RecomputeConfig
from tests.plan.recipes import STAGE, device, named

TRIED = len(module.TENSOR) * len(module.PIPELINE) * len(module.CONTEXT) * len(module.MICRO_BATCHES)
H100 = device("h100")
GPUS = "cluster.gpus=368"


@pytest.fixture(scope="module")
def found() -> Search:
    return search_stage(named("nano_12b_v2", "plan.search=true", GPUS), STAGE, H100, 1.0)


def candidate(tensor: int, recompute: str = "full") -> Candidate:
    """A layout that is tensor-parallel only."""
    return Candidate(tensor, 1, 1, 1, tensor > 1, 1, recompute, 0.0, 0)


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
    assert found.devices == 368


def test_what_is_listed_passes_the_rules_and_fits_and_is_as_fast_as_it_says(found: Search) -> None:
    recipe = named("nano_12b_v2", GPUS)
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
    own = step_time(named("nano_12b_v2", GPUS), STAGE, H100).total
    assert times[0] <= own
    assert found.recipe is not None
    assert times[found.recipe] == own


def test_reasons_name_a_rule_once_with_an_example(found: Search) -> None:
    texts = [reason.text for reason in found.rejected]
    assert len(texts) < 8
    (tensor,) = (reason for reason in found.rejected if reason.text.startswith("parallel.tensor: "))
    assert tensor.text == "parallel.tensor: 16 does not divide model.num_attention_heads = 40"
    assert tensor.example == "TP16 PP1 CP1 micro-batch 1"
    assert tensor.layouts == len(module.PIPELINE) * len(module.CONTEXT) * len(module.MICRO_BATCHES)


@pytest.fixture
def few_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the test needs."""
    monkeypatch.setattr(module, "TENSOR", (4, 8))
    monkeypatch.setattr(module, "PIPELINE", (1, 2))
    monkeypatch.setattr(module, "CONTEXT", (1, 2))
    monkeypatch.setattr(module, "MICRO_BATCHES", (1, 2, 4))


@pytest.mark.usefixtures("few_layouts")
def test_too_large_is_a_reason_with_what_the_nearest_miss_needs() -> None:
    recipe = named("nemotron_h_56b", "plan.search=true", "cluster.gpus=8", "precision=bf16")
    found = search_stage(recipe, STAGE, device("a100"), 1.0)
    assert found.fitting == []
    (large,) = (reason for reason in found.rejected if reason.memory_bytes is not None)
    assert large.memory_bytes is not None
    needs = f"needs {large.memory_bytes / 1e9:.1f} GB of memory on its largest rank with recompute.granularity=full"
    assert large.text == f"{needs}, A100 SXM has 80 GB"
    assert large.example == "TP8 PP1 CP1 micro-batch 1"
    smallest = laid_out(named("nemotron_h_56b", "cluster.gpus=8", "precision=bf16"), candidate(tensor=8))
    assert max(rank.total for rank in stage_memory(smallest, STAGE)) == large.memory_bytes > 80e9


@pytest.mark.usefixtures("few_layouts")
def test_recomputation_only_where_it_is_needed() -> None:
    recipe = named("nemotron_h_56b", "plan.search=true", "cluster.gpus=64", "stages.pretrain.global_batch_size=192")
    fitting = search_stage(recipe, STAGE, H100, 1.0).fitting
    assert {candidate.recompute for candidate in fitting} > {"full"}
    for candidate in fitting:
        if candidate.recompute == "full":
            less = laid_out(recipe, replace(candidate, recompute="selective"))
            assert max(rank.total for rank in stage_memory(less, STAGE)) > 80e9


@pytest.mark.parametrize(("linears", "pipelines"), [(4, {8, 16}), (20, {8})])
def test_no_pipeline_is_listed_that_is_too_long_for_the_bf16_layers(
    linears: int, pipelines: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, sizes in (("TENSOR", (8,)), ("PIPELINE", (8, 16)), ("CONTEXT", (1,)), ("MICRO_BATCHES", (1,))):
        monkeypatch.setattr(module, name, sizes)
    own = ["parallel.pipeline=8", f"precision.bf16_first_linears={linears}"]
    found = search_stage(named("nemotron_h_56b", "plan.search=true", *own), STAGE, H100, 1.0)
    assert {candidate.pipeline for candidate in found.fitting} == pipelines


@pytest.mark.usefixtures("few_layouts")
def test_the_recipes_own_layout_is_listed_where_it_is_none_of_those_tried() -> None:
    own = ("parallel.sequence=false", "recompute.granularity=full")
    found = search_stage(named("nano_12b_v2", "plan.search=true", "cluster.gpus=256", *own), STAGE, H100, 1.0)
    assert found.recipe is not None
    listed = found.fitting[found.recipe]
    assert (listed.tensor, listed.sequence, listed.recompute) == (8, False, "full")
    assert len(found.fitting) + sum(reason.layouts for reason in found.rejected) == 2 * 2 * 2 * 3 + 1
    assert [other for other in found.fitting if other.sequence != (other.tensor > 1)] == [listed]
    console = new_console()
    with console.capture() as capture:
        show_search(console, STAGE, found, H100, 736 * 8192)
    assert f"\n {found.recipe + 1} recipe's  " in capture.get()
    assert "\nthe recipe's own layout is without sequence parallelism\n" in capture.get()


@pytest.mark.usefixtures("few_layouts")
def test_the_recipes_own_layout_is_rejected_for_a_rule_or_for_memory() -> None:
    def rejected(*overrides: str) -> Reason:
        found = search_stage(named("nano_12b_v2", "plan.search=true", *overrides), STAGE, H100, 1.0)
        assert found.recipe is None
        assert found.fitting
        assert found.recipe_rejected is not None
        return found.recipe_rejected

    broken = rejected("parallel.tensor=3")
    assert (broken.example, broken.memory_bytes) == ("TP3 PP1 CP1 micro-batch 1", None)
    assert broken.text == "parallel.tensor: 3 does not divide model.num_attention_heads = 40"
    # A batch for each of 23 ranks; with recomputation it would fit.
    large = rejected("cluster.gpus=184", "stages.pretrain.micro_batch_size=32")
    assert "recompute.granularity=none, H100 SXM has 80 GB" in large.text
    assert large.memory_bytes is not None


def test_a_rule_names_the_field_that_the_recipe_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TENSOR", (8, 16))
    monkeypatch.setattr(module, "PIPELINE", (1,))
    monkeypatch.setattr(module, "CONTEXT", (1, 32))
    fields = {
        stage: {reason.text.partition(":")[0] for reason in search_stage(recipe, stage, H100, 1.0).rejected}
        for recipe in [named("nano_12b_v2", "plan.search=true")]
        for stage in recipe.stages
    }
    assert {"parallel.tensor", "parallel.context"} <= fields[STAGE]
    own = "stages.long_context.parallel"
    assert {f"{own}.tensor", f"{own}.context"} <= fields["long_context"]


@pytest.mark.usefixtures("few_layouts")
def test_without_a_known_memory_everything_that_the_rules_allow_is_listed() -> None:
    recipe = named("nemotron_h_56b", "plan.search=true", "cluster.gpus=8", "precision=bf16")
    cpu = search_stage(recipe, STAGE, device("cpu"), 1.0)
    assert {listed.recompute for listed in cpu.fitting} == {"none"}
    assert max(listed.memory_bytes for listed in cpu.fitting) > 80e9
    console = new_console()
    with console.capture() as capture:
        show_search(console, STAGE, cpu, device("cpu"), 1)
    assert "Layouts that the rules allow, memory not compared, fastest first" in capture.get()


def test_6144_ranks_divide_736_samples_only_behind_a_pipeline_of_threes() -> None:
    found = search_stage(named("nano_12b_v2", "plan.search=true", "cluster.gpus=6144"), STAGE, H100, 1.0)
    assert {listed.pipeline % 3 for listed in found.fitting} == {0}
    assert found.recipe_rejected is not None
    assert found.recipe_rejected.text.startswith("stages.pretrain.global_batch_size: 736 is not divisible by 768 ")


@pytest.mark.usefixtures("few_layouts")
def test_a_calibration_scales_every_candidate() -> None:
    recipe = named("nano_12b_v2", "plan.search=true", GPUS)
    once = search_stage(recipe, STAGE, H100, 1.0).fitting
    twice = search_stage(recipe, STAGE, H100, 2.0).fitting
    assert once
    assert [2 * candidate.step_seconds for candidate in once] == [candidate.step_seconds for candidate in twice]
