"""What a recipe asks of GPUs and their kernels, as functions of the recipe and of facts; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from nano_pretrain.platform.limits import check_int32, largest_tensor
from nano_pretrain.recipe.derived import stage_layout
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.pattern import count_layers
from nano_pretrain.recipe.rules_layout import layout_field
from nano_pretrain.recipe.rules_precision import LINEARS_PER_LAYER, without_fp8
from nano_pretrain.recipe.schema import PrecisionConfig, Recipe

CHUNK = 128
"""Tokens of a chunk of the scan: megatron-core 0.16's mixer."""

NEEDS = {
    "fp8_current_scaling": ((8, 9), (12, 1)),
    "fp8_blockwise": ((9, 0), (12, 9)),
}
"""Least compute capability and CUDA version of an FP8 recipe: `check_fp8_support` and
`check_fp8_block_scaling_support` in transformer_engine/pytorch/quantization.py of Transformer Engine, the same in its
releases 2.9, 2.10 and 2.11. The first asks for CUDA 12.1 on compute capability 8.9 only; on all others Transformer
Engine itself needs it (docs/installation.rst)."""

BLACKWELL = (10, 0)
"""Compute capability from which, 12.0 included, Transformer Engine 2.9 to 2.11 has no products of its own for
fp8_blockwise: it takes those of MXFP8, whose scales are powers of two (pytorch/csrc/extensions/gemm.cpp). That is the
scales' default; its quantisers refuse others (common/transpose/quantize_transpose_square_blockwise.cu and
quantize_transpose_vector_blockwise.cu). `check_mxfp8_support`, which refuses 12.0, is asked for the MXFP8 recipe only.
"""

CONVOLUTION_WIDTHS, CONVOLUTION_CHANNELS = (2, 4), 8
"""Least and largest width, and what divides the channels of a rank: the checks of `causal_conv1d_fwd` in causal-conv1d
1.5 to 1.7 (csrc/causal_conv1d.cpp)."""

FP32_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
"""Environment variable that, as 1, makes the scales of fp8_blockwise any FP32 numbers
(transformer_engine/common/recipe/__init__.py)."""


@dataclass(frozen=True)
class CudaFacts:
    """What the GPU kernels depend on.

    Attributes:
        capability: compute capability of the device, major and minor.
        cuda: version of CUDA that torch was built with, major and minor.
        fp32_scales: whether `FP32_SCALES` is set.
        segments_in_graphs: whether NCCL would register the memory of CUDA graphs while torch's allocator moves it.
    """

    capability: tuple[int, int]
    cuda: tuple[int, int]
    fp32_scales: bool = False
    segments_in_graphs: bool = False


def check_cuda(recipe: Recipe, facts: CudaFacts) -> None:
    """Refuse a recipe that these GPUs would fail at, or compute wrongly.

    Raises:
        RecipeError: the precision needs another GPU or CUDA, a stage is too long for the scan, the convolution or the
            attention has no kernel, more layers stay BF16 than megatron-core takes, or CUDA graphs do not go with the
            environment.
    """
    check_fp8_support(recipe.precision, facts)
    for name in recipe.stages:
        check_kernels(recipe, name)
        check_graphs(recipe, name, facts)


def check_kernels(recipe: Recipe, stage_name: str) -> None:
    """Refuse a stage that GPUs do not train, whichever they are.

    Raises:
        RecipeError: it is too long for the scan, the convolution or the attention has no kernel, or more layers stay
            BF16 than megatron-core takes.
    """
    check_bf16_layers(recipe, stage_name)
    check_scan(recipe, stage_name)
    check_convolution(recipe, stage_name)
    check_attention(recipe, stage_name)


def check_fp8_support(precision: PrecisionConfig, facts: CudaFacts) -> None:
    """Compare device, CUDA and environment with what an FP8 recipe needs.

    Raises:
        RecipeError: one of them is too old, or the device cannot scale as the environment asks.
    """
    name = precision.name
    if name not in NEEDS:
        return
    capability, cuda = NEEDS[name]
    if facts.capability < capability:
        problem = f"{name} needs compute capability {_dotted(capability)}, this GPU has {_dotted(facts.capability)}"
        others = [f"precision.name={other}" for other, (least, _) in NEEDS.items() if least <= facts.capability]
        raise RecipeError("precision.name", problem, f"write {(*others, without_fp8(precision))[0]}")
    if facts.cuda < cuda:
        problem = f"{name} needs CUDA {_dotted(cuda)}, torch was built with {_dotted(facts.cuda)}"
        fix = f"install torch for a newer CUDA, or write {without_fp8(precision)}"
        raise RecipeError("precision.name", problem, fix)
    if name == "fp8_blockwise" and facts.capability >= BLACKWELL and facts.fp32_scales:
        problem = f"{name} needs scales that are powers of two on compute capability {_dotted(facts.capability)}"
        raise RecipeError("precision.name", problem, f"unset {FP32_SCALES}, or write {without_fp8(precision)}")


