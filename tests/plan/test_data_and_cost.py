"""Tokens in closed form against every sample's address; days, energy and checkpoints by hand."""

from __future__ import annotations

import io
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from nano_pretrain.data.shards import open_corpus
from nano_pretrain.data.sizeless import sizeless_curriculum
from nano_pretrain.plan.cost import checkpoint_bytes, stage_cost, total_cost
from nano_pretrain.plan.data import plan_data, short_phase_notes, shorter_stage_notes
from nano_pretrain.plan.document import plan_document
from nano_pretrain.plan.tables import decimal, new_console, show_plan
from nano_pretrain.plan.whole import make_plan
from nano_pretrain.platform import Platform
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import CheckpointConfig, ParallelConfig, PhaseConfig, PlanConfig
from tests.corpora import write_corpus
from tests.model.building import batch, build
from tests.model.recipes import small_recipe
from tests.plan.recipes import STAGE, device, named, small


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("plan") / "corpus")


def test_closed_form_equals_the_addresses_of_all_samples(corpus: Path) -> None:
    recipe = small_recipe(corpus=corpus)
    found = plan_data(recipe)
    addresses = [found.curriculum.locate(STAGE, sample) for sample in range(6 * 8)]
    assert found.tokens == {STAGE: {"all": {n: 48 * c for n, c in Counter(a.source for a in addresses).items()}}}
    available = {name: stream.tokens for name, stream in open_corpus(corpus).train.items()}
    for name, use in found.sources.items():
        assert use.available == available[name]
        assert use.epochs == pytest.approx(use.tokens / (available[name] - 1), rel=0.02), "whole samples"


def test_without_a_corpus_the_tokens_are_the_same(corpus: Path) -> None:
    with_sizes = plan_data(small_recipe(corpus=corpus))
    without = plan_data(small_recipe(corpus=corpus / "nowhere"))
    assert without.tokens == with_sizes.tokens
    assert {(use.available, use.epochs) for use in without.sources.values()} == {(None, None)}


def test_the_12b_reads_what_its_phases_say() -> None:
    found = plan_data(named("nano_12b_v2"))
    step = 736 * 8192
    for phase, tokens in {"p1": 12e12, "p2": 6e12, "p3": 2e12}.items():
        assert sum(found.tokens[STAGE][phase].values()) == pytest.approx(tokens, abs=step)
    assert found.tokens[STAGE]["p1"]["web_crawl"] / 12e12 == pytest.approx(0.59, abs=1e-6)
    assert found.curriculum.total_steps == 3_317_129 + 3_005


def test_every_phase_of_tiny_has_the_shares_it_asks_for() -> None:
    curriculum = sizeless_curriculum(named("tiny"))
    assert not list(short_phase_notes(curriculum))
    for stage in curriculum.stages:
        for phase in stage.phases:
            (part,), weights = stage.plateaus(phase), stage.config.phases[phase.name].blend
            # A quota at a window's end is within a sample of the share.
            assert part.shares == pytest.approx(
                {source: weight / 100 for source, weight in weights.items()}, abs=1 / phase.samples
            )


def test_a_phase_shorter_than_its_window_is_named_with_what_that_means() -> None:
    (note,) = short_phase_notes(sizeless_curriculum(named("tiny", "data.quota_window=128")))
    assert re.match(r"stages\.long_context\.phases\.lc: its 64 samples .* 128 .*: \w+ has [\d.]+% for [\d.]+%;", note)


def test_a_stage_of_shorter_samples_is_named() -> None:
    assert not list(shorter_stage_notes(sizeless_curriculum(named("tiny"))))
    shorter = named("tiny", "stages.long_context.sequence_length=256")
    (note,) = shorter_stage_notes(sizeless_curriculum(shorter))
    assert note == "stages.long_context.sequence_length: 256 tokens are fewer than the 512 of stage pretrain"


def test_a_source_that_is_read_too_often_is_refused_as_by_train(corpus: Path) -> None:
    recipe = small_recipe(corpus=corpus)
    recipe.data.max_epochs = 0.01
    with pytest.raises(RecipeError, match=r"data\.max_epochs: source \w+ is read"):
        plan_data(recipe)


