"""Rules of a layout against the model: tensor, context and pipeline parallelism divide what they split.

The model is taken as it is: a refusal names the layout's field and the values that pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from nano_pretrain.recipe.derived import VOCAB_MULTIPLE, stage_layout
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.pattern import count_layers
from nano_pretrain.recipe.rules_precision import fp8_misfits
from nano_pretrain.recipe.schema import ModelConfig, ParallelConfig, Recipe, StageConfig


def layout_field(stage_name: str, stage: StageConfig) -> str:
    """Dotted name of a stage's layout: its own, or the recipe's."""
    return f"stages.{stage_name}.parallel" if stage.parallel else "parallel"


def ranks_field(stage_name: str, stage: StageConfig) -> str:
    """Dotted name of a stage's number of ranks: its own, or the cluster's."""
    return "cluster.gpus" if stage.gpus is None else f"stages.{stage_name}.gpus"


def sequence_shards(layout: ParallelConfig) -> dict[str, int]:
    """Factors of the number of equal pieces that a sequence must divide into, by name.

    Each context-parallel rank has two (`get_batch_on_this_cp_rank` of megatron-core 0.16), and sequence parallelism
    divides those by the tensor-parallel ranks (the factors of `get_padding` in its models/multimodal).
    """
    shards = {"tensor": layout.tensor} if layout.sequence else {}
    return shards | ({"2 x context": 2 * layout.context} if layout.context > 1 else {})


def divisors(number: int) -> list[int]:
    """All of them, smallest first."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def check_split(recipe: Recipe, stage_name: str) -> None:
    """The layout of a stage divides the model.

    Raises:
        RecipeError: the first of its fields that does not.
    """
    _check_tensor(recipe, stage_name)
    _check_sequence(recipe, stage_name)
    if count_layers(recipe.model.pattern).mamba:
        _check_context(recipe, stage_name)
    _check_pipeline(recipe, stage_name)


def _check_tensor(recipe: Recipe, stage_name: str) -> None:
    layout = stage_layout(recipe, recipe.stages[stage_name])
    for what, size in _divided_by_tensor(recipe.model).items():
        if size % layout.tensor:
            layouts = {ranks: replace(layout, tensor=ranks) for ranks in _tensor_sizes(recipe.model, layout)}
            problem = f"{layout.tensor} does not divide {what} = {size}"
            raise _refusal(recipe, stage_name, "tensor", problem, _taken(recipe, stage_name, layouts))


def _divided_by_tensor(model: ModelConfig) -> dict[str, int]:
    """What tensor parallelism divides: its name, its size. Mamba heads are a multiple of their groups."""
    counts = count_layers(model.pattern)
    divided = {}
    if counts.attention:
        divided["model.num_attention_heads"] = model.num_attention_heads
        divided["model.num_query_groups"] = model.num_query_groups
    if counts.mamba:
        divided["model.mamba_num_groups"] = model.mamba_num_groups
    if counts.feed_forward:
        divided["model.ffn_hidden_size"] = model.ffn_hidden_size
    return divided | {"the padding of the vocabulary": VOCAB_MULTIPLE}


def _tensor_sizes(model: ModelConfig, layout: ParallelConfig) -> list[int]:
    """Numbers of tensor-parallel ranks that divide the model; 1 not under sequence parallelism, if there are others."""
    sizes = divisors(math.gcd(*_divided_by_tensor(model).values()))
    return (sizes[1:] if layout.sequence else sizes) or sizes


def _check_sequence(recipe: Recipe, stage_name: str) -> None:
    stage = recipe.stages[stage_name]
    layout, prefix = stage_layout(recipe, stage), layout_field(stage_name, stage)
    if layout.sequence and layout.tensor == 1:
        sizes = [size for size in _tensor_sizes(recipe.model, layout) if size > 1]
        taken = (size for size in sizes if _all_take(recipe, stage_name, replace(layout, tensor=size)))
        smallest = next(taken, None)
        more = f" or {prefix}.tensor={smallest}" if smallest else ""
        problem = "sequence parallelism needs tensor parallelism"
        raise RecipeError(f"{prefix}.sequence", problem, f"write {prefix}.sequence=false{more}")


