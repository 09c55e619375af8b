"""The tables: what they show is what the plan has, whole, and within 100 columns."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from functools import cache

import pytest

from nano_pretrain.plan.document import plan_document
from nano_pretrain.plan.step_time import step_time
from nano_pretrain.plan.tables import WIDTH, new_console, show_plan
from nano_pretrain.plan.whole import Plan, make_plan
from nano_pretrain.recipe.load import tree
from nano_pretrain.recipe.schema import Recipe
from tests.plan.recipes import STAGE, named

NAMES = sorted(path.stem for path in (tree("recipes") / "recipe").glob("*.yaml"))
LONG = "long_context"


@cache
def planned(name: str, *overrides: str) -> Plan:
    return make_plan(named(name, *overrides))


def shown(plan: Plan) -> str:
    console = new_console()
    console.file = io.StringIO()
    show_plan(console, plan, "plan.png")
    return console.file.getvalue()


def row(text: str, name: str) -> list[str]:
    """The cells of the first row with this name."""
    found = re.search(rf"^ *{re.escape(name)} {{2,}}(.*)$", text, re.MULTILINE)
    assert found, name
    return re.split(r" {2,}", found.group(1).strip())


def stages(recipe: Recipe, count: int) -> Recipe:
    """A recipe with the extension several times, after its pretraining."""
    extensions = {f"{LONG}_{number}": replace(recipe.stages[LONG]) for number in range(count)}
    return replace(recipe, stages={STAGE: recipe.stages[STAGE], **extensions})


@pytest.mark.parametrize("name", NAMES)
def test_named_recipes_fit_their_columns(name: str) -> None:
    text = shown(planned(name))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "…" not in text, "nothing is cut"


def test_more_stages_than_have_room_beside_each_other() -> None:
    plan = make_plan(stages(named("nano_12b_v2"), 4))
    text = shown(plan)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "…" not in text
    assert text.count("FLOPs of a training token") == 3
    for name, report in plan.stages.items():
        assert name in text
        assert f"{report.parameters[0].total:,}" in text


@pytest.mark.parametrize(
    ("child", "parent"),
    [("nano_9b_v2", "nano_12b_v2"), ("nemotron_h_4b", "nemotron_h_8b"), ("nemotron_h_47b", "nemotron_h_56b")],
)
def test_the_first_line_of_a_pruned_model_says_whose_pretraining_it_takes(child: str, parent: str) -> None:
    plan = planned(child)
    title = shown(plan).splitlines()[0]
    assert title == f"{child} on H100 SXM: no published pretraining schedule, takes its parent's, {parent}"
    assert plan_document(plan, "")["pretraining_of"] == parent


def test_stand_ins_are_said_before_any_number() -> None:
    plan = planned("nano_12b_v2")
    text = " ".join(shown(plan).partition("Parameters")[0].split())
    for sentence in plan.recipe.stand_ins.values():
        assert sentence in text
    assert plan_document(plan, "")["stand_ins"] == plan.recipe.stand_ins
    assert "stand-ins" not in shown(planned("tiny"))


def test_memory_of_each_pipeline_position() -> None:
    plan = planned("nano_12b_v2_paper")
    table = shown(plan).partition(f"GB by pipeline position, {LONG}")[2].partition("Cost")[0]
    rows = [line.split() for line in table.splitlines() if re.match(r" +\d", line)]
    report = plan.stages[LONG]
    assert len(rows) == report.layout.pipeline == 2
    for cells, rank, layers in zip(rows, report.memory, report.layers, strict=True):
        assert cells[:3] == [str(rank.position), str(layers), str(rank.in_flight)]
        parts, total = [float(cell) for cell in cells[3:-1]], float(cells[-1])
        # Each is rounded to three digits, the largest of them to a tenth.
        assert sum(parts) == pytest.approx(total, abs=0.05 * (len(parts) + 1))
        assert total == pytest.approx(rank.total / 1e9, abs=0.05)
    found = plan_document(plan, "")["stages"][LONG]
    assert found["layers_per_position"] == report.layers
    assert [rank["in_flight"] for rank in found["memory_per_rank"]] == [1, 1]
    assert "pipeline position" not in shown(planned("nano_12b_v2"))


def test_parameters_are_those_of_one_rank() -> None:
    # The first position has the embedding and the last one the head.
    text = shown(planned("nano_12b_v2_paper"))
    names = ("embedding", "mamba", "feed forward", "attention", "final norm", "head", "all")
    *parts, total = (int(row(text, name)[-1].replace(",", "")) for name in names)
    assert sum(parts) == total


def test_all_stages_together() -> None:
    plan = planned("nano_12b_v2")
    costs = [report.cost for report in plan.stages.values()]
    *_, written, days, hours, energy = row(shown(plan).partition("Cost")[2], "all")
    assert days == f"{sum(cost.days for cost in costs):.3g} days"
    assert hours == f"{sum(cost.device_hours for cost in costs):,.0f}"
    assert energy == f"{sum(cost.megawatt_hours for cost in costs):,.0f}"
    assert float(written) == pytest.approx(sum(cost.written_bytes for cost in costs) / 1e12, rel=0.005)
    total = plan_document(plan, "")["total"]
    assert total["written_bytes"] == sum(cost.written_bytes for cost in costs)
    alone = shown(planned("nemotron_h_56b")).partition("Cost")[2].partition("Tokens")[0]
    assert "\n all" not in alone


def test_mfu_names_its_peak() -> None:
    fp8 = planned("nemotron_h_56b")
    text = shown(fp8)
    bf16_share, fp8_share = (
        float(row(text, f"MFU of {peak}")[0].removesuffix(" %"))
        for peak in ("989 TFLOP/s (BF16)", "1,979 TFLOP/s (FP8)")
    )
    assert bf16_share == pytest.approx(2 * fp8_share, abs=0.15), "twice the peak, rounded to tenths"
    found = plan_document(fp8, "")["stages"][STAGE]
    assert found["mfu"] == found["mfu_of_peak"]["bf16"] == pytest.approx(2 * found["mfu_of_peak"]["fp8"], rel=1e-3)
    assert "(FP8)" not in shown(planned("nemotron_h_8b"))
    assert row(shown(planned("tiny")), "MFU of 0.53 TFLOP/s (BF16)")


@pytest.mark.parametrize("chosen", [False, True])
def test_both_answers_to_overlap_are_shown(chosen: bool) -> None:
    recipe = named("nemotron_h_56b", f"parallel.overlap={str(chosen).lower()}")
    plan = make_plan(recipe)
    other = replace(recipe, parallel=replace(recipe.parallel, overlap=not chosen))
    seconds = step_time(other, STAGE, plan.device).total
    assert plan_document(plan, "")["stages"][STAGE]["step_seconds_other_overlap"] == seconds
    assert row(shown(plan), f"all {'without' if chosen else 'with'} overlap") == [f"{seconds:.3g}"]
    assert (seconds > plan.stages[STAGE].time.total) == chosen


def test_a_cpu_counts_fp8_as_bf16_and_says_so() -> None:
    fp8, bf16 = (planned("tiny", f"precision={name}", "data.path=nowhere") for name in ("fp8_blockwise", "bf16"))
    said = " ".join(shown(fp8).split())
    line = "fp8_blockwise: 14 of 22 linears in FP8, counted as BF16 in time and memory: a CPU has no FP8 products"
    assert line in said
    assert fp8.stages[STAGE].time == bf16.stages[STAGE].time
    assert fp8.stages[STAGE].memory == bf16.stages[STAGE].memory
    assert "linears in FP8" not in shown(bf16)


def test_the_linears_in_fp8_are_counted_on_gpus_too() -> None:
    said = shown(planned("nano_12b_v2"))
    assert "\nfp8_blockwise: 116 of 124 linears in FP8\n" in re.sub(" +\n", "\n", said)


def test_a_terminal_that_is_wide_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich believe in a terminal
    monkeypatch.setenv("COLUMNS", "300")
    assert new_console().width == WIDTH
    monkeypatch.setenv("COLUMNS", "80")
    assert new_console().width == 80


def test_small_and_short_things_have_words() -> None:
    plan = planned("tiny", "data.path=nowhere")
    cost = plan.stages[STAGE].cost
    assert 60 <= cost.seconds < 3600
    assert 0 < cost.megawatt_hours < 0.001
    cells = row(shown(plan).partition("Cost")[2], STAGE)
    assert cells[-3:] == [f"{cost.seconds / 60:.3g} minutes", f"{cost.device_hours:.3g}", "< 0.001"]
