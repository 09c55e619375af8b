"""What FP8 asks of a recipe: BF16 linears in whole layers, and dimensions that Transformer Engine's products take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from nano_pretrain.recipe.derived import mamba_shape, stage_layout
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.pattern import LayerType, parse_pattern
from nano_pretrain.recipe.schema import ModelConfig, ParallelConfig, PrecisionConfig, Recipe, StageConfig

MULTIPLE = 16
"""FP8 matrix products want their dimensions on a rank in multiples of this: 16 bytes are cuBLASLt's alignment."""

TILE = 128
"""Under sequence parallelism Transformer Engine gathers inputs that are quantised before, where tiles are whole only:
`is_quantizable` of its Float8BlockQuantizer, which `assert_dim_for_all_gather` asks (2.9, 2.10 and 2.11)."""

LINEARS_PER_LAYER = 2


def bf16_linears(recipe: Recipe) -> None:
    """FP8 is for some layers, and those that stay BF16 at its ends are whole; without FP8 there are no such ends."""
    precision = recipe.precision
    ends = {"first": precision.bf16_first_linears, "last": precision.bf16_last_linears}
    if precision.name.startswith("fp8"):
        linears = LINEARS_PER_LAYER * len(recipe.model.pattern)
        _some_in_fp8(precision, ends, linears)
        _whole_layers(ends, linears)
        return
    for end, count in ends.items():
        if count:
            problem = f"{count} linears are kept out of FP8, and precision is {precision.name}"
            fix = f"write {without_fp8(precision, precision.name)}, or precision.name=fp8_blockwise"
            raise RecipeError(f"precision.bf16_{end}_linears", problem, fix)


def _some_in_fp8(precision: PrecisionConfig, ends: dict[str, int], linears: int) -> None:
    """Refuse ends that leave nothing between them: such a run would be BF16 under the name of FP8."""
    if sum(ends.values()) < linears:
        return
    end, other = sorted(ends, key=lambda name: -ends[name])
    field = f"precision.bf16_{end}_linears"
    most = _most(linears - ends[other])
    smaller = f"{field}={most} or less" if most >= 0 else f"{field}=0 precision.bf16_{other}_linears=0"
    counts = f"{ends[end]} and the {other} {ends[other]} leave" if ends[other] else f"{ends[end]} leaves"
    problem = f"{counts} none of the {linears} linears of the model in FP8"
    raise RecipeError(field, problem, f"write {smaller}, or {without_fp8(precision)}")


def _whole_layers(ends: dict[str, int], linears: int) -> None:
    """Transformer Engine's FP8 context is entered by layer, and a layer has two linears."""
    for end, count in ends.items():
        if count % LINEARS_PER_LAYER:
            problem = f"{count} ends inside a layer, which has {LINEARS_PER_LAYER} linears"
            most = _most(linears + count - sum(ends.values()))
            near = " or ".join(str(other) for other in (count - 1, count + 1) if other <= most)
            raise RecipeError(f"precision.bf16_{end}_linears", problem, f"write {near}")


def _most(room: int) -> int:
    """Linears that an end with room for so many may have: whole layers, one fewer than fit; below 0 if none fits."""
    return room - room % LINEARS_PER_LAYER - LINEARS_PER_LAYER


def without_fp8(precision: PrecisionConfig | None = None, name: str = "bf16") -> str:
    """The fields that make it a precision without FP8, as a fix names them: a written recipe has no groups to choose.

    Args:
        precision: as it is; None where it is not known, so that ends are named even if they are 0.
        name: of the other one.
    """
    ends = ("bf16_first_linears", "bf16_last_linears")
    zeros = [f"precision.{end}=0" for end in ends if precision is None or getattr(precision, end)]
    return " ".join([f"precision.name={name}", *zeros])


