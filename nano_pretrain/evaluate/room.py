"""Shapes of forward passes of other lengths than the trained one, and whether memory has room; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from nano_pretrain.plan import activations_cpu, activations_cuda, activations_plain
from nano_pretrain.plan.activations import Sizes
from nano_pretrain.plan.memory import stage_memory
from nano_pretrain.plan.params import count_parameters
from nano_pretrain.platform.base import Memory, PlatformName
from nano_pretrain.recipe.derived import parameter_dtype, stage_layout
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.pattern import parse_pattern
from nano_pretrain.recipe.rules_layout import sequence_shards
from nano_pretrain.recipe.rules_precision import token_multiple
from nano_pretrain.recipe.schema import ParallelConfig, Recipe, StageConfig


def forward_bytes(recipe: Recipe, layout: ParallelConfig, shape: tuple[int, int], platform: PlatformName) -> int:
    """Bytes of a rank's tensors in a forward pass that keeps nothing, beside what is there between passes.

    The largest of its parts: a layer, with all that it would keep for a backward pass, or the head with its logits.

    Args:
        recipe: widths, dtype and kernels.
        layout: of the ranks.
        shape: (tokens, rows) of the pass.
        platform: whose kernels run.
    """
    on_cpu = activations_plain if recipe.cluster.cpu_kernels == "plain" else activations_cpu
    kernels = activations_cuda if platform == "cuda" else on_cpu
    documents = recipe.data.document_boundaries == "reset"
    sizes = Sizes(recipe.model, layout, shape[1], shape[0], _element(recipe), documents=documents)
    head = kernels.head(sizes)
    layers = [kernels.LAYERS[kind](sizes) for kind in set(parse_pattern(recipe.model.pattern))]
    parts: list[int] = [head.kept + head.logits, *(layer.kept + layer.states for layer in layers)]
    return max(parts)


def holds_whole_model(recipe: Recipe, layout: ParallelConfig, platform: str) -> bool:
    """Whether a rank can generate by itself; a step of one token is no FP8 product of Transformer Engine's."""
    alone = layout.tensor == layout.pipeline == layout.context == 1
    return alone and not (platform == "cuda" and recipe.precision.name.startswith("fp8"))


def pass_shape(recipe: Recipe, length: int, layout: ParallelConfig, stage: StageConfig) -> tuple[int, int]:
    """(tokens, rows) of a forward pass: filled up to what layout and FP8 divide, about as many tokens as in training.

    Args:
        recipe: its precision.
        length: tokens of a row.
        layout: of the ranks.
        stage: the stage whose micro-batches are the measure.
    """
    multiple = math.prod(sequence_shards(layout).values())
    if recipe.precision.name.startswith("fp8"):
        ranks = layout.context * (layout.tensor if layout.sequence else 1)
        multiple = math.lcm(multiple, ranks * token_multiple(recipe.precision, layout))
    filled = -(-length // multiple) * multiple
    return filled, max(1, stage.micro_batch_size * stage.sequence_length // filled)


def without_room_for_weights(
    recipe: Recipe, layout: ParallelConfig, shapes: Iterable[tuple[int, int]], platform: PlatformName, memory: Memory
) -> Iterator[RecipeError]:
    """The shapes of forward passes that do not fit beside the weights of the whole model, each as the refusal of it."""
    held = count_parameters(recipe.model).total * _element(recipe)
    yield from _refusals(recipe, layout, held, shapes, platform, memory)


def without_room_at_stage_ends(recipe: Recipe, platform: PlatformName, memory: Memory) -> Iterator[RecipeError]:
    """The lengths that do not fit beside what a rank holds between two steps, stage by stage."""
    lengths = recipe.evaluate.lengths if recipe.evaluate.at_stage_end else []
    for name, stage in recipe.stages.items():
        layout = stage_layout(recipe, stage)
        shapes = [pass_shape(recipe, length, layout, stage) for length in lengths]
        held = max(rank.static for rank in stage_memory(recipe, name, platform=platform))
        yield from _refusals(recipe, layout, held, shapes, platform, memory)


def _refusals(
    recipe: Recipe,
    layout: ParallelConfig,
    held: int,
    shapes: Iterable[tuple[int, int]],
    platform: PlatformName,
    memory: Memory,
) -> Iterator[RecipeError]:
    share = memory.capacity / memory.ranks
    for length, rows in shapes:
        needed = held + forward_bytes(recipe, layout, (length, rows), platform)
        if needed > share:
            has = f"{memory.name} has {share / 1e9:.1f} GB for it"
            # All of a forward pass grows with its tokens.
            most = max(0, int(length * (share - held) / (needed - held)))
            fix = f"write at most {most}" if most else "leave it out"
            yield RecipeError("evaluate.lengths", f"{length} tokens need {needed / 1e9:.1f} GB on a rank, {has}", fix)


def _element(recipe: Recipe) -> int:
    """Bytes of a weight and of an activation."""
    return 4 if parameter_dtype(recipe.precision) == "float32" else 2
