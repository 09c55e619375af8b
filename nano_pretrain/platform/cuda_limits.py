"""What a recipe asks of GPUs and their kernels, as functions of the recipe and of facts; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from nano_pretrain.platform.limits import check_int32, largest_tensor
from nano_pretrain.recipe.derived import stage_layout
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.pattern import count_layers
from nano_pretrain.recipe.schema import Recipe

CHUNK = 128
"""Tokens of a chunk of the scan: megatron-core 0.16's mixer."""

NEEDS = {
    "fp8_current_scaling": ((8, 9), (12, 1)),
    "fp8_blockwise": ((9, 0), (12, 9)),
}
"""Least compute capability and CUDA version of an FP8 recipe: `check_fp8_support` and
`check_fp8_block_scaling_support` of Transformer Engine 2.9."""


@dataclass(frozen=True)
class CudaFacts:
    """What the GPU kernels depend on.

    Attributes:
        capability: compute capability of the device, major and minor.
        cuda: version of CUDA that torch was built with, major and minor.
    """

    capability: tuple[int, int]
    cuda: tuple[int, int]


def check_cuda(recipe: Recipe, facts: CudaFacts) -> None:
    """Refuse a recipe that these GPUs would fail at, or compute wrongly.

    Raises:
        RecipeError: the precision needs another GPU or CUDA, or a stage is too long for the scan.
    """
    check_fp8_support(recipe.precision.name, facts)
    for name in recipe.stages:
        check_scan(recipe, name)


def check_fp8_support(precision: str, facts: CudaFacts) -> None:
    """Compare device and CUDA with what an FP8 recipe needs.

    Raises:
        RecipeError: one of them is too old.
    """
    if precision not in NEEDS:
        return
    capability, cuda = NEEDS[precision]
    if facts.capability < capability:
        problem = (
            f"{precision} needs compute capability {_dotted(capability)}, this GPU has {_dotted(facts.capability)}"
        )
        others = [name for name, (least, _) in NEEDS.items() if least <= facts.capability]
        raise RecipeError("precision.name", problem, f"write precision={(*others, 'bf16')[0]}")
    if facts.cuda < cuda:
        problem = f"{precision} needs CUDA {_dotted(cuda)}, torch was built with {_dotted(facts.cuda)}"
        raise RecipeError("precision.name", problem, "install torch for a newer CUDA, or write precision=bf16")


def check_scan(recipe: Recipe, stage_name: str) -> None:
    """Refuse a stage whose tensors mamba-ssm's kernels cannot address on a rank.

    Raises:
        RecipeError: one has 2^31 elements or more.
    """
    model, stage = recipe.model, recipe.stages[stage_name]
    if not count_layers(model.pattern).mamba:
        return
    layout = stage_layout(recipe, stage)
    ranks = layout.tensor * layout.context
    name, elements = largest_tensor(
        stage.micro_batch_size,
        stage.sequence_length,
        heads=model.mamba_num_heads // ranks,
        head_dim=model.mamba_head_dim,
        # With more ranks than groups, each has a copy of one.
        groups=max(1, model.mamba_num_groups // ranks),
        state=model.mamba_state_dim,
        chunk=CHUNK,
    )
    check_int32(name, elements, f"stages.{stage_name}.sequence_length")


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
