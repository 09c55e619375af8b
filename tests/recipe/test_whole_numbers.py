"""Whole numbers may be written as 1e12, where the schema has whole numbers and only there."""

from __future__ import annotations

import pytest

from nano_pretrain.compose import compose, compose_sweep
from nano_pretrain.recipe.whole_numbers import in_digits


@pytest.mark.parametrize(
    ("written", "value"), [("1e12", 10**12), ("2.5E+11", 25 * 10**10), ("3276800.0", 3_276_800), ("9.e0", 9)]
)
def test_a_whole_number(written: str, value: int) -> None:
    # Through a mapping of names, a plain group and an optional field.
    for field in ("stages.pretrain.tokens", "model.hidden_size", "stages.pretrain.gpus"):
        assert in_digits(f"{field}={written}") == f"{field}={value}"


@pytest.mark.parametrize(
    "override",
    [
        "stages.pretrain.tokens=1.5",
        "stages.pretrain.tokens=1e-3",
        "stages.pretrain.tokens=1e999999999",  # would be a number of a billion digits
        "stages.pretrain.tokens=x",
        "stages.pretrain.tokens",
        "run.name=1e3",
        "optimizer.eps=1e0",
        "parallel.sequence=1.0",
        "stages.pretrain.phases.p1.blend.code=1e1",
        "stages=1e1",
        "nothing.at.all=1e3",
        "recipe=1e3",
    ],
)
def test_everything_else_stays_as_it_is(override: str) -> None:
    assert in_digits(override) == override


def test_it_is_composed_alone_and_in_a_sweep() -> None:
    assert compose(["stages.pretrain.tokens=4e6"]).recipe.stages["pretrain"].tokens == 4_000_000
    jobs = compose_sweep(["stages.pretrain.tokens=4e6,5e6"])
    assert [job.recipe.stages["pretrain"].tokens for job in jobs] == [4_000_000, 5_000_000]
