"""The named recipes compose, and hold the values they stand for."""

from __future__ import annotations

import dataclasses

import pytest

from nano_pretrain.compose import compose
from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.ranges import SourceSize
from nano_pretrain.plan.params import count_parameters
from nano_pretrain.recipe.derived import padded_vocab_size
from nano_pretrain.recipe.load import tree
from nano_pretrain.recipe.pattern import count_layers
from nano_pretrain.recipe.schema import Recipe

NAMES = sorted(path.stem for path in (tree("recipes") / "recipe").glob("*.yaml"))
PATTERN_12B = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"


def recipe_named(name: str) -> Recipe:
    return compose([f"recipe={name}"]).recipe


@pytest.mark.parametrize("name", NAMES)
def test_recipe_composes_and_has_a_comment_that_says_what_it_is(name: str) -> None:
    recipe = recipe_named(name)
    assert recipe.run.name == name
    lines = (tree("recipes") / "recipe" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ")


@pytest.mark.parametrize("name", NAMES)
def test_phases_fill_their_stage_and_the_blends_weigh_something(name: str) -> None:
    recipe = recipe_named(name)
    sources = {source for stage in recipe.stages.values() for phase in stage.phases.values() for source in phase.blend}
    unlimited = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, max_epochs=1e9))
    curriculum = Curriculum(unlimited, dict.fromkeys(sources, SourceSize((10**7,))))
    for stage, plan in zip(recipe.stages.values(), curriculum.stages, strict=True):
        assert 0 <= (plan.end_tokens - plan.start_tokens) - stage.tokens < plan.tokens_per_step
        assert plan.phases[0].start_tokens == plan.start_tokens
        assert plan.phases[-1].end_tokens == plan.end_tokens


def test_tiny_is_the_default() -> None:
    assert compose([]).recipe == recipe_named("tiny")


def test_tiny_is_small_and_has_three_phases_and_two_ranks() -> None:
    recipe = recipe_named("tiny")
    assert 3e6 < count_parameters(recipe.model).total < 1e7
    assert list(recipe.stages["pretrain"].phases) == ["p1", "p2", "p3"]
    assert (recipe.stages["pretrain"].schedule.kind, recipe.cluster.gpus) == ("wsd", 2)
    for phase in recipe.stages["pretrain"].phases.values():
        assert max(phase.blend.values()) <= 0.2 * sum(phase.blend.values())


def test_nano_12b_v2_has_the_shape_of_the_released_model() -> None:
    model = recipe_named("nano_12b_v2").model
    assert model.pattern == PATTERN_12B
    counts = count_layers(model.pattern)
    assert (counts.mamba, counts.feed_forward, counts.attention) == (28, 28, 6)
    assert (model.hidden_size, model.ffn_hidden_size) == (5120, 20480)
    assert (model.num_attention_heads, model.num_query_groups, model.head_dim) == (40, 8, 128)
    assert (model.mamba_num_heads, model.mamba_head_dim) == (128, 80)
    assert (model.mamba_num_groups, model.mamba_state_dim, model.mamba_conv_width) == (8, 128, 4)
    assert (model.vocab_size, padded_vocab_size(model)) == (131072, 131072)
    assert (model.norm_epsilon, model.init_std) == (1e-5, 0.0125)
    assert count_parameters(model).total == 12_310_001_152


def test_nano_12b_v2_trains_as_published() -> None:
    recipe = recipe_named("nano_12b_v2")
    pretrain = recipe.stages["pretrain"]
    assert (pretrain.tokens, pretrain.sequence_length, pretrain.global_batch_size) == (20 * 10**12, 8192, 736)
    assert pretrain.global_batch_size * pretrain.sequence_length == 6_029_312
    schedule = pretrain.schedule
    assert (schedule.kind, schedule.lr, schedule.min_lr) == ("wsd", 4.5e-4, 4.5e-6)
    assert (schedule.warmup_tokens, schedule.decay_tokens) == (8 * 10**9, 3_600 * 10**9)
    assert [phase.share for phase in pretrain.phases.values()] == [0.6, 0.3, 0.1]
    optimizer = recipe.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip_grad) == (0.9, 0.95, 0.1, 1.0)
    assert (recipe.precision.name, recipe.data.tokenizer.kind) == ("fp8_blockwise", "tekken")
    assert (recipe.precision.bf16_first_linears, recipe.precision.bf16_last_linears) == (4, 4)


def test_nano_12b_v2_extends_to_long_context_as_published() -> None:
    stage = recipe_named("nano_12b_v2").stages["long_context"]
    assert (stage.tokens, stage.sequence_length, stage.global_batch_size) == (18_900_000_000, 524_288, 12)
    assert (stage.schedule.kind, stage.schedule.lr) == ("constant", 4.5e-6)
    assert stage.parallel is not None
    assert (stage.parallel.tensor, stage.parallel.context, stage.parallel.sequence) == (8, 16, True)
    weights = stage.phases["lc"].blend
    assert weights["long_document_qa"] == pytest.approx(0.2 * sum(weights.values()), rel=1e-3)


def test_thin_has_the_true_layers_on_the_data_of_tiny() -> None:
    thin, tiny = recipe_named("nano_12b_v2_thin"), recipe_named("tiny")
    assert thin.model.pattern == PATTERN_12B
    assert count_parameters(thin.model).total < 1e7
    assert (thin.data, thin.cluster.gpus) == (tiny.data, 2)
    assert [phase.blend for phase in thin.stages["pretrain"].phases.values()] == [
        phase.blend for phase in tiny.stages["pretrain"].phases.values()
    ]
