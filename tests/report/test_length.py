"""Retrieval and loss by position in the report: before and after each stage, and what is odd."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nano_pretrain.report import render_report
from nano_pretrain.report.length import positions_figure, retrieval_table
from nano_pretrain.report.record import read_record
from tests.report.synthetic_run import TOKENS, write_lines, write_run

EDGES = [0, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 724, 1024, 1448, 2048]


def line(tokens: int, stage: str, length: int, score: float, match: float | None = None) -> dict[str, Any]:
    """As the trainer and the verb write it."""
    edges = [edge for edge in EDGES if edge < length] + [length]
    generated = None if match is None else {"score": match, "standard_error": 0.05}
    found = {"chance": 0.25, "rank": {"score": score, "standard_error": 0.08}, "match": generated}
    losses = [5 - 0.1 * number - score for number in range(len(edges) - 1)]
    bins = {"edges": edges, "loss": losses, "standard_error": [0.1] * len(losses)}
    positions = {"documents": "whole", "samples": 8, "loss": 4.0, "standard_error": 0.1, "bins": bins}
    retrieval = {"niah_single": found, "vt": found}
    return {"tokens": tokens, "stage": stage, "length": length, "retrieval": retrieval, "positions": positions}


LINES = [
    line(TOKENS * 9 // 10, "pretrain", 512, 0.5),
    line(TOKENS * 9 // 10, "pretrain", 2048, 0.3),
    line(TOKENS, "long_context", 512, 0.4),
    line(TOKENS, "long_context", 2048, 0.9),
]


def test_scores_stand_side_by_side_for_each_stage(tmp_path: Path) -> None:
    write_lines(tmp_path / "evaluation.jsonl", LINES)
    table = retrieval_table(read_record(tmp_path))
    assert table.header[2:] == ("pretrain, 2.95M: ranked", "generated", "long_context, 3.28M: ranked", "generated")
    assert table.rows[:2] == [
        ("niah_single, 512 tokens", "0.25", "0.50 ± 0.08", "-", "0.40 ± 0.08", "-"),
        ("vt, 512 tokens", "0.25", "0.50 ± 0.08", "-", "0.40 ± 0.08", "-"),
    ]
    assert table.rows[3] == ("vt, 2,048 tokens", "0.25", "0.30 ± 0.08", "-", "0.90 ± 0.08", "-")


def test_what_is_evaluated_again_replaces_what_was_before_task_by_task(tmp_path: Path) -> None:
    again = line(TOKENS, "long_context", 2048, 0.7, match=0.2)
    del again["retrieval"]["vt"]
    write_lines(tmp_path / "evaluation.jsonl", [LINES[3], again])
    assert retrieval_table(read_record(tmp_path)).rows == [
        ("niah_single, 2,048 tokens", "0.25", "0.70 ± 0.08", "0.20 ± 0.05"),
        ("vt, 2,048 tokens", "0.25", "0.90 ± 0.08", "-"),
    ]


def test_other_precisions_and_sample_counts_have_rows_of_their_own(tmp_path: Path) -> None:
    def under(precision: str, examples: int, found: dict[str, Any]) -> dict[str, Any]:
        return {**found, "precision": precision, "examples": examples, "seed": 0}

    in_run = [under("fp8_blockwise", 8, found) for found in (LINES[1], LINES[3])]
    by_verb = [
        under("bf16", 8, line(TOKENS, "long_context", 2048, 0.7, match=0.2)),
        under("bf16", 32, line(TOKENS, "long_context", 2048, 0.6)),
    ]
    write_lines(tmp_path / "evaluation.jsonl", [*in_run, *by_verb])
    record = read_record(tmp_path)
    table = retrieval_table(record)
    assert [row for row in table.rows if row[0].startswith("vt")] == [
        ("vt, 2,048 tokens, fp8_blockwise, 8 examples", "0.25", "0.30 ± 0.08", "-", "0.90 ± 0.08", "-"),
        ("vt, 2,048 tokens, bf16, 8 examples", "0.25", "-", "-", "0.70 ± 0.08", "0.20 ± 0.05"),
        ("vt, 2,048 tokens, bf16, 32 examples", "0.25", "-", "-", "0.60 ± 0.08", "-"),
    ]
    (ax,) = positions_figure(record).axes
    texts = {text.get_text().rpartition(" ")[0] for text in ax.texts}
    assert {"long context 3.28M, fp8 blockwise, 8 examples"} <= {text.replace("_", " ") for text in texts}
    assert len({text for text in texts if "examples" in text}) == 4
    write_lines(tmp_path / "evaluation.jsonl", in_run)
    assert {row[0] for row in retrieval_table(read_record(tmp_path)).rows} == {
        "niah_single, 2,048 tokens",
        "vt, 2,048 tokens",
    }


def test_the_longest_length_is_drawn_with_a_line_for_each_stage(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_lines(run / "evaluation.jsonl", LINES)
    (ax,) = positions_figure(read_record(run)).axes
    drawn = [found.get_ydata() for found in ax.lines if len(found.get_xdata()) == len(EDGES) - 1]  # type: ignore[arg-type]
    expected = [found["positions"]["bins"]["loss"] for found in LINES if found["length"] == 2048]
    assert [list(values) for values in drawn] == expected  # type: ignore[arg-type]
    texts = [text.get_text() for text in ax.texts]
    assert {"pretrain: 512", "long_context: 2,048"} <= set(texts), "the lengths that were trained on are marked"


def test_page_has_the_section_only_where_something_was_evaluated(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", fraction=0.25)
    assert 'id="length"' not in render_report(run).read_text()
    write_lines(run / "evaluation.jsonl", LINES)
    section = re.search(r'<section id="length".*?</section>', render_report(run).read_text(), re.DOTALL)
    assert section
    assert "<td>niah_single, 512 tokens</td>" in section[0]
    assert "<img" in section[0]
    assert (run / "report/positions.png").exists()


@pytest.mark.parametrize(
    "odd",
    [
        {"tokens": 5, "length": 512},
        {"tokens": 5, "length": 512, "retrieval": {"vt": 3}, "positions": {"bins": {"edges": [0, 1], "loss": ["x"]}}},
        {"tokens": 5, "length": 0, "positions": {"bins": {"edges": [0, 0], "loss": [1.0]}}},
        {"tokens": None, "retrieval": []},
    ],
)
def test_odd_lines_are_no_error(tmp_path: Path, odd: dict[str, Any]) -> None:
    run = write_run(tmp_path / "run", fraction=0.1)
    (run / "evaluation.jsonl").write_text(json.dumps(odd) + "\n{torn")
    page = render_report(run).read_text()
    assert "1 of 2 lines of evaluation.jsonl cannot be read." in page