def check_bf16_layers(recipe: Recipe, stage_name: str) -> None:
    """Refuse more BF16 layers at an end of an FP8 model than megatron-core takes, wherever the pipeline is cut.

    Its TransformerConfig (0.16) compares them with num_layers // pipeline_model_parallel_size.

    Raises:
        RecipeError: there are.
    """
    precision, stage = recipe.precision, recipe.stages[stage_name]
    if precision.name not in NEEDS:
        return
    pipeline, layers = stage_layout(recipe, stage).pipeline, len(recipe.model.pattern)
    ends = {name: getattr(precision, name) for name in ("bf16_first_linears", "bf16_last_linears")}
    most = LINEARS_PER_LAYER * (layers // pipeline)
    over = [name for name, linears in ends.items() if linears > most]
    if over:
        problem = (
            f"{ends[over[0]]} linears are {ends[over[0]] // LINEARS_PER_LAYER} layers, and on GPUs megatron-core takes "
            f"{layers} layers // {pipeline} pipeline stages = {layers // pipeline} at an end"
        )
        fewer = LINEARS_PER_LAYER * layers // max(ends.values())
        lower = " ".join(f"precision.{name}={most}" for name in over)
        fix = f"write {lower}, or {layout_field(stage_name, stage)}.pipeline={fewer} or less"
        raise RecipeError(f"precision.{over[0]}", problem, fix)


def check_scan(recipe: Recipe, stage_name: str) -> None:
    """Refuse a stage whose tensors mamba-ssm's kernels cannot address on a rank.

    Raises:
        RecipeError: one has 2^31 elements or more.
    """
    model, stage = recipe.model, recipe.stages[stage_name]
    if not count_layers(model.pattern).mamba:
        return
    heads, groups = _heads_and_groups(recipe, stage_name)
    name, elements = largest_tensor(
        stage.micro_batch_size,
        stage.sequence_length,
        heads=heads,
        head_dim=model.mamba_head_dim,
        groups=groups,
        state=model.mamba_state_dim,
        chunk=CHUNK,
    )
    check_int32(name, elements, f"stages.{stage_name}.sequence_length")


def check_convolution(recipe: Recipe, stage_name: str) -> None:
    """Refuse a convolution that causal-conv1d has no kernel for.

    Raises:
        RecipeError: its width, or its channels on a rank.
    """
    model = recipe.model
    if not count_layers(model.pattern).mamba:
        return
    least, largest = CONVOLUTION_WIDTHS
    if not least <= model.mamba_conv_width <= largest:
        problem = f"causal-conv1d has widths {least} to {largest}, not {model.mamba_conv_width}"
        raise RecipeError("model.mamba_conv_width", problem, f"write {largest}, or train on a CPU")
    heads, groups = _heads_and_groups(recipe, stage_name)
    channels = heads * model.mamba_head_dim + 2 * groups * model.mamba_state_dim
    if channels % CONVOLUTION_CHANNELS:
        problem = (
            f"a rank's convolution has {channels} channels (heads x mamba_head_dim + 2 x groups x mamba_state_dim), "
            f"and causal-conv1d needs a multiple of {CONVOLUTION_CHANNELS}"
        )
        field = f"{layout_field(stage_name, recipe.stages[stage_name])}.tensor"
        raise RecipeError(field, problem, "lower tensor or context, change the model, or train on a CPU")


def check_attention(recipe: Recipe, stage_name: str) -> None:
    """Refuse FP32 under context parallelism, unless documents take another attention than Transformer Engine's.

    Its only kernel for FP32 is the unfused one, which has no context parallelism (`get_attention_backend` in
    pytorch/attention/dot_product_attention/utils.py, the same in 2.9, 2.10 and 2.11).

    Raises:
        RecipeError: that is what the stage asks for.
    """
    stage = recipe.stages[stage_name]
    whole = recipe.data.document_boundaries == "ignore" and count_layers(recipe.model.pattern).attention
    if whole and recipe.precision.name == "fp32" and stage_layout(recipe, stage).context > 1:
        problem = "Transformer Engine's attention has no FP32 under context parallelism"
        field = f"{layout_field(stage_name, stage)}.context"
        fix = f"write {field}=1, {without_fp8(recipe.precision)} or data.document_boundaries=reset"
        raise RecipeError(field, problem, fix)


def check_graphs(recipe: Recipe, stage_name: str, facts: CudaFacts) -> None:
    """Refuse CUDA graphs whose memory NCCL and torch's allocator would both manage (megatron-core's CudaGraphManager).

    Raises:
        RecipeError: they would.
    """
    stage = recipe.stages[stage_name]
    if stage_layout(recipe, stage).cuda_graphs and facts.segments_in_graphs and facts.capability < BLACKWELL:
        problem = "PYTORCH_CUDA_ALLOC_CONF has expandable_segments:True, and NCCL registers the memory of graphs"
        field = f"{layout_field(stage_name, stage)}.cuda_graphs"
        raise RecipeError(field, problem, f"set NCCL_GRAPH_REGISTER=0, or write {field}=false")


def _heads_and_groups(recipe: Recipe, stage_name: str) -> tuple[int, int]:
    """Of the mixers of a rank; with more ranks than groups, each has a copy of one."""
    layout = stage_layout(recipe, recipe.stages[stage_name])
    ranks = layout.tensor * layout.context
    return recipe.model.mamba_num_heads // ranks, max(1, recipe.model.mamba_num_groups // ranks)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
