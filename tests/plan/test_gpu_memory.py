"""Memory on a GPU, which is not measured: what FP8, recomputation and the schedule change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nano_pretrain.compose import compose
from nano_pretrain.plan.buffers import Storage, fp8_copy, layer_is_fp8, storage_of
from nano_pretrain.plan.memory import RankMemory, stage_memory
from nano_pretrain.plan.ranks import ParameterTensor, rank_tensors, whole_model
from nano_pretrain.recipe.load import tree
from nano_pretrain.recipe.schema import ParallelConfig, PrecisionConfig, Recipe, RecomputeConfig

NAMES = sorted(path.stem for path in (tree("recipes") / "recipe").glob("*.yaml"))
BLOCKWISE = PrecisionConfig(name="fp8_blockwise", bf16_first_linears=4, bf16_last_linears=4)


def recipe_named(name: str) -> Recipe:
    return compose([f"recipe={name}"]).recipe


def first_stage(recipe: Recipe) -> list[RankMemory]:
    return stage_memory(recipe, next(iter(recipe.stages)), "cuda")


@pytest.mark.parametrize(("first", "last", "layers"), [(4, 4, range(2, 60)), (2, 6, range(1, 59)), (0, 0, range(62))])
def test_linears_at_the_ends_stay_bf16_by_whole_layers(first: int, last: int, layers: range) -> None:
    model = recipe_named("nano_12b_v2").model
    precision = PrecisionConfig(name="fp8_blockwise", bf16_first_linears=first, bf16_last_linears=last)
    assert [layer for layer in range(62) if layer_is_fp8(layer, model, precision)] == list(layers)
    assert not any(layer_is_fp8(layer, model, PrecisionConfig(name="bf16")) for layer in range(62))


def test_what_fp8_quantises() -> None:
    # Embedding, head, convolution and norms are not; A_log, D and dt_bias are FP32.
    model, layout = recipe_named("nano_12b_v2").model, ParallelConfig(tensor=8)
    names: dict[Storage, set[str]] = {storage: set() for storage in Storage}
    for tensor in rank_tensors(model, layout, whole_model(model)):
        if tensor.layer not in (0, 1, 60, 61):
            names[storage_of(tensor, model, BLOCKWISE, fp8=True)].add(tensor.name)
    assert names[Storage.FP8] == {
        "mixer.in_proj.weight",
        "mixer.out_proj.weight",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    }
    assert names[Storage.FP32] == {"mixer.A_log", "mixer.D", "mixer.dt_bias"}


def test_the_second_copy_of_a_weight_and_its_scales() -> None:
    weight = ParameterTensor("weight", (200, 300), "mamba", layer=0)
    # 2 x 3 blocks, whose rows are padded to 4; column-wise 3 x 2.
    assert fp8_copy(weight, BLOCKWISE) == 200 * 300 + 4 * (2 * 4 + 3 * 4)
    assert fp8_copy(weight, PrecisionConfig(name="fp8_current_scaling")) == 200 * 300 + 4


def test_fp8_halves_what_it_quantises() -> None:
    recipe = recipe_named("nano_12b_v2")
    (fp8,), (bf16,) = (first_stage(replace(recipe, precision=p)) for p in (BLOCKWISE, PrecisionConfig(name="bf16")))
    assert fp8.logits == bf16.logits
    assert fp8.gradients == pytest.approx(bf16.gradients, rel=1e-5)  # two buffers pad other buckets
    saved = bf16.weights - fp8.weights
    # A byte of each quantised weight went from the parameter to the second copy, but for padding of the two buffers.
    assert fp8.fp8_copies == pytest.approx(saved, rel=1e-3)
    assert fp8.fp8_copies > saved
    assert fp8.activations.total < 0.85 * bf16.activations.total
    assert bf16.fp8_copies == 0


@pytest.mark.parametrize("name", NAMES)
def test_recomputation_saves_memory_in_every_recipe(name: str) -> None:
    recipe = recipe_named(name)
    none, selective, full = (
        first_stage(replace(recipe, recompute=RecomputeConfig(granularity=g))) for g in ("none", "selective", "full")
    )
    for most, less, least in zip(none, selective, full, strict=True):
        assert least.total < less.total < most.total
        assert least.static == less.static == most.static


def test_the_schedule_holds_a_micro_batch_for_each_position_from_there_on() -> None:
    recipe = recipe_named("nano_12b_v2")
    stage = replace(recipe.stages["pretrain"], parallel=ParallelConfig(tensor=8, pipeline=31), gpus=248)
    long, short = (
        first_stage(replace(recipe, stages={"stage": replace(stage, global_batch_size=batch)})) for batch in (736, 3)
    )
    assert [rank.in_flight for rank in long] == list(range(31, 0, -1))
    assert [rank.in_flight for rank in short] == [3] * 29 + [2, 1]
    assert long[0].activations.total > 9 * short[0].activations.total
