"""Where a search finds nothing, the counts that are named are the nearest on which it finds something."""

from __future__ import annotations

import pytest

from nano_pretrain.plan import search as module
from nano_pretrain.plan.device import Device
from nano_pretrain.plan.search import search_stage
from nano_pretrain.plan.search_refusal import check_found, nearest_counts
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import Recipe
from tests.plan.recipes import STAGE, device, named

H100 = device("h100")


@pytest.fixture(autouse=True)
def few_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the tests need, so that a search costs little."""
    monkeypatch.setattr(module, "TENSOR", (2, 4, 8))
    monkeypatch.setattr(module, "PIPELINE", (1, 2))
    monkeypatch.setattr(module, "CONTEXT", (1, 2))
    monkeypatch.setattr(module, "MICRO_BATCHES", (1, 2))


def searched(name: str, *overrides: str) -> Recipe:
    """A recipe whose own layout is not checked."""
    return named(name, "plan.search=true", *overrides)


def refusal(recipe: Recipe, hardware: Device = H100) -> str:
    """What the search says in the end."""
    searches = {name: search_stage(recipe, name, hardware, 1.0) for name in recipe.stages}
    with pytest.raises(RecipeError) as error:
        check_found(recipe, searches, hardware)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "count"), [("nano_12b_v2", 7), pytest.param("nemotron_h_56b", 15, marks=pytest.mark.full)]
)
def test_the_nearest_counts_are_the_nearest(name: str, count: int) -> None:
    def goes(devices: int) -> bool:
        return bool(search_stage(searched(name, f"cluster.gpus={devices}"), STAGE, H100, 1.0).fitting)

    found = nearest_counts(searched(name, f"cluster.gpus={count}"), STAGE, H100)
    below = [devices for devices in range(1, count) if goes(devices)][-1:]
    above = next(devices for devices in range(count + 1, 100) if goes(devices))
    assert found == [*below, above]
    assert not goes(count)


def test_what_breaks_a_rule_is_sent_to_other_counts_by_the_field_that_the_stage_has() -> None:
    line = refusal(searched("nano_12b_v2", "cluster.gpus=6144"))
    assert line.startswith(
        "cluster.gpus: no layout of stage pretrain goes on 6144 x H100 SXM; write cluster.gpus=5888 "
    )
    assert line.endswith(", or change stages.pretrain.global_batch_size")
    own = refusal(searched("nano_12b_v2", "cluster.gpus=5888", "stages.long_context.gpus=100"))
    assert own.startswith("stages.long_context.gpus: no layout of stage long_context goes on 100 x H100 SXM; ")


def test_what_is_too_large_hears_of_the_nearest_miss() -> None:
    line = refusal(searched("nemotron_h_56b", "cluster.gpus=8", "precision=bf16"), device("a100"))
    assert line.startswith("cluster.gpus: no layout of stage pretrain goes on 8 x A100 SXM: the nearest miss, TP")
    assert " GB of memory on its largest rank with recompute.granularity=full, A100 SXM has 80 GB; " in line
    assert "; write cluster.gpus=16, or shorten stages.pretrain.sequence_length, or choose plan.hardware with" in line


def test_what_is_too_large_on_any_number_of_devices_is_not_sent_to_another() -> None:
    length = 2**19
    line = refusal(
        searched(
            "nemotron_h_56b",
            "cluster.gpus=6144",
            f"stages.pretrain.sequence_length={length}",
            f"validation.tokens_per_source={length}",
        )
    )
    assert line.startswith("cluster.gpus: no layout of stage pretrain goes on 6144 x H100 SXM: the nearest miss, TP8 ")
    assert line.endswith("; shorten stages.pretrain.sequence_length, or choose plan.hardware with more memory")


def test_a_rule_that_every_layout_breaks_is_said_itself() -> None:
    line = refusal(searched("tiny", "precision=fp8_blockwise", "model.hidden_size=250"), device("cpu"))
    assert line.startswith("model.hidden_size: 250 is no multiple of 128, which fp8_blockwise needs")
