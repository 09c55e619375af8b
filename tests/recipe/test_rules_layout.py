"""A layout that does not divide the model is refused with the values that do, and with no others."""

from __future__ import annotations

import re

import pytest

from nano_pretrain.compose import compose
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.rules_fp8 import fp8_multiples
from nano_pretrain.recipe.rules_layout import divisors
from nano_pretrain.recipe.rules_ranks import check_layout

NAMED = ["nano_12b_v2", "nano_12b_v2_paper", "nano_9b_v2", "nemotron_h_4b", "nemotron_h_47b", "nemotron_h_56b", "tiny"]


def advised(line: str) -> set[int]:
    """The values that a refusal names."""
    return {int(number) for number in re.findall(r"\d+", line.partition("; write ")[2])}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize(("field", "wrong"), [("tensor", 7), ("context", 7 * 64)])
def test_exactly_the_values_pass_that_the_refusal_names(name: str, field: str, wrong: int) -> None:
    recipe = compose([f"recipe={name}", "extension=none"]).recipe

    def refused(value: int) -> str:
        setattr(recipe.parallel, field, value)
        # The number of ranks is another rule's.
        layout, pretrain = recipe.parallel, recipe.stages["pretrain"]
        pretrain.gpus = layout.tensor * layout.pipeline * layout.context
        pretrain.micro_batch_size = 1
        try:
            check_layout(recipe, "pretrain")
            fp8_multiples(recipe)
        except UserError as error:
            return str(error)
        return ""

    refusal = refused(wrong)
    assert refusal.startswith(f"parallel.{field}: ")
    assert advised(refusal) == {value for value in range(1, 600) if not refused(value)}


@pytest.mark.parametrize(
    ("overrides", "multiple"),
    [
        ("layout=tp2", 2),
        ("parallel.tensor=2", 1),
        ("parallel.context=2", 4),
        ("layout=tp2 parallel.context=2", 8),
        ("parallel.tensor=2 parallel.context=2", 4),
    ],
)
def test_a_sequence_is_divided_by_sequence_and_context_parallelism_only(overrides: str, multiple: int) -> None:
    recipe = compose(["recipe=tiny", "precision=bf16", "cluster.gpus=4", *overrides.split()]).recipe
    for length in range(512, 521):
        recipe.stages["pretrain"].sequence_length = length
        if length % multiple:
            with pytest.raises(UserError, match=rf"^stages\.pretrain\.sequence_length: {length} .* = {multiple}; "):
                check_layout(recipe, "pretrain")
        else:
            check_layout(recipe, "pretrain")


@pytest.mark.parametrize("number", range(1, 200))
def test_divisors(number: int) -> None:
    assert divisors(number) == [size for size in range(1, number + 1) if number % size == 0]
