"""What a line of fp8.jsonl says of statistics."""

from __future__ import annotations

import json
from math import inf, nan

import pytest

from nano_pretrain.precision.losses import OPERANDS, described, not_finite
from nano_pretrain.precision.quantize import Statistics

FINE = Statistics(elements=100, nonzero=80, flushed=20, saturated=0, not_finite=0, squared_error=4, squares=400)
WORSE = Statistics(elements=100, nonzero=100, flushed=0, saturated=0, not_finite=0, squared_error=9, squares=400)
INFINITE = Statistics(elements=100, nonzero=100, flushed=0, saturated=1, not_finite=1, squared_error=inf, squares=inf)
NAN = Statistics(elements=100, nonzero=100, flushed=0, saturated=0, not_finite=50, squared_error=nan, squares=nan)


def test_each_operand_has_its_worst_linear() -> None:
    line = described({"a": dict.fromkeys(OPERANDS, FINE), "b": {**dict.fromkeys(OPERANDS, FINE), "weight": WORSE}})
    assert line["worst"]["input"] == {"linear": "a", "relative_error": 0.1}
    assert line["worst"]["weight"] == {"linear": "b", "relative_error": 0.15}
    assert line["linears"]["a"]["input"] == {
        "flushed": 0.25, "saturated": 0.0, "not_finite": 0.0, "relative_error": 0.1,
    }  # fmt: skip
    assert line["not_finite"] == []


@pytest.mark.parametrize("what", [INFINITE, NAN])
def test_what_is_not_finite_is_named_and_the_line_stays_json(what: Statistics) -> None:
    losses = {"a": {**dict.fromkeys(OPERANDS, FINE), "gradient": what}, "b": dict.fromkeys(OPERANDS, FINE)}
    line = json.loads(json.dumps(described(losses), allow_nan=False))
    of_gradient = line["linears"]["a"]["gradient"]
    assert of_gradient["relative_error"] is None
    assert of_gradient["not_finite"] == what.not_finite / 100
    assert line["worst"]["gradient"]["linear"] == "b"
    assert line["not_finite"] == ["gradient of a"]


def test_what_is_not_finite_is_named_from_its_cause_on() -> None:
    everything = dict.fromkeys(OPERANDS, NAN)
    fine = dict.fromkeys(OPERANDS, FINE)
    forward = {"a": {**fine, "gradient": NAN}, "b": {**fine, "weight": NAN, "gradient": NAN}, "c": everything}
    assert not_finite(forward) == [
        "weight of b", "input of c", "weight of c", "gradient of c", "gradient of b", "gradient of a",
    ]  # fmt: skip
    backward = {"a": {**fine, "gradient": NAN}, "b": {**fine, "gradient": NAN}, "c": fine}
    assert not_finite(backward) == ["gradient of b", "gradient of a"]


def test_where_nothing_is_finite_nothing_is_worst() -> None:
    assert described({"a": dict.fromkeys(OPERANDS, INFINITE)})["worst"]["weight"] is None