def test_what_repeats_is_shown(corpus: Path) -> None:
    recipe = small_recipe(corpus=corpus)
    recipe.plan.hardware = "cpu"
    first = recipe.stages[STAGE]
    assert {use.repeats for use in plan_data(recipe).sources.values()} == {None}
    again = replace(first, phases={"all": PhaseConfig(share=1.0, blend={"alpha": 1})})
    recipe.stages = {STAGE: replace(first, phases={"all": PhaseConfig(share=1.0, blend={"alpha": 1, "beta": 1})})}
    recipe.stages["again"] = replace(again, tokens=40 * 8 * 48)
    plan = make_plan(recipe)
    found = plan.data.sources["alpha"].repeats
    assert found is not None
    assert found == plan_data(recipe).sources["alpha"].repeats
    assert found.shared_by == (STAGE, "again")
    assert found.begins == 6 * 8 * 48
    assert plan.data.sources["beta"].repeats is None
    assert plan_document(plan, "")["sources"]["alpha"]["repeats"] == {**asdict(found)}
    console = new_console()
    console.file = io.StringIO()
    show_plan(console, plan, "plan.png")
    text = " ".join(console.file.getvalue().split())
    for said in (
        f"alpha pretrain, again {found.readings:.2f} {decimal(100 * found.share)} % 2.3K",
        "1 of 2 sources are read more than once, alpha first: its second reading begins after 2.3K tokens of the run",
        "not divided between pretrain and again (too small, or begun before more was needed), so that they may read "
        "the same: alpha",
    ):
        assert said in text


def test_cost_by_hand(corpus: Path) -> None:
    recipe = replace(small_recipe(corpus=corpus), checkpoint=CheckpointConfig(every=4))
    recipe.plan = PlanConfig(storage_gigabytes_per_second=checkpoint_bytes(recipe) / 1e9)
    recipe.cluster.gpus = 8
    stage = plan_data(recipe).curriculum.stages[0]
    found = stage_cost(recipe, stage, 18.0, device("h100"))
    # 6 steps of 3 s; checkpoints after the 4th and at the end, a second each.
    assert found.checkpoints.count == 2
    assert found.checkpoints.seconds == pytest.approx(1)
    assert found.seconds == pytest.approx(20)
    assert found.days == pytest.approx(20 / 86_400)
    assert found.device_hours == pytest.approx(8 * 20 / 3600)
    assert found.megawatt_hours == pytest.approx(8 * 700 * 20 / 3600 / 1e6)
    assert found.tokens_per_second == pytest.approx(8 * 48 / 3)
    assert found.written_bytes == 2 * checkpoint_bytes(recipe)
    both = total_cost([found, found])
    assert (both["seconds"], both["written_bytes"]) == (2 * found.seconds, 2 * found.written_bytes)
    assert both["device_hours"] == pytest.approx(2 * found.device_hours)
    only_last = replace(recipe, checkpoint=CheckpointConfig(every=0))
    assert stage_cost(only_last, stage, 18.0, device("h100")).checkpoints.count == 1


@pytest.mark.parametrize(
    ("precision", "sharded", "each"), [("bf16", True, 14), ("fp32", True, 16), ("fp32", False, 12)]
)
def test_a_checkpoint_has_what_the_plan_says(
    platform: Platform, tmp_path: Path, precision: str, sharded: bool, each: int
) -> None:
    from megatron.core import dist_checkpointing

    from nano_pretrain.checkpoint.sharded import sharded_state
    from nano_pretrain.train.step import Trainable

    layout = ParallelConfig(distributed_optimizer=sharded)
    recipe = small(layout, precision=precision, pattern="M-*", hidden_size=256, ffn_hidden_size=1024)
    model = build(platform, recipe)
    trainable = Trainable(recipe, layout, platform, model)
    trainable.step(iter([batch(recipe)]), 1, (48, 2), lr=1e-3, stop=False)
    with platform.optimizer_scope():
        dist_checkpointing.save(sharded_state(trainable.model, trainable.optimizer, loading=False), str(tmp_path))
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    expected = checkpoint_bytes(recipe)
    count = sum(parameter.numel() for parameter in model.parameters() if isinstance(parameter, torch.nn.Parameter))
    assert expected == pytest.approx(each * count, rel=1e-3)
    # Names, indices and alignment, some kilobytes a tensor.
    assert expected < written < 1.05 * expected
