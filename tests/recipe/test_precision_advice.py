"""Another precision that a refusal names composes beside a recipe's name and beside a written recipe, and mends it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from nano_pretrain.compose import compose
from nano_pretrain.plan.whole import make_plan
from nano_pretrain.platform.cuda_limits import CudaFacts, check_cuda
from nano_pretrain.recipe.acts import continuation
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.load import to_yaml
from nano_pretrain.recipe.schema import Recipe

OVERLAPPED = "parallel.tensor=2 parallel.sequence=true parallel.tensor_overlap=true"
NO_ENDS = "precision.bf16_first_linears=0 precision.bf16_last_linears=0"
LONG_FP32 = f"precision.name=fp32 {NO_ENDS} parallel.context=2 data.document_boundaries=ignore"

Check = Callable[[Recipe], object]


def nothing_more(recipe: Recipe) -> None:
    """What composing a recipe checks is enough."""


def on_gpu(capability: tuple[int, int], cuda: tuple[int, int] = (12, 9), *, fp32_scales: bool = False) -> Check:
    return lambda recipe: check_cuda(recipe, CudaFacts(capability, cuda, fp32_scales))


# Overrides of tiny, what checks the recipe beyond the rules, how many other precisions the refusal names.
REFUSED: list[tuple[str, Check, int]] = [
    ("precision.name=bf16", nothing_more, 2),
    ("model.ffn_hidden_size=770", nothing_more, 1),
    ("parallel.tensor=2 parallel.sequence=true model.mamba_num_heads=16", nothing_more, 1),
    ("model.pattern=M*M-", nothing_more, 2),
    (OVERLAPPED, nothing_more, 2),
    ("", on_gpu((8, 0)), 1),
    ("", on_gpu((8, 9)), 1),
    ("", on_gpu((9, 0), (12, 8)), 1),
    ("", on_gpu((10, 0), fp32_scales=True), 1),
    (LONG_FP32, on_gpu((9, 0)), 1),
    ("plan.hardware=a100", make_plan, 1),
]


def refusal(check: Check, arguments: list[str]) -> str:
    """What is wrong with a recipe, or nothing."""
    try:
        check(compose(arguments).recipe)
    except UserError as error:
        return str(error)
    return ""


def known_field(line: str) -> str:
    """The field that a refusal names, which is one of the recipe."""
    field = line.partition(": ")[0]
    assert "." in field, line
    return field


def precisions(line: str) -> list[list[str]]:
    """The precisions that a fix names, each as its overrides."""
    fix = line.partition("; ")[2]
    assert not re.search(r"\bprecision=", fix), "a group cannot be chosen beside a written recipe"
    return [found.split() for found in re.findall(r"precision\.\w+=\w+(?: precision\.\w+=\w+)*", fix)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of runs of tiny, by precision."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("fp8_blockwise", "bf16")}
    for name, directory in found.items():
        (directory / "recipe.yaml").write_text(to_yaml(compose(["recipe=tiny", f"precision={name}"]).recipe))
    return found


@pytest.mark.parametrize(("overrides", "check", "count"), REFUSED)
def test_another_precision_mends_it(overrides: str, check: Check, count: int, runs: dict[str, Path]) -> None:
    written = runs["fp8_blockwise"] / "recipe.yaml"
    arguments = ["data.path=nowhere", *overrides.split()]
    line = refusal(check, ["recipe=tiny", *arguments])
    others = precisions(line)
    assert len(others) == count, line
    for recipe, other in itertools.product(("tiny", written), others):
        again = refusal(check, [f"recipe={recipe}", *arguments, *other])
        assert not again or known_field(again) != known_field(line), (other, again)


@pytest.mark.parametrize(("before", "now"), [("fp8_blockwise", "bf16"), ("bf16", "fp8_blockwise")])
@pytest.mark.parametrize("kind", ["named", "written"])
def test_the_precision_of_a_run_continues_it(kind: str, before: str, now: str, runs: dict[str, Path]) -> None:
    named = ["recipe=tiny", f"precision={now}"]
    arguments = named if kind == "named" else [f"recipe={runs[now] / 'recipe.yaml'}"]

    def continues(recipe: Recipe) -> object:
        return continuation(recipe, arguments, runs[before], 0)

    line = refusal(continues, arguments)
    assert line.startswith(f"precision.name: {now} differs from {before} of the run in ")
    (way_back,) = precisions(line)
    assert refusal(continues, [*arguments, *way_back]) == ""
