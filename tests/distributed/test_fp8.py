"""FP8 under parallelism: one rank's, bit for bit, where no matrix is divided, else what one rank makes of the parts."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from nano_pretrain.precision.linear import BLOCKWISE, CURRENT_SCALING
from nano_pretrain.recipe.schema import ParallelConfig, PrecisionConfig, Recipe
from tests.distributed import layouts
from tests.distributed.courses import END, SAVED, Layout, Mistake
from tests.distributed.fp8_ranks import Uses, quantised, use_each
from tests.distributed.fp8_reference import place_of, reference
from tests.distributed.layouts import LAYOUTS, Courses, close, course_recipe, some_quick
from tests.distributed.ranks import run_ranks
from tests.distributed.training import groups
from tests.model.recipes import small_recipe

PRECISION = PrecisionConfig("fp8_blockwise", bf16_first_linears=4, bf16_last_linears=2)
PATTERN = "M*M-*M*-*"
EXPECTED = [
    "layers.2.mixer.in_proj", "layers.2.mixer.out_proj", "layers.3.mlp.linear_fc1", "layers.3.mlp.linear_fc2",
    "layers.4.self_attention.linear_proj", "layers.4.self_attention.linear_qkv", "layers.5.mixer.in_proj",
    "layers.5.mixer.out_proj", "layers.6.self_attention.linear_proj", "layers.6.self_attention.linear_qkv",
    "layers.7.mlp.linear_fc1", "layers.7.mlp.linear_fc2",
]  # fmt: skip
"""All but the first four and the last two, sorted."""


def quantised_names(recipe: Recipe, layout: ParallelConfig, mistake: Mistake = nullcontext) -> list[str]:
    """On this rank."""
    from nano_pretrain.model.hybrid import build_model

    with groups(layout) as platform, mistake():
        return list(quantised(build_model(recipe, layout, platform, 48)))


def names(layout: ParallelConfig, mistake: Mistake = nullcontext) -> list[str]:
    recipe = replace(small_recipe(pattern=PATTERN), precision=PRECISION)
    found = run_ranks(quantised_names, layout.pipeline, recipe, layout, mistake)
    return sorted(name for rank in found for name in rank)


def one_too_few() -> Any:
    """The first linear after the BF16 ones stays BF16 too."""
    from nano_pretrain.precision import parallel, placement

    return mock.patch.object(parallel, "fp8_linears", lambda *of_model: placement.fp8_linears(*of_model)[1:])


@pytest.mark.parametrize(
    "layout",
    [
        ParallelConfig(),
        ParallelConfig(pipeline=2, pipeline_layers=[1, 8]),
        pytest.param(ParallelConfig(pipeline=3, pipeline_layers=[1, 5, 3]), marks=pytest.mark.full),
    ],
)
def test_bf16_ends_are_those_of_the_whole_model(layout: ParallelConfig) -> None:
    assert names(layout) == EXPECTED


def test_an_end_that_is_off_by_one_is_seen() -> None:
    assert names(ParallelConfig(), one_too_few) != EXPECTED


FP8 = {
    "blockwise": BLOCKWISE,
    # With powers of two, where a tile ends shows only in numbers 2^-14 below its largest.
    "blockwise, FP32 scales": replace(BLOCKWISE, power_of_two=False),
    "current scaling": CURRENT_SCALING,
}
DIVIDED = {
    "TP2": ParallelConfig(tensor=2),
    "TP2 with SP": ParallelConfig(tensor=2, sequence=True),
    "CP2": ParallelConfig(context=2),
    "TP2 x CP2 with SP": ParallelConfig(tensor=2, context=2, sequence=True),
}
SEVERAL_TILES: dict[str, Any] = {
    "hidden_size": 136, "ffn_hidden_size": 288, "num_attention_heads": 8, "num_query_groups": 4, "head_dim": 36,
    "mamba_num_heads": 8, "mamba_head_dim": 34, "mamba_num_groups": 2, "mamba_state_dim": 18,
}  # fmt: skip
SUMS = 1e-6
"""Relative norm: FP32 sums in another order; measured up to 4e-7."""
TILES = 3e-3
"""What other tiles change at least, where any do: another rounding to 4 bits of a part of the elements."""


def uses(layout: ParallelConfig, mistake: Mistake = nullcontext) -> list[dict[str, Uses]]:
    """Of all ranks."""
    found: list[dict[str, Uses]] = run_ranks(
        use_each, layout.tensor * layout.context, small_recipe(**SEVERAL_TILES), layout, FP8, mistake
    )
    return found


def differences(found: list[dict[str, Uses]], fp8: str, layout: ParallelConfig, cut: bool) -> dict[str, float]:
    """Largest relative difference, over all linears, of each product from one rank's."""
    largest = dict.fromkeys(("y", "dx", "dweight"), 0.0)
    for linear in found[0][fp8]:
        parts = [rank[fp8][linear] for rank in found]
        place = place_of(linear, [part.weight for part in parts], small_recipe(**SEVERAL_TILES).model, layout)
        whole = place.whole(parts)
        for name, expected in reference(whole, FP8[fp8], place if cut else None).items():
            difference = float((getattr(whole, name) - expected).norm() / expected.norm())
            largest[name] = max(largest[name], difference)
    return largest


