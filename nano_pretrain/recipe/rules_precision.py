"""Rules of the FP8 recipes: which linears are quantised, and what Transformer Engine's FP8 products can take."""

from __future__ import annotations

from nano_pretrain.recipe.derived import mamba_shape, stage_layout
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.pattern import LayerType, parse_pattern
from nano_pretrain.recipe.schema import ModelConfig, ParallelConfig, Recipe, StageConfig

MULTIPLE = 16
"""FP8 matrix products want their dimensions on a rank in multiples of this: 16 bytes are cuBLASLt's alignment."""

LINEARS_PER_LAYER = 2


def bf16_linears(recipe: Recipe) -> None:
    """Linears are kept in BF16 only where others are FP8, no more than there are, and by whole layers."""
    precision, linears = recipe.precision, LINEARS_PER_LAYER * len(recipe.model.pattern)
    for name in ("bf16_first_linears", "bf16_last_linears"):
        count, field = getattr(precision, name), f"precision.{name}"
        if count and not precision.name.startswith("fp8"):
            fix = f"write {field}=0, or precision=fp8_blockwise"
            raise RecipeError(field, f"{count} linears are kept out of FP8, and precision is {precision.name}", fix)
        if count > linears:
            fix = f"write at most {linears}, or precision=bf16"
            raise RecipeError(field, f"{count} is more than the {linears} linears of the model", fix)
        if count % LINEARS_PER_LAYER:
            # Transformer Engine's FP8 context is entered by layer, and a layer has two linears.
            fix = f"write {count - 1} or {count + 1}"
            raise RecipeError(field, f"{count} ends inside a layer, which has {LINEARS_PER_LAYER} linears", fix)
    if precision.bf16_first_linears + precision.bf16_last_linears > linears:
        raise RecipeError(
            "precision.bf16_last_linears",
            f"{precision.bf16_last_linears} and the first {precision.bf16_first_linears} are more than the {linears} "
            "linears of the model",
            f"write at most {linears - precision.bf16_first_linears}, or precision=bf16",
        )


def fp8_multiples(recipe: Recipe) -> None:
    """Every dimension of an FP8 product is a multiple of 16 on a rank: both of its weight, and its tokens."""
    if not recipe.precision.name.startswith("fp8") or recipe.plan.search:
        return
    kinds = _fp8_kinds(recipe)
    for name, stage in recipe.stages.items():
        layout = stage_layout(recipe, stage)
        if kinds:
            _check_weights(f"stages.{name}.parallel" if stage.parallel else "parallel", recipe.model, layout, kinds)
            _check_tokens(f"stages.{name}", stage, layout)


def _fp8_kinds(recipe: Recipe) -> frozenset[LayerType]:
    """Types of the layers that are quantised."""
    layers = parse_pattern(recipe.model.pattern)
    first = recipe.precision.bf16_first_linears // LINEARS_PER_LAYER
    last = recipe.precision.bf16_last_linears // LINEARS_PER_LAYER
    return frozenset(layers[first : len(layers) - last])


def _check_weights(prefix: str, model: ModelConfig, layout: ParallelConfig, kinds: frozenset[LayerType]) -> None:
    if model.hidden_size % MULTIPLE:
        raise RecipeError(
            "model.hidden_size",
            f"{model.hidden_size} is no multiple of {MULTIPLE}, which FP8 needs",
            f"write {_nearest(model.hidden_size)}, or precision=bf16",
        )
    for what, (field, width) in _split_widths(model, kinds).items():
        if width % (layout.tensor * MULTIPLE) == 0:
            continue
        fits = [size for size in (4, 2, 1) if size < layout.tensor and width % (size * MULTIPLE) == 0]
        raise RecipeError(
            f"{prefix}.tensor" if fits else field,
            f"{width} {what} over {layout.tensor} tensor-parallel ranks are {width / layout.tensor:g} on each, no "
            f"multiple of {MULTIPLE}, which FP8 needs",
            f"write {f'{prefix}.tensor={fits[0]}' if fits else f'another {field}'}, or precision=bf16",
        )


def _split_widths(model: ModelConfig, kinds: frozenset[LayerType]) -> dict[str, tuple[str, int]]:
    """Dimensions of weights that tensor parallelism divides: what they are -> the field they follow from, size."""
    mamba = mamba_shape(model)
    heads = model.num_attention_heads + 2 * model.num_query_groups
    of_kind = {
        LayerType.MAMBA: {
            "rows of a Mamba-2 input projection": ("model.mamba_num_heads", mamba.projected),
            "channels of a Mamba-2 layer": ("model.mamba_num_heads", mamba.inner),
        },
        LayerType.FEED_FORWARD: {"channels of a feed-forward layer": ("model.ffn_hidden_size", model.ffn_hidden_size)},
        LayerType.ATTENTION: {
            "rows of an attention layer's input projection": ("model.head_dim", heads * model.head_dim),
            "query channels of an attention layer": ("model.head_dim", model.num_attention_heads * model.head_dim),
        },
    }
    return {what: width for kind in LayerType if kind in kinds for what, width in of_kind[kind].items()}


def _check_tokens(field: str, stage: StageConfig, layout: ParallelConfig) -> None:
    ranks = layout.context * (layout.tensor if layout.sequence else 1)
    tokens = stage.micro_batch_size * stage.sequence_length
    if tokens % (ranks * MULTIPLE):
        raise RecipeError(
            f"{field}.sequence_length",
            f"micro-batches of {stage.micro_batch_size} x {stage.sequence_length} leave {tokens / ranks:g} tokens on a "
            f"rank, no multiple of {MULTIPLE}, which FP8 needs",
            f"write a multiple of {ranks * MULTIPLE}, or precision=bf16",
        )


def _nearest(value: int) -> str:
    lower = value - value % MULTIPLE
    return f"{lower} or {lower + MULTIPLE}" if lower else f"{MULTIPLE}"