def fp8_layers(pattern: str, precision: PrecisionConfig) -> range:
    """Indices of the layers whose linears are quantised, wherever the pipeline is cut."""
    if not precision.name.startswith("fp8"):
        return range(0)
    first, last = precision.bf16_first_linears, precision.bf16_last_linears
    return range(first // LINEARS_PER_LAYER, len(pattern) - last // LINEARS_PER_LAYER)


@dataclass(frozen=True)
class Misfit:
    """A dimension in a stage that FP8 cannot take.

    Attributes:
        what: the dimension.
        problem: what is wrong with it.
        field: dotted name of the field that it follows from.
        value: of that field.
        step: of the field's values, those between break a rule; what divides them on a rank or in a layer.
        by_tensor: whether fewer tensor-parallel ranks can mend it.
    """

    what: str
    problem: str
    field: str
    value: int
    step: int
    by_tensor: bool = False


def fp8_misfits(recipe: Recipe, stage_name: str) -> Iterator[Misfit]:
    """What FP8 cannot take in a stage: both dimensions of each quantised weight on a rank, and the tokens there."""
    if not recipe.precision.name.startswith("fp8"):
        return
    model, stage = recipe.model, recipe.stages[stage_name]
    layout, kinds = stage_layout(recipe, stage), _fp8_kinds(recipe)
    yield from _hidden_misfit(recipe.precision, model, layout)
    yield from _split_misfits(model, layout, kinds)
    yield from _token_misfit(recipe.precision, f"stages.{stage_name}", stage, layout)
    if LayerType.MAMBA in parse_pattern(model.pattern) and LayerType.MAMBA not in kinds:
        yield from _bf16_mamba_misfit(model, layout)


def token_multiple(precision: PrecisionConfig, layout: ParallelConfig) -> int:
    """What divides the tokens of a rank, and the hidden size, in an FP8 precision."""
    return TILE if precision.name == "fp8_blockwise" and layout.sequence else MULTIPLE


def _fp8_kinds(recipe: Recipe) -> frozenset[LayerType]:
    """Types of the layers that are quantised."""
    layers = parse_pattern(recipe.model.pattern)
    return frozenset(layers[index] for index in fp8_layers(recipe.model.pattern, recipe.precision))


def _hidden_misfit(precision: PrecisionConfig, model: ModelConfig, layout: ParallelConfig) -> Iterator[Misfit]:
    multiple = token_multiple(precision, layout)
    if model.hidden_size % multiple:
        problem = f"{model.hidden_size} is no {_needed(multiple)}"
        yield Misfit("hidden size", problem, "model.hidden_size", model.hidden_size, multiple)


def _split_misfits(model: ModelConfig, layout: ParallelConfig, kinds: frozenset[LayerType]) -> Iterator[Misfit]:
    """Dimensions of weights that tensor parallelism divides."""
    for what, (name, width, step) in _split_widths(model, layout, kinds).items():
        if width % (layout.tensor * MULTIPLE):
            on_each = f" over {layout.tensor} tensor-parallel ranks are {width / layout.tensor:g} on each,"
            problem = f"{width} {what}{on_each if layout.tensor > 1 else ' are'} no {_needed(MULTIPLE)}"
            yield Misfit(what, problem, f"model.{name}", getattr(model, name), step, by_tensor=True)


def _split_widths(
    model: ModelConfig, layout: ParallelConfig, kinds: frozenset[LayerType]
) -> dict[str, tuple[str, int, int]]:
    """Name of a dimension -> the model's field it follows from, its size, and the step of that field's values."""
    mamba, heads = mamba_shape(model), model.num_attention_heads + 2 * model.num_query_groups
    mamba_heads = ("mamba_num_heads", _step_of_heads(model, layout))
    of_kind = {
        LayerType.MAMBA: {
            "rows of a Mamba-2 input projection": (*mamba_heads, mamba.projected),
            "channels of a Mamba-2 layer": (*mamba_heads, mamba.inner),
        },
        LayerType.FEED_FORWARD: {
            "channels of a feed-forward layer": ("ffn_hidden_size", layout.tensor * MULTIPLE, model.ffn_hidden_size)
        },
        LayerType.ATTENTION: {
            "rows of an attention layer's input projection": ("head_dim", 1, heads * model.head_dim),
            "query channels of an attention layer": ("head_dim", 1, model.num_attention_heads * model.head_dim),
        },
    }
    return {
        what: (field, width, step)
        for kind in LayerType
        if kind in kinds
        for what, (field, step, width) in of_kind[kind].items()
    }


def _token_misfit(
    precision: PrecisionConfig, field: str, stage: StageConfig, layout: ParallelConfig
) -> Iterator[Misfit]:
    ranks, multiple = layout.context * (layout.tensor if layout.sequence else 1), token_multiple(precision, layout)
    tokens = stage.micro_batch_size * stage.sequence_length
    if tokens % (ranks * multiple):
        problem = (
            f"micro-batches of {stage.micro_batch_size} x {stage.sequence_length} leave {tokens / ranks:g} tokens on a "
            f"rank, no {_needed(multiple)}"
        )
        step = ranks * multiple // math.gcd(ranks * multiple, stage.micro_batch_size)
        yield Misfit("tokens", problem, f"{field}.sequence_length", stage.sequence_length, step)


def _bf16_mamba_misfit(model: ModelConfig, layout: ParallelConfig) -> Iterator[Misfit]:
    """megatron-core 0.16's mixer asserts this of the whole projection, of layers in BF16 too (ssm/mamba_mixer.py)."""
    rows = mamba_shape(model).projected
    if rows % MULTIPLE:
        what = "rows of a Mamba-2 input projection"
        problem = f"{rows} {what} are no {_needed(MULTIPLE)} of layers in BF16 too"
        heads = model.mamba_num_heads
        yield Misfit(what, problem, "model.mamba_num_heads", heads, _step_of_heads(model, layout))


def _step_of_heads(model: ModelConfig, layout: ParallelConfig) -> int:
    """Mamba heads are a multiple of their groups, and of the ranks that share them."""
    return math.lcm(model.mamba_num_groups, layout.tensor * layout.context)


def _needed(multiple: int) -> str:
    if multiple == TILE:
        return f"multiple of {TILE}, which fp8_blockwise needs under sequence parallelism"
    return f"multiple of {multiple}, which FP8 needs"
