"""What overlap within tensor parallelism and CUDA graphs need is asked for in one line."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from nano_pretrain.cli import check_verb
from nano_pretrain.compose import compose
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.rules_evaluate import evaluation, lengths_at_stage_ends
from nano_pretrain.recipe.rules_gpu import cuda_graphs, tensor_overlap
from nano_pretrain.recipe.schema import ParallelConfig, PrecisionConfig, Recipe
from tests.model.recipes import small_recipe

OVERLAPPED = ParallelConfig(tensor=2, sequence=True, tensor_overlap=True)
GRAPHED = ParallelConfig(cuda_graphs=True, overlap=False)


def recipe_with(layout: ParallelConfig) -> Recipe:
    recipe = small_recipe("bf16")
    recipe.data.document_boundaries = "ignore"
    recipe.parallel = layout
    return recipe


def assert_refused(recipe: Recipe, message: str) -> None:
    rule = tensor_overlap if "tensor_overlap" in message else cuda_graphs
    with pytest.raises(RecipeError, match="^" + re.escape(message)):
        rule(recipe)


def test_what_they_need_is_enough() -> None:
    tensor_overlap(recipe_with(OVERLAPPED))
    cuda_graphs(recipe_with(GRAPHED))
    replicated = recipe_with(ParallelConfig(cuda_graphs=True, distributed_optimizer=False))
    cuda_graphs(replicated)
    for rule in (tensor_overlap, cuda_graphs):
        rule(replace(recipe_with(ParallelConfig(pipeline=2)), precision=PrecisionConfig(name="fp32")))


def test_overlap_needs_sequence_parallelism() -> None:
    layout = replace(OVERLAPPED, sequence=False)
    line = (
        "parallel.tensor_overlap: needs sequence parallelism; write parallel.sequence=true with parallel.tensor above 1"
    )
    assert_refused(recipe_with(layout), line)


def test_overlap_sums_in_bf16() -> None:
    recipe = replace(recipe_with(OVERLAPPED), precision=PrecisionConfig(name="fp32"))
    assert_refused(recipe, "parallel.tensor_overlap: sums in BF16, and precision.name is fp32; write parallel.tensor_o")


def test_overlap_gathers_no_blocks_of_fp8() -> None:
    recipe = recipe_with(OVERLAPPED)
    recipe.precision = PrecisionConfig("fp8_blockwise")
    fix = "write parallel.tensor_overlap=false, precision.name=fp8_current_scaling or precision.name=bf16"
    assert_refused(
        recipe, f"parallel.tensor_overlap: gathers no blocks of FP8, and precision.name is fp8_blockwise; {fix}"
    )
    recipe.precision = PrecisionConfig("fp8_current_scaling")
    tensor_overlap(recipe)


def test_graphs_name_everything_that_is_missing() -> None:
    recipe = recipe_with(ParallelConfig(pipeline=2, cuda_graphs=True))
    recipe.recompute.granularity = "selective"
    recipe.data.document_boundaries = "reset"
    needs = ["parallel.pipeline=1", "parallel.overlap=false", "recompute.granularity=none"]
    needs.append("data.document_boundaries=ignore")
    line = f"parallel.cuda_graphs: needs {' and '.join(needs)}; write {' '.join(needs)}, or parallel.cuda_graphs=false"
    assert_refused(recipe, line)


@pytest.mark.parametrize(("field", "layout"), [("tensor_overlap", OVERLAPPED), ("cuda_graphs", GRAPHED)])
def test_one_process_has_micro_batches_of_one_shape(field: str, layout: ParallelConfig) -> None:
    recipe = recipe_with(layout)
    other = recipe.stages["other"] = replace(recipe.stages["pretrain"], sequence_length=96)
    rule = tensor_overlap if field == "tensor_overlap" else cuda_graphs
    assert_refused(
        recipe, f"parallel.{field}: needs micro-batches of one shape, and those of other and pretrain differ"
    )
    other.parallel = replace(layout, bucket_size=10**6)
    rule(recipe)
    other.parallel, other.sequence_length = None, 48
    rule(recipe)


def test_a_stage_of_its_own_layout_is_named() -> None:
    recipe = recipe_with(ParallelConfig())
    recipe.stages["pretrain"].parallel = replace(OVERLAPPED, sequence=False)
    assert_refused(
        recipe, "stages.pretrain.parallel.tensor_overlap: needs sequence parallelism; write stages.pretrain.p"
    )


@pytest.mark.parametrize(("field", "layout"), [("tensor_overlap", OVERLAPPED), ("cuda_graphs", GRAPHED)])
def test_only_verbs_that_train_or_plan_refuse_other_lengths_at_stage_ends(field: str, layout: ParallelConfig) -> None:
    recipe = recipe_with(layout)
    recipe.evaluate.lengths = [512]
    evaluation(recipe)
    message = rf"^evaluate\.at_stage_end: other lengths than the trained one do not go with parallel\.{field}; "
    for verb in ("plan", "train", "launch"):
        with pytest.raises(RecipeError, match=message + "write evaluate.at_stage_end=false and use the verb evaluate"):
            check_verb(verb, recipe)
    for verb in ("prepare", "evaluate", "generate", "report"):
        check_verb(verb, recipe)
    recipe.evaluate.at_stage_end = False
    lengths_at_stage_ends(recipe)


@pytest.mark.parametrize("option", ["tensor_overlap", "cuda_graphs"])
def test_every_command_applies_them(option: str) -> None:
    with pytest.raises(RecipeError, match=rf"^parallel\.{option}: needs "):
        compose(["recipe=tiny", "parallel.overlap=true", f"parallel.{option}=true"])