def _check_context(recipe: Recipe, stage_name: str) -> None:
    """Each context-parallel rank has whole Mamba heads, and whole groups or a share of one."""
    model, layout = recipe.model, stage_layout(recipe, recipe.stages[stage_name])
    heads, groups = model.mamba_num_heads // layout.tensor, model.mamba_num_groups // layout.tensor
    if heads % layout.context:
        ranks = layout.tensor * layout.context
        problem = f"tensor x context = {ranks} does not divide model.mamba_num_heads = {model.mamba_num_heads}"
    elif not _splits_groups(groups, layout.context):
        problem = (
            f"{layout.context} neither divides nor is a multiple of a tensor-parallel rank's {groups} Mamba groups"
        )
    else:
        return
    sizes = [size for size in divisors(heads) if _splits_groups(groups, size)]
    layouts = {size: replace(layout, context=size) for size in sizes}
    raise _refusal(recipe, stage_name, "context", problem, _taken(recipe, stage_name, layouts))


def _splits_groups(groups: int, context: int) -> bool:
    return groups % context == 0 or context % groups == 0


def _check_pipeline(recipe: Recipe, stage_name: str) -> None:
    """Each position has a layer, and a written split holds every layer once."""
    stage = recipe.stages[stage_name]
    layout, prefix, layers = stage_layout(recipe, stage), layout_field(stage_name, stage), len(recipe.model.pattern)
    if layout.pipeline > layers:
        problem = f"{layout.pipeline} is more than the {layers} layers of model.pattern"
        raise RecipeError(f"{prefix}.pipeline", problem, f"write {layers} or less")
    sizes = layout.pipeline_layers
    if sizes is not None and (len(sizes) != layout.pipeline or sum(sizes) != layers or min(sizes) < 1):
        problem = f"{list(sizes)} does not divide {layers} layers among {layout.pipeline} pipeline stages"
        fix = f"write {layout.pipeline} numbers above 0 whose sum is {layers}, or null"
        raise RecipeError(f"{prefix}.pipeline_layers", problem, fix)


def _refusal(recipe: Recipe, stage_name: str, field: str, problem: str, sizes: Iterable[int]) -> RecipeError:
    """Name a field of the layout, and the values that pass."""
    *most, last = map(str, sizes)
    fix = f"write {', '.join(most)} or {last}" if most else f"write {last}"
    return RecipeError(f"{layout_field(stage_name, recipe.stages[stage_name])}.{field}", problem, fix)


def _taken(recipe: Recipe, stage_name: str, layouts: dict[int, ParallelConfig]) -> Iterable[int]:
    """Those of the values, each with its layout, that the sequence and FP8 take as well."""
    for takes in (_sequence_takes, _fp8_takes):
        taken = {size: layout for size, layout in layouts.items() if takes(recipe, stage_name, layout)}
        # If none is taken, another field is at fault, which its own rule names.
        layouts = taken or layouts
    return layouts


def _all_take(recipe: Recipe, stage_name: str, layout: ParallelConfig) -> bool:
    return all(takes(recipe, stage_name, layout) for takes in (_sequence_takes, _fp8_takes))


def _sequence_takes(recipe: Recipe, stage_name: str, layout: ParallelConfig) -> bool:
    return recipe.stages[stage_name].sequence_length % math.prod(sequence_shards(layout).values()) == 0


def _fp8_takes(recipe: Recipe, stage_name: str, layout: ParallelConfig) -> bool:
    stage = replace(recipe.stages[stage_name], parallel=layout)
    return not any(fp8_misfits(replace(recipe, stages={stage_name: stage}), stage_name))
