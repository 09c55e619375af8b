"""What a line of fp8.jsonl says of statistics."""

from __future__ import annotations

import json
from math import inf

from nano_pretrain.precision.losses import OPERANDS, described, not_finite
from nano_pretrain.precision.quantize import Statistics

FINE = Statistics(elements=100, nonzero=80, flushed=20, saturated=0, squared_error=4, squares=400)
WORSE = Statistics(elements=100, nonzero=100, flushed=0, saturated=0, squared_error=9, squares=400)
INFINITE = Statistics(elements=100, nonzero=100, flushed=0, saturated=1, squared_error=inf, squares=inf)


def test_each_operand_has_its_worst_linear() -> None:
    line = described({"a": dict.fromkeys(OPERANDS, FINE), "b": {**dict.fromkeys(OPERANDS, FINE), "weight": WORSE}})
    assert line["worst"]["input"] == {"linear": "a", "relative_error": 0.1}
    assert line["worst"]["weight"] == {"linear": "b", "relative_error": 0.15}
    assert line["linears"]["a"]["input"] == {"flushed": 0.25, "saturated": 0.0, "relative_error": 0.1}


def test_infinite_values_are_named_and_the_line_stays_json() -> None:
    losses = {"a": {**dict.fromkeys(OPERANDS, FINE), "gradient": INFINITE}, "b": dict.fromkeys(OPERANDS, FINE)}
    line = described(losses)
    assert json.loads(json.dumps(line, allow_nan=False))["linears"]["a"]["gradient"]["relative_error"] is None
    assert line["worst"]["gradient"]["linear"] == "b"
    assert not_finite(losses) == ["gradient of a"]


def test_where_nothing_is_finite_nothing_is_worst() -> None:
    assert described({"a": dict.fromkeys(OPERANDS, INFINITE)})["worst"]["weight"] is None
