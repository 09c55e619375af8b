"""Normalising and filtering: each reason for what it is meant for, and for nothing else."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_pretrain.prepare.clean import Drop, normalise, reason_to_drop
from tests.prepare.small_corpus import prose

PROSE = prose(random.Random(0), 60)
CODE = "def area(radius: float) -> float:\n    return math.pi * radius**2\n\n\nprint(area(2.0), area(3.0))\n"
TABLE = json.dumps({"names": [{"id": number, "tag": f"t{number}"} for number in range(40)]}, indent=4)
THAI = "กลาโหมกัมพูชาแล้ว โดยขอร้องให้เปลี่ยนข้อความ เพราะเกรงจะเป็นเงื่อนไขให้กำลังพลเผชิญหน้ากัน"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE, None),
        (CODE, None),
        (TABLE, None),
        (THAI, None),
        ("Twelve words.", Drop.TOO_SHORT),
        ("", Drop.TOO_SHORT),
        (PROSE + "\x00\x02", Drop.BINARY),
        (PROSE + "\ufffd" * 5, Drop.BINARY),
        ("+-*/=<>|&^%$#@!~" * 20 + PROSE[:50], Drop.NOT_TEXT),
        ("\n".join(["The very same line, over and over again."] * 30), Drop.REPETITIVE),
        ("}\n" * 40 + PROSE, None),
    ],
)
def test_reasons(text: str, reason: Drop | None) -> None:
    assert reason_to_drop(normalise(text)) == reason


@given(st.text(st.sampled_from("ab \t\n\r\ufeff\v"), max_size=80))
def test_normalising_is_idempotent_and_keeps_every_word(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert once.split() == text.replace("\ufeff", "").split()
    assert "\r" not in once
    assert " \n" not in once
    assert "\n\n\n\n" not in once


def test_indentation_survives() -> None:
    assert normalise("if x:  \r\n    y = 1\r\n\r\n\r\n\r\n\r\nz\n") == "if x:\n    y = 1\n\n\nz"