def check_products(found: list[dict[str, Uses]], layout: ParallelConfig) -> None:
    for fp8 in FP8:
        worst = differences(found, fp8, layout, cut=True)
        assert max(worst.values()) < SUMS, f"{fp8}: {worst}"


@pytest.mark.parametrize("name", some_quick(DIVIDED, ["TP2", "TP2 with SP", "CP2"]))
def test_every_product_is_one_ranks_with_the_tiles_of_the_layout(name: str) -> None:
    layout = DIVIDED[name]
    found = uses(layout)
    assert len(found[0]["blockwise"]) == 2 * len(small_recipe().model.pattern)
    check_products(found, layout)
    # The comparison can tell tiles apart.
    assert max(differences(found, "blockwise, FP32 scales", layout, cut=False).values()) > TILES
    assert min(differences(found, "current scaling", layout, cut=False).values()) > TILES
    assert max(differences(found, "blockwise", layout, cut=False).values()) < 10 * SUMS


def own_part_gathered() -> Any:
    """SP: a linear takes its own part of the sequence for those of the others."""
    from nano_pretrain.precision.parallel import _Ranks

    def gather(self: Any, own: torch.Tensor) -> Any:
        return torch.cat([own] * (self.group.size() if self.sequence else 1))

    return mock.patch.object(_Ranks, "gather", gather)


def weights_of_own_part() -> Any:
    """SP: the gradient of a weight comes from a rank's own part of the sequence."""
    from nano_pretrain.precision import linear, parallel

    def of_own_part(gradient: Any, x: Any, *others: Any) -> Any:
        own = x.chunk(2)[torch.distributed.get_rank()]
        return linear.weight_gradient(gradient, torch.cat([own, own]), *others)

    return mock.patch.object(parallel, "weight_gradient", of_own_part)


def input_gradients_not_summed() -> Any:
    """TP: each rank goes on with its part of the gradient of a linear's input."""
    from nano_pretrain.precision.parallel import _Ranks

    def reduce(self: Any, gradient: torch.Tensor) -> Any:
        return gradient.chunk(self.group.size())[self.group.rank()] if self.sequence else gradient

    return mock.patch.object(_Ranks, "reduce", reduce)


MISTAKES: dict[Mistake, str] = {
    own_part_gathered: "y",
    weights_of_own_part: "dweight",
    input_gradients_not_summed: "dx",
}


@pytest.mark.parametrize("mistake", some_quick(MISTAKES, [weights_of_own_part]))
def test_a_mistake_of_the_communication_is_seen(mistake: Mistake) -> None:
    layout = DIVIDED["TP2 with SP"]
    with pytest.raises(AssertionError, match=f"copies differ|'{MISTAKES[mistake]}': [0-9]*\\.[0-9]*[1-9]"):
        check_products(uses(layout, mistake), layout)


@pytest.fixture(scope="module")
def fp8_courses(course_corpus: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Courses:
    """In `fp8_blockwise`, two micro-batches a step; nothing is clipped, since the norm is a sum in another order."""
    recipe = course_recipe("fp8_blockwise", course_corpus)
    recipe.precision = PRECISION
    recipe.optimizer.clip_grad = 1e6
    stage = recipe.stages["pretrain"]
    stage.global_batch_size = 2 * stage.micro_batch_size
    stage.tokens //= 2
    return Courses(recipe, start, tmp_path_factory.mktemp("fp8"))


UNDIVIDED = {
    "PP2": Layout(2, ParallelConfig(pipeline=2, pipeline_layers=[2, 7])),
    # Two micro-batches have one sum, whichever rank computes which.
    "DP2": Layout(2, ParallelConfig(bucket_size=300)),
}


@pytest.mark.parametrize("name", UNDIVIDED)
def test_training_is_one_ranks_bit_for_bit(name: str, fp8_courses: Courses, tmp_path: Path) -> None:
    expected = fp8_courses.of("one rank").steps
    found = fp8_courses.take(UNDIVIDED[name], tmp_path, end=SAVED)
    for differences in (found.gradients, found.weights, found.moments):
        assert differences == dict.fromkeys(differences, 0.0)
    # The report adds micro-batches in FP32 on one rank and in FP64 over ranks; the norm, squares in another order.
    assert close(found.steps.losses, expected.losses)
    assert close(found.steps.grad_norms, expected.grad_norms)


def test_a_run_continues_bit_for_bit(fp8_courses: Courses, tmp_path: Path) -> None:
    whole = fp8_courses.of("one rank").steps
    source = fp8_courses.directory / "one rank"
    assert fp8_courses.resume(LAYOUTS["one rank"], source, tmp_path, SAVED, END).losses == whole.losses[SAVED:]
    (last,) = layouts.differences([(source / str(END), tmp_path / str(END))])
    assert last == dict.fromkeys(last, 0.0)
