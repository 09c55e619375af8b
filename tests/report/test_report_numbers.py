"""What is behind the pictures: smoothing, thinning, label places, phases, and the numbers in words."""

import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.patches import Rectangle
from omegaconf import OmegaConf

from nano_pretrain.recipe.acts import HISTORY
from nano_pretrain.report import facts, render_report, words
from nano_pretrain.report.course import planned_tokens, schedule_marks, source_names, spans
from nano_pretrain.report.curves import POINTS, smooth, thin
from nano_pretrain.report.figures import blend_figure
from nano_pretrain.report.length import retrieval_table
from nano_pretrain.report.record import Record, read_record
from nano_pretrain.report.style import looks, plain, spread
from tests.report.synthetic_run import MANY_SOURCES, SOURCES, TOKENS, write_lines, write_run

_LINES = arrays(np.float64, st.integers(1, 60), elements=st.floats(-1e6, 1e6) | st.just(float("nan")))
_JSON = st.recursive(
    st.none() | st.booleans() | st.floats(-1e9, 1e9) | st.just(float("nan")) | st.just(10**400) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_KEYS = st.sampled_from(
    ["tokens", "loss", "stages", "phases", "blend", "sources", "schedule", "code", "time", "bigram", "parameters"]
)
_DOCUMENTS = st.recursive(_JSON, lambda inner: st.dictionaries(_KEYS, inner, max_size=4), max_leaves=8)


@given(_LINES, st.integers(1, 15))
def test_average_stays_between_the_extremes_and_skips_what_is_no_number(values: np.ndarray, width: int) -> None:
    line = smooth(values, width)
    assert len(line) == len(values)
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        assert np.isnan(line).all()
        return
    # The running sum of values up to 1e6 rounds at about 1e-8.
    assert np.nanmin(line) >= finite.min() - 1e-6
    assert np.nanmax(line) <= finite.max() + 1e-6
    assert np.isfinite(line[np.isfinite(values)]).all()


def test_average_is_the_mean_of_the_window() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 9.0, 2.0])
    assert smooth(values, 3) == pytest.approx([1.5, 1.5, 3.0, 6.5, 5.0, 5.5])


@settings(max_examples=20)
@given(st.integers(POINTS + 1, 20_000), st.data())
def test_thinning_keeps_spikes_and_both_ends(length: int, data: st.DataObject) -> None:
    x, y = np.arange(length, dtype=np.float64), np.zeros(length)
    high, low, hole = (data.draw(st.integers(0, length - 1)) for _ in range(3))
    y[hole], y[low], y[high] = np.nan, -5.0, 7.0
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) <= POINTS + 2
    assert np.all(np.diff(thin_x) > 0)
    assert {0.0, float(length - 1), float(high)} <= set(thin_x)
    assert np.nanmax(thin_y) == 7.0
    assert low == high or np.nanmin(thin_y) == -5.0


@given(st.lists(st.floats(0, 1), max_size=30).map(sorted), st.floats(0.001, 0.2))
def test_labels_keep_their_order_and_distance_inside_the_axes(wanted: list[float], gap: float) -> None:
    places = spread(wanted, gap)
    fitting = min(gap, 1 / max(len(wanted) - 1, 1))
    assert len(places) == len(wanted)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    assert all(high - low >= fitting - 1e-9 for low, high in pairwise(places))
    if all(high - low >= gap for low, high in pairwise(wanted)):
        assert places == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (999_950, "1M"), (3_276_800, "3.28M"), (2e13, "20T"), (float("nan"), "not recorded")],
)
def test_counts_have_three_digits(value: float, text: str) -> None:
    assert words.count(value) == text


def test_times_in_words() -> None:
    assert words.duration(93_784.4) == "1 day, 2:03:04"
    assert words.moment(1.76e9) == "2025-10-09 08:53:20 UTC"
    assert words.moment("2025-10-09T08:53:20Z") == "2025-10-09T08:53:20Z"
    assert words.moment(None) == ""


def test_no_two_of_twenty_four_sources_look_alike() -> None:
    assert len(set(looks([str(i) for i in range(24)]).values())) == 24


def test_names_become_harmless_labels() -> None:
    assert plain("$x$\n_y") == r"\$x\$ _y"
    assert not plain("_hidden").startswith("_")
    assert len(plain("a" * 99)) == 24


def test_phases_and_marks_follow_the_recipe(tmp_path: Path) -> None:
    record = read_record(write_run(tmp_path / "run", MANY_SOURCES))
    found = spans(record)
    assert [(span.stage, span.phase) for span in found] == [
        *(("pretrain", f"p{i}") for i in (1, 2, 3)),
        ("long_context", "long"),
    ]
    borders = [0, 0.54, 0.81, 0.9, 1.0]
    assert [span.start for span in found] + [found[-1].end] == pytest.approx([b * TOKENS for b in borders])
    assert [mark.tokens for mark in schedule_marks(record)] == pytest.approx([163_840, 0.9 * TOKENS - 819_200])
    assert all(sum(part.shares.values()) == pytest.approx(1) for span in found for part in span.blend)
    assert source_names(record) == sorted(MANY_SOURCES)


