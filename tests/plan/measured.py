"""Steps of small models on ranks of this machine, and the bytes of the tensors that live during them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nano_pretrain.parallel.groups import context_parallel_place
from nano_pretrain.platform import Platform
from nano_pretrain.recipe.derived import stage_ranks
from nano_pretrain.recipe.schema import ParallelConfig, Recipe
from tests.distributed.training import groups
from tests.model.recipes import small_recipe


@dataclass(frozen=True)
class Size:
    """A model and its micro-batches; heads, groups and states follow from the width, and `feed_forward` by default."""

    pattern: str
    width: int
    batch: int
    length: int
    vocabulary: int
    precision: str
    feed_forward: int | None = None


SIZES = {
    "20 narrow layers, 4 x 1,024": Size("M-M-M-*-M-" * 2, 64, 4, 1024, 1024, "bf16"),
    "12 layers, documents of 2,048": Size("M-M*-M-M*-M-", 128, 2, 2048, 2048, "bf16"),
    "6 wide layers, FP32": Size("M-M*-M", 256, 4, 1024, 1024, "fp32"),
    "62 thin layers": Size("M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-", 64, 2, 2048, 1024, "bf16"),
}


def recipe_of(
    size: Size, granularity: str, layout: ParallelConfig, ranks: int, kernels: str = "native", micro_batches: int = 2
) -> Recipe:
    """A recipe of this size: so many micro-batches a step on each data-parallel rank, documents reset."""
    width = size.width
    recipe = small_recipe(
        size.precision,
        pattern=size.pattern,
        hidden_size=width,
        ffn_hidden_size=size.feed_forward or 4 * width,
        num_attention_heads=8,
        num_query_groups=4,
        head_dim=width // 8,
        mamba_num_heads=8,
        mamba_head_dim=width // 4,
        mamba_num_groups=4,
        mamba_state_dim=width // 4,
        vocab_size=size.vocabulary,
        init_std=0.02,
    )
    replicas = ranks // (layout.tensor * layout.pipeline * layout.context)
    stage = replace(
        recipe.stages["pretrain"],
        sequence_length=size.length,
        micro_batch_size=size.batch,
        global_batch_size=micro_batches * size.batch * replicas,
        parallel=layout,
        gpus=ranks,
    )
    recipe.recompute.granularity = granularity
    recipe.cluster.cpu_kernels = kernels
    return replace(recipe, stages={"pretrain": stage})


@dataclass(frozen=True)
class Measured:
    """Bytes of a rank's tensors between two steps and at the peak of a step, and the step's loss."""

    between: int
    peak: int
    loss: float


def peaks(recipes: Mapping[str, Recipe], layout: ParallelConfig) -> dict[str, Measured]:
    """A step of each recipe, after the first has made the optimizer's state."""
    from megatron.core import parallel_state

    found = {}
    with groups(layout) as platform:
        for name, recipe in recipes.items():
            # Megatron-core's gather buffer would stay from one model to the next.
            parallel_state.destroy_global_memory_buffer()
            parallel_state._set_global_memory_buffer()
            found[name] = _measure(recipe, layout, platform)
    return found


def _measure(recipe: Recipe, layout: ParallelConfig, platform: Platform) -> Measured:
    from nano_pretrain.train.step import Trainable
    from tests.model.building import batch
    from tests.plan.allocations import LiveTensors

    stage = recipe.stages["pretrain"]
    shape = (stage.sequence_length, stage.micro_batch_size)
    replicas = stage_ranks(recipe, stage) // (layout.tensor * layout.pipeline * layout.context)
    count = stage.global_batch_size // (stage.micro_batch_size * replicas)
    place = context_parallel_place()
    batches = [batch(recipe, shape[1], shape[0], seed=seed).of_context(place) for seed in range(3 * count)]
    tensors = LiveTensors()
    with tensors:
        model = _model(recipe, layout, platform)
        trainable = Trainable(recipe, layout, platform, model)
        trainable.step(iter(batches[:count]), count, shape, lr=1e-3, stop=False)
        between, seen = tensors.count(), []
        # Gloo's threads may let go of a tensor late when the cores are busy: the smaller peak is the step's own.
        for batches_of_step in (batches[count : 2 * count], batches[2 * count :]):
            tensors.peak = 0
            loss = trainable.step(iter(batches_of_step), count, shape, lr=1e-3, stop=False).loss
            seen.append(tensors.peak)
    return Measured(between, min(seen), loss)


def _model(recipe: Recipe, layout: ParallelConfig, platform: Platform) -> Any:
    from nano_pretrain.kernels.native.library import choose_kernels
    from nano_pretrain.model.hybrid import build_model

    choose_kernels(recipe.cluster.cpu_kernels)
    return build_model(recipe, layout, platform, recipe.stages["pretrain"].sequence_length)
