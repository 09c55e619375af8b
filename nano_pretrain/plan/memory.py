"""Memory of one rank in a stage: the moment of a step at which its tensors are largest, and what they are.

Counted are tensors. Not counted are the CUDA context, NCCL's and cuBLAS's own memory, what the allocator loses to
fragmentation (together some gigabytes of a GPU), and the program itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nano_pretrain.plan import activations_cpu, activations_cuda, activations_plain
from nano_pretrain.plan.activations import RECOMPUTATION, Sizes
from nano_pretrain.plan.buffers import (
    EMBEDDING,
    ParameterBuffer,
    Storage,
    bucket_size,
    fp8_copy,
    layer_is_fp8,
    optimizer_state,
    parameter_buffers,
    storage_of,
)
from nano_pretrain.plan.moments import Activations, Work, moments
from nano_pretrain.plan.ranks import Part, pipeline_parts, rank_tensors
from nano_pretrain.platform.base import PlatformName
from nano_pretrain.recipe.derived import parameter_dtype, stage_layout, stage_ranks
from nano_pretrain.recipe.schema import ParallelConfig, Recipe, StageConfig


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at the moment of a step at which it holds most.

    Attributes:
        position: in the pipeline, 0 for the first.
        in_flight: micro-batches whose activations it holds then.
        weights: parameters, with the padding of their buffer. A weight that FP8 quantises is its row-wise FP8 data:
            there is no BF16 copy.
        fp8_copies: column-wise FP8 data and scales of these.
        gradients: the FP32 buffer that gradients are summed in.
        optimizer: Adam's moments, and main weights of what is not FP32; of the data-parallel rank that holds most.
        activations: kept for the backward pass.
        states: Mamba states; on a CPU kept for the backward pass, on a GPU those of one layer during its backward pass.
        logits: and what the loss makes of them; 0 if the moment is another.
        buffers: what the backward pass works with at that moment, recomputed tensors among it, and gathered copies.
    """

    position: int
    in_flight: int
    weights: int
    fp8_copies: int
    gradients: int
    optimizer: int
    activations: Activations
    states: int
    logits: int
    buffers: int

    @property
    def static(self) -> int:
        """What is there between two steps."""
        return self.weights + self.fp8_copies + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All of it: the peak."""
        return self.static + self.activations.total + self.states + self.logits + self.buffers


def stage_memory(recipe: Recipe, stage_name: str, platform: PlatformName = "cuda") -> list[RankMemory]:
    """The largest rank of each pipeline position.

    FP8 recipes are FP8 on `cuda` only: their weights are quantised tensors that the distributed optimizer gathers as
    such (`fp8_param_gather`). On `cpu` they are BF16.

    Args:
        recipe: a recipe that the rules accept.
        stage_name: name of one of its stages.
        platform: whose kernels keep the activations.

    Raises:
        RecipeError: the pattern is wrong or does not fit the pipeline.
    """
    stage = recipe.stages[stage_name]
    layout = stage_layout(recipe, stage)
    parts = pipeline_parts(recipe.model, layout, stage.sequence_length)
    return [_rank_memory(recipe, stage, layout, part, platform) for part in parts]


def _rank_memory(
    recipe: Recipe, stage: StageConfig, layout: ParallelConfig, part: Part, platform: PlatformName
) -> RankMemory:
    tensors = rank_tensors(recipe.model, layout, part)
    storages = [storage_of(tensor, recipe.model, recipe.precision, platform == "cuda") for tensor in tensors]
    ranks = stage_ranks(recipe, stage) // (layout.tensor * layout.pipeline)
    elements = bucket_size(layout, ranks // layout.context, part.position)
    buffers = parameter_buffers(tensors, storages, layout.distributed_optimizer, ranks, elements)
    micro_batches = _micro_batches(recipe, stage, layout)
    in_flight = min(layout.pipeline - part.position, micro_batches)  # 1F1B: one for each position from here on
    work = _work(recipe, stage, layout, part, platform, buffers, follows=micro_batches > in_flight)
    worst = max(moments(work, in_flight), key=lambda moment: moment.total)
    quantised = (tensor for tensor, storage in zip(tensors, storages, strict=True) if storage == Storage.FP8)
    return RankMemory(
        position=part.position,
        in_flight=in_flight,
        weights=sum(buffer.elements * buffer.storage for buffer in buffers),
        fp8_copies=sum(fp8_copy(tensor, recipe.precision) for tensor in quantised),
        gradients=sum(buffer.gradient_bytes for buffer in buffers),
        optimizer=optimizer_state(buffers),
        activations=worst.activations,
        states=worst.states,
        logits=worst.logits,
        buffers=worst.buffers,
    )


def _micro_batches(recipe: Recipe, stage: StageConfig, layout: ParallelConfig) -> int:
    """Micro-batches of a rank in a step."""
    data_parallel = stage_ranks(recipe, stage) // (layout.tensor * layout.pipeline * layout.context)
    return stage.global_batch_size // (data_parallel * stage.micro_batch_size)


def _work(
    recipe: Recipe,
    stage: StageConfig,
    layout: ParallelConfig,
    part: Part,
    platform: PlatformName,
    buffers: tuple[ParameterBuffer, ...],
    follows: bool,
) -> Work:
    """What the position does with a micro-batch; `follows`: forward passes come behind backward passes."""
    element = 4 if parameter_dtype(recipe.precision) == "float32" else 2
    documents = recipe.data.document_boundaries == "reset"
    sizes = Sizes(recipe.model, layout, stage.micro_batch_size, stage.sequence_length, element, documents=documents)
    kinds = activations_cuda if platform == "cuda" else activations_cpu
    kernels = activations_plain if platform == "cpu" and recipe.cluster.cpu_kernels == "plain" else kinds
    recomputed = RECOMPUTATION[recipe.recompute.granularity]
    quantised = replace(sizes, fp8=recipe.precision.name)
    layers = []
    indices = range(part.first_layer, part.first_layer + len(part.layers))
    for index, kind in zip(indices, part.layers, strict=True):
        fp8 = platform == "cuda" and layer_is_fp8(index, recipe.model, recipe.precision)
        layers.append((kind, recomputed(kernels.LAYERS[kind](quantised if fp8 else sizes))))
    return Work(
        layers=tuple(layers),
        head=kernels.head(sizes) if part.holds_head else None,
        sent=0 if part.holds_head else sizes.residual,
        # The last branch's output; of the micro-batch before its output and the gradients of that and of its input.
        ending=(1 + (follows and 2 + (part.position > 0))) * sizes.residual,
        embedding=kinds.embedding(sizes) if part.holds_embedding else 0,
        reduced=tuple(kinds.copied(buffers, layer) for layer in (*indices, EMBEDDING)),
        update=kinds.update(buffers, sizes.table_gradient if part.holds_embedding and layout.overlap else 0),
        held=kinds.held(sizes, part.holds_head) + (sizes.residual if part.position and follows else 0),
    )