def told(run: Path, extend_to: int, at: int) -> Record:
    """A run whose first stage was given another end."""
    field = "stages.pretrain.schedule.extend_to"
    write_lines(run / HISTORY, [{"tokens": at, "field": field, "before": None, "after": extend_to}])
    change(run, {"stages.pretrain.schedule.extend_to": extend_to})
    return read_record(run)


def change(run: Path, fields: dict[str, Any]) -> None:
    """Give fields of a run's recipe other values."""
    recipe = OmegaConf.load(run / "recipe.yaml")
    for field, value in fields.items():
        OmegaConf.update(recipe, field, value, merge=False)
    OmegaConf.save(recipe, run / "recipe.yaml")


def test_an_extended_stage_keeps_the_ends_that_were_passed_and_moves_the_others(tmp_path: Path) -> None:
    # At 0.7 of the tokens p1 (60 percent of the stage) is over, and p2 is not.
    at, end = round(0.7 * TOKENS), 2 * TOKENS
    record = told(write_run(tmp_path / "run", fraction=0.7), end, at)
    borders = [0, 0.54 * TOKENS, 0.9 * end, end, end + TOKENS // 10]
    found = spans(record)
    assert [span.phase for span in found] == ["p1", "p2", "p3", "long"]
    assert [span.start for span in found] + [found[-1].end] == pytest.approx(borders)
    assert planned_tokens(record) == end + TOKENS // 10
    assert [mark.tokens for mark in schedule_marks(record)] == pytest.approx([163_840, end - 819_200])
    assert facts.acts_table(record).rows == [("stages.pretrain.schedule.extend_to", "null", f"{end}", f"{at:,}")]


def test_phases_that_a_nearer_end_leaves_no_tokens_are_not_shown(tmp_path: Path) -> None:
    at = round(0.5 * TOKENS)
    found = spans(told(write_run(tmp_path / "run", fraction=0.5), round(0.52 * TOKENS), at))
    assert [span.phase for span in found] == ["p1", "p3", "long"]
    assert [span.end for span in found] == pytest.approx([at, 0.52 * TOKENS, 0.52 * TOKENS + TOKENS // 10], abs=1)


def test_a_ramp_is_shown_plateau_by_plateau_with_what_the_ledger_counts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SOURCES)
    phase = "stages.pretrain.phases"
    change(run, {f"{phase}.p2.ramp_tokens": TOKENS // 10, f"{phase}.p3.blend": {"law": 1, "c": 2}})
    record = read_record(run)
    assert record.curriculum
    read = record.curriculum.consumed(record.curriculum.total_tokens)
    phases = {span.phase: span for span in spans(record)}
    assert len(phases["p2"].blend) > 2
    for span in phases.values():
        assert (span.blend[0].start_tokens, span.blend[-1].end_tokens) == (span.start, span.end)
        shown = {name: 0.0 for part in span.blend for name in part.shares}
        for part in span.blend:
            for name, share in part.shares.items():
                shown[name] += share * (part.end_tokens - part.start_tokens)
        assert shown == pytest.approx(read[span.stage][span.phase])
    (ax,) = blend_figure(record).axes
    borders = {part.start_tokens for span in phases.values() for part in span.blend}
    assert {bar.get_x() for bar in ax.patches if isinstance(bar, Rectangle) and bar.get_height() > 1} == borders


def test_marks_of_a_later_stage_count_the_whole_steps_before_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SOURCES)
    pretrain, extension = "stages.pretrain.tokens", "stages.long_context.schedule.warmup_tokens"
    change(run, {pretrain: TOKENS * 9 // 10 - 1, extension: 40_960})
    marks = [mark.tokens for mark in schedule_marks(read_record(run))]
    assert marks == [163_840, TOKENS * 9 // 10 - 1 - 819_200, TOKENS * 9 // 10 + 40_960]


def test_acts_are_in_the_order_of_their_tokens_and_then_of_telling(tmp_path: Path) -> None:
    field = "stages.pretrain.global_batch_size"
    told_in_turn = ((7680, 1), (5120, 2), (7680, 3))
    write_lines(
        tmp_path / HISTORY, [{"tokens": at, "field": field, "before": 16, "after": after} for at, after in told_in_turn]
    )
    rows = facts.acts_table(read_record(tmp_path)).rows
    assert [(row[2], row[3]) for row in rows] == [("2", "5,120"), ("1", "7,680"), ("3", "7,680")]


def test_without_a_recipe_phases_are_those_of_the_steps_and_shares_those_of_the_ledger(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    planned = spans(read_record(run))
    (run / "recipe.yaml").unlink()
    recorded = spans(read_record(run))
    assert [span.phase for span in recorded] == [span.phase for span in planned]
    step = 512 * 16
    assert [span.end for span in recorded] == pytest.approx([span.end for span in planned], abs=step)
    # Quotas are whole samples, 3,456 in the phase; the synthetic ledger has the weights themselves.
    assert recorded[0].blend[0].shares == pytest.approx(planned[0].blend[0].shares, abs=1 / 3456)


def test_time_is_the_sum_over_steps(tmp_path: Path) -> None:
    lines = [{"tokens": 1000, "tokens_per_second": 100}, {"tokens": 2000, "tokens_per_second": 50}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert facts.Card("Time in steps", "0:00:30", "sum over all steps, restarts included") in facts.cards(
        read_record(tmp_path)
    )


def test_baselines_are_compared_on_the_same_blend(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "validation.jsonl").write_text('{"tokens": 1, "sources": {}, "blend": {"bits_per_byte": 2.7}}\n')
    (run / "baselines.json").write_text('{"bigram": {"blend": 3.0}, "trigram": {"blend": 2.5}}')
    card = next(card for card in facts.cards(read_record(run)) if card.label == "Held-out blend")
    assert (card.value, card.note) == (
        "2.700",
        "bits per byte; 10.0 % below bigram (3.000); 8.0 % above trigram (2.500)",
    )


def test_fp8_is_summed_up_by_operand(tmp_path: Path) -> None:
    def step(tokens: int, *errors: float) -> dict[str, Any]:
        measures = [{"relative_error": error, "flushed": 0.5 - error, "saturated": 0.0} for error in errors]
        return {
            "tokens": tokens,
            "linears": {name: {"input": each} for name, each in zip("abc", measures, strict=True)},
        }

    write_lines(tmp_path / "fp8.jsonl", [step(1, 0.01, 0.02, 0.09), step(2, 0.02, 0.03, 0.025)])
    assert facts.quantisation_table(read_record(tmp_path)).rows == [
        ("input", "2.00 %", "2.50 %", "3.00 %", "b", "48.00 %", "a", "0 %")
    ]
    (tmp_path / "fp8.jsonl").unlink()
    assert facts.quantisation_table(read_record(tmp_path)).rows == []


def test_errors_that_fp8_has_none_of_are_explained(tmp_path: Path) -> None:
    def step(number: int, *shares: float) -> dict[str, Any]:
        linears = {
            name: {"gradient": {"relative_error": None if share else 0.03, "not_finite": share, "flushed": 0.0}}
            for name, share in zip("ab", shares, strict=True)
        }
        # The first named is the last of its pass.
        named = [f"gradient of {name}" for name, share in reversed(list(zip("ab", shares, strict=True))) if share]
        return {"step": number, "tokens": number, "not_finite": named, "linears": linears}

    write_lines(tmp_path / "fp8.jsonl", [step(1, 0, 0)])
    assert facts.not_finite_sentence(read_record(tmp_path)) == ""
    write_lines(tmp_path / "fp8.jsonl", [step(1, 0, 0), step(2, 0.1, 0.0), step(3, 0.1, 0.1)])
    record = read_record(tmp_path)
    (row,) = facts.quantisation_table(record).rows
    assert row[:4] == ("gradient", "3.00 %", "not finite", "not finite")
    assert facts.not_finite_sentence(record).startswith(
        "Infinite or NaN values, of which there is no error, in 2 of 3 counted steps, first in step 2: gradient of a;"
    )
    write_lines(tmp_path / "fp8.jsonl", [step(1, 0.1, 0.1)])
    assert "first in step 1: gradient of b and 1 more;" in facts.not_finite_sentence(read_record(tmp_path))
    assert "first in step 1: gradient of b and 1 more;" in render_report(tmp_path).read_text()


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["recipe.yaml", "environment.json", "ledger.json", "exit.json"]), _DOCUMENTS),
    st.dictionaries(
        st.sampled_from(
            ["metrics.jsonl", "validation.jsonl", "evaluation.jsonl", "fp8.jsonl", "samples.jsonl", HISTORY]
        ),
        st.lists(_DOCUMENTS),
    ),
)
def test_any_json_is_read_and_summarised(documents: dict[str, Any], lines: dict[str, list[Any]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        for file, content in documents.items():
            (Path(name) / file).write_text(json.dumps(content))
        for file, rows in lines.items():
            (Path(name) / file).write_text("\n".join(map(json.dumps, rows)))
        record = read_record(Path(name))
        assert len(facts.cards(record)) == 7
        assert len(schedule_marks(record)) <= 2 * len(record.recipe.get("stages") or "")
        summaries = (
            facts.heldout_table,
            facts.ledger_table,
            facts.acts_table,
            facts.quantisation_table,
            retrieval_table,
        )
        facts.not_finite_sentence(record)
        for table in (summary(record) for summary in summaries):
            assert all(len(row) == len(table.header) for row in table.rows)
