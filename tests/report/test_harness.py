"""Scores of lm-evaluation-harness in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nano_pretrain.report import render_report
from nano_pretrain.report.harness import harness_table
from nano_pretrain.report.record import read_record
from tests.report.synthetic_run import TOKENS, write_lines, write_run


def line(tokens: int, stage: str, accuracy: float, error: float | None = 0.05, **more: Any) -> dict[str, Any]:
    """As the trainer and the verb write it."""
    metrics = {"acc": {"score": accuracy, "standard_error": error}}
    place = {"tokens": tokens, "stage": stage, "precision": "bf16", "task": "choice", "version": 1}
    return {**place, "examples": 24, "fewshot": 0, "metrics": metrics, **more}


def test_scores_stand_side_by_side_and_the_same_again_replaces_what_was_before(tmp_path: Path) -> None:
    again = [line(TOKENS, "extension", 0.1), line(TOKENS, "extension", 0.75, error=None)]
    fewer = line(TOKENS, "extension", 0.5, examples=5)
    write_lines(tmp_path / "harness.jsonl", [line(TOKENS // 2, "pretrain", 0.25), *again, fewer])
    table = harness_table(read_record(tmp_path))
    assert table.header == ("task", "metric", "pretrain, 1.64M", "extension, 3.28M")
    assert table.rows == [
        ("choice, bf16, 24 examples, 0-shot", "acc", "0.250 ± 0.050", "0.750"),
        ("choice, bf16, 5 examples, 0-shot", "acc", "-", "0.500 ± 0.050"),
    ]


def test_page_has_them_where_there_are_any(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert 'id="harness"' not in render_report(run).read_text()
    write_lines(run / "harness.jsonl", [line(TOKENS, "pretrain", 0.25)])
    assert "<td>0.250 ± 0.050</td>" in render_report(run).read_text()
    (run / "harness.jsonl").write_text("{torn")
    assert "1 of 1 lines of harness.jsonl cannot be read." in render_report(run).read_text()
