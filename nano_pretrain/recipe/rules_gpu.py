"""Rules of what only GPUs do: overlap within tensor parallelism, and CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator

from nano_pretrain.recipe.derived import stage_layout
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.rules_layout import layout_field
from nano_pretrain.recipe.rules_precision import without_fp8
from nano_pretrain.recipe.schema import ParallelConfig, Recipe, StageConfig
from nano_pretrain.recipe.split import stage_build

GPU_OPTIONS = ("tensor_overlap", "cuda_graphs")
"""Fields of a layout that need GPUs."""


def refuse_on_cpu(recipe: Recipe, layout: ParallelConfig) -> None:
    """Refuse a layout that asks for what a CPU does not have.

    Raises:
        RecipeError: it does.
    """
    for option in GPU_OPTIONS:
        if getattr(layout, option):
            stages = recipe.stages.items()
            fields = [layout_field(name, stage) for name, stage in stages if stage_layout(recipe, stage) == layout]
            field = f"{(*fields, 'parallel')[0]}.{option}"
            raise RecipeError(field, "needs a GPU, and this is a CPU", f"write {field}=false")


def tensor_overlap(recipe: Recipe) -> None:
    """User buffers are for activations that are shared along the sequence, of one shape, and are summed as BF16.

    Transformer Engine 2.9 to 2.11 overlaps nothing without sequence parallelism (module/layernorm_linear.py), and its
    reduce-scatter adds 16-bit numbers (common/comm_gemm_overlap/userbuffers/userbuffers.cu). What it gathers in FP8 has
    one scale a tensor, or is MXFP8 (`fill_userbuffers_buffer_for_all_gather` in module/base.py).
    """
    for name, stage, field in _stages_with(recipe, "tensor_overlap"):
        layout, prefix = stage_layout(recipe, stage), layout_field(name, stage)
        if not layout.sequence:
            fix = f"write {prefix}.sequence=true with {prefix}.tensor above 1, or {field}=false"
            raise RecipeError(field, "needs sequence parallelism", fix)
        if recipe.precision.name == "fp32":
            raise RecipeError(field, "sums in BF16, and precision.name is fp32", f"write {field}=false")
        if recipe.precision.name == "fp8_blockwise":
            fix = f"write {field}=false, precision.name=fp8_current_scaling or {without_fp8(recipe.precision)}"
            raise RecipeError(field, "gathers no blocks of FP8, and precision.name is fp8_blockwise", fix)
        _one_shape(recipe, name, field)


def cuda_graphs(recipe: Recipe) -> None:
    """What megatron-core 0.16 captures: layers without hooks of others, in one order, on tensors of one shape.

    Its CudaGraphManager refuses hooks other than its own, and the mixers have one where parameters are gathered layer
    by layer; it numbers a pipeline's layers as if they were divided equally; TransformerConfig refuses to recompute
    whole layers. Recomputed parts free tensors that a graph would write to, and masks of documents are made anew for
    each micro-batch, outside of any layer's graph.
    """
    for name, stage, field in _stages_with(recipe, "cuda_graphs"):
        layout, prefix = stage_layout(recipe, stage), layout_field(name, stage)
        gathers = layout.overlap and layout.distributed_optimizer
        needs = {
            f"{prefix}.pipeline=1": layout.pipeline == 1,
            f"{prefix}.overlap=false": not gathers,
            "recompute.granularity=none": recipe.recompute.granularity == "none",
            "data.document_boundaries=ignore": recipe.data.document_boundaries == "ignore",
        }
        missing = [value for value, given in needs.items() if not given]
        if missing:
            raise RecipeError(field, f"needs {' and '.join(missing)}", f"write {' '.join(missing)}, or {field}=false")
        _one_shape(recipe, name, field)


def _stages_with(recipe: Recipe, option: str) -> Iterator[tuple[str, StageConfig, str]]:
    """Name and configuration of each stage whose layout has the option, and the option's dotted name there."""
    for name, stage in recipe.stages.items():
        if getattr(stage_layout(recipe, stage), option):
            yield name, stage, f"{layout_field(name, stage)}.{option}"


def _one_shape(recipe: Recipe, stage_name: str, field: str) -> None:
    """Refuse a stage whose micro-batches differ from those of another one that the same process trains."""
    stage = recipe.stages[stage_name]
    for name, other in recipe.stages.items():
        if stage_build(recipe, other) == stage_build(recipe, stage) and _shape(other) != _shape(stage):
            problem = f"needs micro-batches of one shape, and those of {name} and {stage_name} differ"
            raise RecipeError(field, problem, f"give one of them a layout of its own, or write {field}=false")


def _shape(stage: StageConfig) -> tuple[int, int]:
    """Tokens and samples of a micro-batch."""
    return stage.sequence_length, stage.micro_batch_size
