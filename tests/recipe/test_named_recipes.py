"""The published models: shapes, tokens, rates, phases and layouts are those of papers, model cards and configurations.

The numbers are typed here from those sources a second time; the recipes' comments name them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from nano_pretrain.compose import compose
from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.ranges import SourceSize
from nano_pretrain.data.stage_plan import PhasePlan
from nano_pretrain.plan.params import count_parameters
from nano_pretrain.recipe.derived import stage_layout, stage_ranks
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.load import tree
from nano_pretrain.recipe.pattern import count_layers
from nano_pretrain.recipe.rules import check
from nano_pretrain.recipe.schema import Recipe
from nano_pretrain.schedule.learning_rate import learning_rate

T, B = 10**12, 10**9

PARAMETERS = {
    "nano_12b_v2": 12_310_001_152,
    "nano_12b_v2_paper": 12_314_591_360,
    "nano_9b_v2": 8_888_227_328,
    "nemotron_h_4b": 4_489_223_040,
    "nemotron_h_8b": 8_100_852_736,
    "nemotron_h_47b": 46_791_554_816,
    "nemotron_h_56b": 56_324_350_464,
}
# Layers M, -, *; hidden, feed-forward; query and KV heads; Mamba heads, their channels, state.
SHAPES = {
    "nano_12b_v2": ((28, 28, 6), (5120, 20480), (40, 8), (128, 80, 128)),
    "nano_12b_v2_paper": ((28, 28, 6), (5120, 20480), (40, 8), (160, 64, 128)),
    "nano_9b_v2": ((27, 25, 4), (4480, 15680), (40, 8), (128, 80, 128)),
    "nemotron_h_4b": ((24, 24, 4), (3072, 12288), (32, 8), (112, 64, 128)),
    "nemotron_h_8b": ((24, 24, 4), (4096, 21504), (32, 8), (128, 64, 128)),
    "nemotron_h_47b": ((45, 48, 5), (8192, 30720), (64, 8), (256, 64, 256)),
    "nemotron_h_56b": ((54, 54, 10), (8192, 32768), (64, 8), (256, 64, 256)),
}
# Tokens consumed -> learning rate.
CURVES = {
    "nano_12b_v2": {0: 0.0, 4 * B: 2.25e-4, 8 * B: 4.5e-4, 16_400 * B: 4.5e-4, 20 * T: 4.5e-6},
    "nemotron_h_8b": {0: 0.0, 4_150 * 10**6: 4e-4, 8_300 * 10**6: 8e-4, 15 * T: 8e-6},
    "nemotron_h_56b": {0: 0.0, 12_500 * 10**6: 2e-4, 25 * B: 4e-4, 20 * T: 4e-6},
}
SWITCHES = {
    "nano_12b_v2": [12 * T, 18 * T],
    "nemotron_h_8b": [9 * T, 12 * T, 15 * T - 380 * B],
    "nemotron_h_56b": [12 * T, 16 * T, 20 * T - 380 * B],
}
PARENTS = {"nano_9b_v2": "nano_12b_v2", "nemotron_h_4b": "nemotron_h_8b", "nemotron_h_47b": "nemotron_h_56b"}
LINEAR_FORMATS = {
    "nano_12b_v2": ("fp8_blockwise", 4, 4),
    "nano_12b_v2_paper": ("fp8_blockwise", 4, 4),
    "nano_9b_v2": ("fp8_blockwise", 4, 4),
    "nemotron_h_4b": ("bf16", 0, 0),
    "nemotron_h_8b": ("bf16", 0, 0),
    "nemotron_h_47b": ("fp8_current_scaling", 4, 4),
    "nemotron_h_56b": ("fp8_current_scaling", 4, 4),
}
# Figure 4 of arXiv 2504.03624: web crawl, math, wiki, code, academic, crawl++, multilingual, SFT-style.
FIGURE_4 = {
    "p1": [59.0, 2.9, 0.3, 20.0, 8.8, 4.0, 5.0],
    "p2": [40.7, 14.0, 1.7, 20.0, 12.0, 7.0, 3.7, 0.9],
    "p3": [32.7, 10.8, 1.1, 20.0, 12.0, 7.0, 3.7, 12.6],
    "p4": [13.5, 10.8, 1.1, 20.0, 12.0, 7.0, 3.7, 31.8],
}
CATEGORIES = ["web_crawl", "math", "wikipedia", "code", "academic", "crawl_plus_plus", "multilingual", "sft"]


@cache
def recipe_named(name: str, *overrides: str) -> Recipe:
    return compose([f"recipe={name}", *overrides]).recipe


def phases(recipe: Recipe) -> list[PhasePlan]:
    """Phases of the pretraining on step borders, over sources that never run out."""
    pretrain = recipe.stages["pretrain"]
    sources = {source for phase in pretrain.phases.values() for source in phase.blend}
    endless = replace(recipe, stages={"pretrain": pretrain}, data=replace(recipe.data, max_epochs=1e9))
    return list(Curriculum(endless, dict.fromkeys(sources, SourceSize((10**7,)))).stages[0].phases)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    assert count_parameters(recipe_named(name).model).total == PARAMETERS[name]


@pytest.mark.parametrize("name", SHAPES)
def test_shape(name: str) -> None:
    model = recipe_named(name).model
    layers = count_layers(model.pattern)
    assert SHAPES[name] == (
        (layers.mamba, layers.feed_forward, layers.attention),
        (model.hidden_size, model.ffn_hidden_size),
        (model.num_attention_heads, model.num_query_groups),
        (model.mamba_num_heads, model.mamba_head_dim, model.mamba_state_dim),
    )
    common = (model.head_dim, model.mamba_num_groups, model.mamba_conv_width, model.vocab_size, model.norm_epsilon)
    assert common == (128, 8, 4, 131_072, 1e-5)
    # The rule that fits the three values NVIDIA gives, 0.014, 0.0125 and 0.0099, to within their rounding.
    assert model.init_std == pytest.approx((0.8 / model.hidden_size) ** 0.5, rel=0.01)


@pytest.mark.parametrize("name", SHAPES)
def test_pattern_keeps_the_rules_of_the_paper(name: str) -> None:
    pattern = recipe_named(name).model.pattern
    assert (pattern[0], pattern[-1]) == ("M", "-")
    assert pattern.count("*") == pattern.count("*-")


@pytest.mark.parametrize("name", PARAMETERS)
def test_optimizer_and_data_are_common(name: str) -> None:
    recipe = recipe_named(name)
    adam = recipe.optimizer
    assert (adam.beta1, adam.beta2, adam.weight_decay, adam.clip_grad, adam.eps) == (0.9, 0.95, 0.1, 1.0, 1e-8)
    assert (recipe.data.tokenizer.kind, recipe.stages["pretrain"].sequence_length) == ("tekken", 8192)


@pytest.mark.parametrize("name", LINEAR_FORMATS)
def test_precision(name: str) -> None:
    precision = recipe_named(name).precision
    assert (precision.name, precision.bf16_first_linears, precision.bf16_last_linears) == LINEAR_FORMATS[name]


@pytest.mark.parametrize("name", CURVES)
def test_learning_rate_at_its_corners(name: str) -> None:
    stage = recipe_named(name).stages["pretrain"]
    rates = {tokens: learning_rate(stage.schedule, stage.tokens, tokens) for tokens in CURVES[name]}
    # Exact in the schedule's arithmetic; half a peak is rounded once.
    assert rates == pytest.approx(CURVES[name], rel=1e-15)


@pytest.mark.parametrize(("name", "peak"), [("nemotron_h_8b", 8e-4), ("nemotron_h_56b", 4e-4)])
def test_cosine_is_half_way_down_in_the_middle(name: str, peak: float) -> None:
    stage = recipe_named(name).stages["pretrain"]
    middle = (stage.schedule.warmup_tokens + stage.tokens) // 2
    assert learning_rate(stage.schedule, stage.tokens, middle) == pytest.approx(0.505 * peak, rel=1e-12)


@pytest.mark.parametrize(("name", "batch"), [("nano_12b_v2", 736), ("nano_12b_v2_paper", 768), ("nemotron_h_8b", 768)])
def test_batch(name: str, batch: int) -> None:
    assert recipe_named(name).stages["pretrain"].global_batch_size == batch


@pytest.mark.parametrize("name", SWITCHES)
def test_phases_add_up_and_switch_where_published(name: str) -> None:
    recipe = recipe_named(name)
    pretrain, plan = recipe.stages["pretrain"], phases(recipe)
    step = pretrain.global_batch_size * pretrain.sequence_length
    for before, after, tokens in zip(plan, plan[1:], SWITCHES[name], strict=False):
        assert before.end_tokens == after.start_tokens == -(-tokens // step) * step
    assert len(plan) == len(SWITCHES[name]) + 1
    assert 0 <= plan[-1].end_tokens - pretrain.tokens < step


@pytest.mark.parametrize("name", ["nemotron_h_8b", "nemotron_h_56b"])
def test_blends_are_those_of_figure_4(name: str) -> None:
    phases = recipe_named(name).stages["pretrain"].phases
    assert {phase: list(config.blend.values()) for phase, config in phases.items()} == FIGURE_4
    for config in phases.values():
        assert list(config.blend) == CATEGORIES[: len(config.blend)]
        # The figure rounds to a tenth.
        assert sum(config.blend.values()) == pytest.approx(100, abs=0.11)


def test_nano_2_stands_in_with_phases_1_3_and_4() -> None:
    blends = [list(phase.blend.values()) for phase in recipe_named("nano_12b_v2").stages["pretrain"].phases.values()]
    assert blends == [FIGURE_4["p1"], FIGURE_4["p3"], FIGURE_4["p4"]]


def test_extension_reads_four_fifths_of_the_last_phase() -> None:
    stages = recipe_named("nano_12b_v2").stages
    last, extension = stages["pretrain"].phases["p3"].blend, stages["long_context"].phases["lc"].blend
    total = sum(extension.values())
    assert extension["long_document_qa"] / total == pytest.approx(0.2, rel=1e-12)
    for source, weight in last.items():
        assert extension[source] / total == pytest.approx(0.8 * weight / sum(last.values()), rel=1e-12)


@pytest.mark.parametrize(("child", "parent"), PARENTS.items())
def test_pruned_model_takes_its_parents_pretraining_and_says_so(child: str, parent: str) -> None:
    # Hydra reads its own directive only in the first line.
    directive, sentence = (tree("recipes") / "recipe" / f"{child}.yaml").read_text().splitlines()[:2]
    assert directive == "# @package _global_"
    assert sentence.startswith("# Has no published pretraining")
    assert sentence.endswith(f"takes its parent's, {parent}.")
    ours, theirs = recipe_named(child), recipe_named(parent)
    assert (ours.pretraining_of, theirs.pretraining_of) == (parent, None)
    assert (ours.precision, ours.optimizer, ours.data) == (theirs.precision, theirs.optimizer, theirs.data)
    assert ours.stages["pretrain"] == theirs.stages["pretrain"]
    assert list(ours.stages) == list(theirs.stages)


@pytest.mark.parametrize("name", PARAMETERS)
def test_rules_hold_and_each_rank_takes_one_sequence_of_the_batch(name: str) -> None:
    recipe = recipe_named(name)
    check(recipe)
    for stage in recipe.stages.values():
        layout = stage_layout(recipe, stage)
        model_ranks = layout.tensor * layout.pipeline * layout.context
        assert stage_ranks(recipe, stage) == model_ranks * stage.global_batch_size
        assert stage.micro_batch_size == 1


@pytest.mark.parametrize(
    ("name", "stage", "gpus", "layout"),
    [
        ("nano_12b_v2", "pretrain", 5888, (8, 1, 1)),
        ("nano_12b_v2", "long_context", 1536, (8, 16, 1)),
        ("nano_12b_v2_paper", "pretrain", 1536, (2, 1, 1)),
        ("nano_12b_v2_paper", "long_context", 768, (2, 16, 2)),
        ("nemotron_h_56b", "pretrain", 6144, (8, 1, 1)),
    ],
)
def test_layout(name: str, stage: str, gpus: int, layout: tuple[int, int, int]) -> None:
    recipe = recipe_named(name)
    found = stage_layout(recipe, recipe.stages[stage])
    assert (found.tensor, found.context, found.pipeline) == layout
    assert (found.sequence, stage_ranks(recipe, recipe.stages[stage])) == (True, gpus)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("nano_12b_v2", "cluster.gpus=6144", r"stages\.pretrain\.global_batch_size: 736 .* 768 data-parallel ranks"),
        (
            "nano_12b_v2_paper",
            "extension=nano_v2_512k",
            r"= 128 does not divide model\.mamba_num_heads = 160; .* 1, 2 or 4$",
        ),
        (
            "nemotron_h_4b",
            "extension=nano_v2_512k",
            r"= 128 does not divide model\.mamba_num_heads = 112; write 1 or 2$",
        ),
    ],
)
def test_what_does_not_fit_is_refused(name: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe_named(name, override)


def test_6144_gpus_are_accepted_for_the_56b() -> None:
    recipe_named("nemotron_h_56b", "cluster.gpus=6144")


@pytest.mark.parametrize("name", PARAMETERS)
def test_extension_can_be_left_out(name: str) -> None:
    assert list(recipe_named(name, "extension=none").stages) == ["pretrain"]
