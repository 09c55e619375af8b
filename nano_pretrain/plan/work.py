"""What one rank has to do for one micro-batch, in kernels: FLOPs executed, bytes moved, and how long that takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nano_pretrain.plan.buffers import layer_is_fp8
from nano_pretrain.plan.device import Device
from nano_pretrain.recipe.derived import parameter_dtype
from nano_pretrain.recipe.schema import ModelConfig, ParallelConfig, PrecisionConfig, StageConfig

BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
"""Of a number."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of one rank on one micro-batch.

    Attributes:
        name: what it computes.
        kind: `matrix`, `attention`, `scan`, or `memory` for what is bound by bytes.
        number_format: of its products.
        flops: executed.
        bytes: moved between memory and cores.
    """

    name: str
    kind: str
    number_format: str
    flops: float
    bytes: float

    def seconds(self, device: Device) -> float:
        """The longer of computing and moving."""
        moving = self.bytes / device.memory_rate
        if self.kind == "memory":
            return moving
        rate = device.core_rate(self.kind, self.number_format)
        return max(self.flops / rate, moving)


@dataclass(frozen=True)
class Passes:
    """The kernels of the forward and of the backward pass."""

    forward: tuple[Kernel, ...] = ()
    backward: tuple[Kernel, ...] = ()

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward)


def total_flops(kernels: Iterable[Kernel]) -> float:
    """Sum of the FLOPs."""
    return sum(kernel.flops for kernel in kernels)


def total_seconds(kernels: Iterable[Kernel], device: Device) -> float:
    """Time of one after the other."""
    return sum(kernel.seconds(device) for kernel in kernels)


@dataclass(frozen=True)
class RankWork:
    """One micro-batch on one rank.

    Attributes:
        model: the architecture.
        platform: whose kernels run.
        sequence: tokens of a sample.
        samples: of the micro-batch.
        tensor: tensor-parallel ranks.
        context: context-parallel ranks.
        residual_tokens: tokens of the residual stream that the rank holds.
        activation: format of activations.
        amax_pass: whether a tensor is read once more before its cast to FP8, for one scale of the whole.
    """

    model: ModelConfig
    platform: str
    sequence: int
    samples: int
    tensor: int
    context: int
    residual_tokens: int
    activation: str
    amax_pass: bool

    @property
    def tokens(self) -> int:
        """Tokens that pass through a linear of the rank."""
        return self.samples * self.sequence // self.context

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return BYTES[self.activation]


def work_of(
    model: ModelConfig, precision: PrecisionConfig, stage: StageConfig, layout: ParallelConfig, platform: str
) -> RankWork:
    """A micro-batch of a stage on a rank of a layout."""
    tokens = stage.micro_batch_size * stage.sequence_length // layout.context
    return RankWork(
        model=model,
        platform=platform,
        sequence=stage.sequence_length,
        samples=stage.micro_batch_size,
        tensor=layout.tensor,
        context=layout.context,
        residual_tokens=tokens // layout.tensor if layout.sequence else tokens,
        activation=plain_format(precision),
        amax_pass=precision.name == "fp8_current_scaling",
    )


def layer_format(model: ModelConfig, precision: PrecisionConfig, layer: int, platform: str) -> str:
    """Format in which the two linears of a layer multiply; the CPU's kernels compute FP8 recipes with BF16 products."""
    if platform == "cuda" and layer_is_fp8(layer, model, precision):
        return "fp8"
    return plain_format(precision)


def plain_format(precision: PrecisionConfig) -> str:
    """Format of activations, and of all products that are never FP8."""
    return "fp32" if parameter_dtype(precision) == "float32" else "bf16"
