"""A small run that is evaluated at the end of its stage, then by the verb, and shown in its report."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.corpora import write_corpus
from tests.train.scenarios import SHORT
from tests.train.small_run import TOKENS_PER_STEP, Finished, SmallRuns, lines

LENGTHS = ["evaluate.lengths=[402,500]", "evaluate.tasks=[niah_single]", "evaluate.examples=2"]
"""Longer than a sample of 128, and no multiples of what FP8 takes."""


BOTH = ("rank", "match")


def scores(line: dict[str, Any]) -> dict[str, Any]:
    """By rank and by generation."""
    return {name: line["retrieval"]["niah_single"][name] for name in BOTH}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRuns:
    path = tmp_path_factory.mktemp("evaluated")
    return SmallRuns(write_corpus(path / "corpus"), path / "runs")


@pytest.fixture(scope="module")
def trained(small: SmallRuns) -> list[dict[str, Any]]:
    """What the end of the stage has left, in FP8."""
    fp8 = ["precision=fp8_blockwise", "model.mamba_num_heads=16"]
    done = small.run("train", "run", *SHORT, *fp8, *LENGTHS)
    assert done.code == 0, done.text
    return lines(small.path("run") / "evaluation.jsonl")


@pytest.fixture(scope="module")
def verb(small: SmallRuns, trained: list[dict[str, Any]]) -> Finished:
    return small.run("evaluate", "run", "evaluate.lengths=[402]", "evaluate.tasks=[niah_single]", "evaluate.examples=2")


def test_stage_end_leaves_a_line_for_each_length(trained: list[dict[str, Any]]) -> None:
    places = [(line["tokens"], line["stage"], line["length"], line["precision"]) for line in trained]
    assert places == [(2 * TOKENS_PER_STEP, "pretrain", length, "fp8_blockwise") for length in (402, 500)]
    for line in trained:
        assert all(found["score"] in (0, 0.5, 1) for found in scores(line).values())
        assert 0 < line["positions"]["loss"] < 10


def test_verb_adds_its_line_and_prints_tables(small: SmallRuns, trained: list[dict[str, Any]], verb: Finished) -> None:
    assert verb.code == 0, verb.text
    *before, line = lines(small.path("run") / "evaluation.jsonl")
    assert before == trained
    assert line["precision"] == "bf16"
    assert scores(line).keys() == scores(trained[0]).keys()
    # The run's products are FP8, the verb's BF16: losses of weights near their start hardly differ (measured 2e-4).
    assert line["positions"]["loss"] == pytest.approx(trained[0]["positions"]["loss"], rel=2e-3)
    assert line["positions"]["samples"] == trained[0]["positions"]["samples"]
    for text in (f"after {2 * TOKENS_PER_STEP:,} tokens, stage pretrain", "niah_single", "402", "from 256", "samples"):
        assert text in verb.text


def test_report_shows_what_was_evaluated(small: SmallRuns, verb: Finished) -> None:
    from nano_pretrain.report import render_report

    page = render_report(small.path("run")).read_text()
    for precision in ("fp8_blockwise", "bf16"):
        assert f"<td>niah_single, 402 tokens, {precision}</td>" in page
    assert "Held-out loss by position" in page


def test_what_does_not_fit_is_one_line(small: SmallRuns, trained: list[dict[str, Any]], tmp_path: Path) -> None:
    """In this process: nothing of it comes as far as the model."""
    from nano_pretrain.evaluate.checkpoint import evaluate_checkpoint
    from nano_pretrain.recipe.errors import UserError
    from nano_pretrain.recipe.load import recorded_recipe
    from nano_pretrain.recipe.schema import EvaluateConfig

    run = small.path("run")
    recipe = recorded_recipe(run)

    def refusal(**options: Any) -> str:
        with pytest.raises(UserError) as refused:
            evaluate_checkpoint(recipe, EvaluateConfig(**options), run)
        return str(refused.value)

    assert "evaluate.lengths: is empty; write for example" in refusal()
    assert "evaluate.lengths: 60 tokens are too few for" in refusal(lengths=[60])
    assert "evaluate.lengths: no source has 50000 held-out tokens; write at most" in refusal(lengths=[50_000], tasks=[])
    assert "evaluate.checkpoint: no whole checkpoint at 5 tokens" in refusal(lengths=[402], tasks=[], checkpoint=5)
    other = write_corpus(tmp_path / "corpus", seed=1)
    recipe.data.path = str(other)
    assert "are not those that" in refusal(lengths=[402], tasks=[])
    shutil.rmtree(other)
    assert "holds no prepared corpus" in refusal(lengths=[402], tasks=[])
