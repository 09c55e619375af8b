"""What a rank holds equals what the trainer builds for it: for every recipe, on ranks that hold no numbers."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from nano_pretrain.compose import compose
from nano_pretrain.plan.buffers import ParameterBuffer, bucket_size, optimizer_state, parameter_buffers, storage_of
from nano_pretrain.plan.params import count_parameters
from nano_pretrain.plan.ranks import Part, pipeline_parts, rank_parameters, rank_tensors
from nano_pretrain.recipe.derived import padded_vocab_size
from nano_pretrain.recipe.load import tree
from nano_pretrain.recipe.schema import ModelConfig, ParallelConfig, PrecisionConfig, Recipe
from tests.model.recipes import small_recipe
from tests.plan.fake_ranks import LENGTH, Place, fake_rank, meta_model, trainer_bytes

NAMES = sorted(path.stem for path in (tree("recipes") / "recipe").glob("*.yaml"))

LAYOUTS = {
    "one rank": (ParallelConfig(), 1),
    "DP3": (ParallelConfig(), 3),
    "TP2 x DP2": (ParallelConfig(tensor=2), 2),
    "TP4 with SP": (ParallelConfig(tensor=4, sequence=True), 1),
    "TP8 with SP x DP5": (ParallelConfig(tensor=8, sequence=True), 5),
    "PP2": (ParallelConfig(pipeline=2), 1),
    "PP2 x DP7": (ParallelConfig(pipeline=2), 7),
    "TP2 x PP2": (ParallelConfig(tensor=2, pipeline=2), 1),
    "TP4 x PP2 with SP x DP2": (ParallelConfig(tensor=4, pipeline=2, sequence=True), 2),
    "TP8 x PP2 x DP3": (ParallelConfig(tensor=8, pipeline=2), 3),
    "CP2 x DP3": (ParallelConfig(context=2), 3),
    "TP2 x CP2 with SP x PP2": (ParallelConfig(tensor=2, context=2, sequence=True, pipeline=2), 1),
    "PP4": (ParallelConfig(pipeline=4), 1),
    "DP3, small buckets": (ParallelConfig(bucket_size=3_000_000), 3),
    "PP2 x DP3 without overlap": (ParallelConfig(pipeline=2, overlap=False), 3),
    "PP7": (ParallelConfig(pipeline=7), 1),
    "PP13 x TP2": (ParallelConfig(pipeline=13, tensor=2), 1),
}
FULL_SIZE = [name for name in NAMES if name not in ("tiny", "nano_12b_v2_thin")]


@functools.cache
def recipe_named(name: str) -> Recipe:
    """In BF16, in which what is FP8 on a GPU is built here."""
    return replace(compose([f"recipe={name}"]).recipe, precision=PrecisionConfig())


def fits(model: ModelConfig, layout: ParallelConfig) -> bool:
    groups = (model.mamba_num_groups, model.num_query_groups)
    return layout.pipeline <= len(model.pattern) and all(count % layout.tensor == 0 for count in groups)


def chosen(names: list[str], layouts: list[str]) -> list[tuple[str, str]]:
    return [
        (name, layout) for name in names for layout in layouts if fits(recipe_named(name).model, LAYOUTS[layout][0])
    ]


QUICK = [
    *chosen(["nano_12b_v2"], ["one rank", "TP8 with SP x DP5", "PP2 x DP7", "TP2 x CP2 with SP x PP2"]),
    *chosen([name for name in FULL_SIZE if name != "nano_12b_v2"], ["TP4 x PP2 with SP x DP2"]),
    *chosen(["tiny", "nano_12b_v2_thin"], ["TP2 x DP2"]),
]
# The rest takes a minute together.
ALL = chosen(NAMES, list(LAYOUTS))
SLOW = [case for case in ALL if case not in QUICK]


def check_parameters(recipe: Recipe, config: ParallelConfig, data_parallel: int) -> None:
    for part in pipeline_parts(recipe.model, config, LENGTH):
        place = Place(config, data_parallel, part.position)
        with fake_rank(place) as platform:
            built = list(meta_model(recipe, place, platform).named_parameters())
        wanted = rank_tensors(recipe.model, config, part)
        assert [tuple(parameter.shape) for _, parameter in built] == [tensor.shape for tensor in wanted]
        for (path, parameter), tensor in zip(built, wanted, strict=True):
            assert path.endswith(tensor.name)
            assert (parameter.dtype == torch.float32) == tensor.kept_fp32
        total = sum(parameter.numel() for _, parameter in built)
        assert rank_parameters(recipe.model, config, part).total == total


def check_bytes(recipe: Recipe, config: ParallelConfig, data_parallel: int) -> None:
    for part in pipeline_parts(recipe.model, config, LENGTH):
        buffers = buffers_of(recipe, config, data_parallel, part)
        owned = [
            sum(sizes) for sizes in zip(*([o * b.optimizer_bytes for o in b.owned()] for b in buffers), strict=True)
        ]
        assert optimizer_state(buffers) == max(owned)
        for replica in {0, data_parallel * config.context - 1}:
            found = trainer_bytes(recipe, Place(config, data_parallel, part.position, replica))
            assert found.weights == sum(buffer.elements * buffer.storage for buffer in buffers)
            assert found.gradients == sum(buffer.gradient_bytes for buffer in buffers)
            assert found.optimizer == owned[replica]


def buffers_of(recipe: Recipe, config: ParallelConfig, data_parallel: int, part: Part) -> tuple[ParameterBuffer, ...]:
    tensors = rank_tensors(recipe.model, config, part)
    storages = [storage_of(tensor, recipe.model, recipe.precision, fp8=False) for tensor in tensors]
    elements = bucket_size(config, data_parallel, part.position)
    return parameter_buffers(tensors, storages, config.distributed_optimizer, data_parallel * config.context, elements)


def test_there_are_enough_layouts() -> None:
    assert all(sum(name == case for case, _ in ALL) >= 10 for name in FULL_SIZE)


@pytest.mark.parametrize(("name", "layout"), QUICK)
def test_each_parameter_of_each_rank_is_the_built_one(name: str, layout: str) -> None:
    check_parameters(recipe_named(name), *LAYOUTS[layout])


@pytest.mark.parametrize(("name", "layout"), QUICK)
def test_bytes_of_each_rank_are_the_trainers(name: str, layout: str) -> None:
    check_bytes(recipe_named(name), *LAYOUTS[layout])


@pytest.mark.full
@pytest.mark.parametrize(("name", "layout"), SLOW)
def test_every_layout_of_every_recipe(name: str, layout: str) -> None:
    check_parameters(recipe_named(name), *LAYOUTS[layout])
    check_bytes(recipe_named(name), *LAYOUTS[layout])


@pytest.mark.parametrize("name", NAMES)
def test_the_built_model_has_the_counted_parameters(name: str) -> None:
    recipe = recipe_named(name)
    with fake_rank(Place(ParallelConfig(), 1)) as platform:
        model = meta_model(recipe, Place(ParallelConfig(), 1), platform)
    padding = padded_vocab_size(recipe.model) - recipe.model.vocab_size
    built = sum(parameter.numel() for parameter in model.parameters())
    assert built - 2 * padding * recipe.model.hidden_size == count_parameters(recipe.model).total


@pytest.mark.parametrize(("precision", "sharded"), [("fp32", True), ("fp32", False), ("bf16", False)])
@pytest.mark.parametrize("data_parallel", [1, 3])
def test_bytes_in_fp32_and_without_the_distributed_optimizer(precision: str, sharded: bool, data_parallel: int) -> None:
    # Widths that are no multiples of the alignments, so that there is padding everywhere.
    check_bytes(small_recipe(precision), ParallelConfig(distributed_optimizer=sharded), data_parallel)


@pytest.mark.parametrize("name", NAMES)
def test_the_ranks_together_hold_the_model(name: str) -> None:
    # Norms of the residual stream are on every tensor-parallel rank, all else on one.
    model = recipe_named(name).model
    layout = ParallelConfig(tensor=2, pipeline=len(model.pattern))
    tensors = [tensor for part in pipeline_parts(model, layout, LENGTH) for tensor in rank_tensors(model, layout, part)]
    norms = sum(
        tensor.elements for tensor in tensors if tensor.name.endswith("norm.weight") and "mixer" not in tensor.name
    )
    padding = 2 * (padded_vocab_size(model) - model.vocab_size) * model.hidden_size
    assert 2 * sum(tensor.elements for tensor in tensors) - norms - padding == count_parameters(model).total
