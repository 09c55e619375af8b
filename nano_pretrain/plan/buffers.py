"""The contiguous buffers of megatron-core's DistributedDataParallel, and the optimizer shards cut from them.

Source: `distributed/param_and_grad_buffer.py` and `optimizer/distrib_optimizer.py` of megatron-core 0.16.1.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from nano_pretrain.plan.ranks import ParameterTensor
from nano_pretrain.recipe.schema import ModelConfig, PrecisionConfig

GRADIENT_BYTES = 4
"""A gradient is FP32 whatever its parameter is."""

PARAMETER_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128


class Storage(IntEnum):
    """How a parameter is held; the value is its bytes."""

    FP8 = 1
    BF16 = 2
    FP32 = 4


@dataclass(frozen=True)
class ParameterBuffer:
    """All parameters of one storage that a rank holds, and their gradients, in the order of the buffer.

    With the distributed optimizer both are one tensor each, in which a parameter begins at a multiple of 64 elements
    and whose length is a multiple of 128 and of the ranks that share it; without it parameters stay where they are and
    the gradients follow each other without gaps. There is one bucket: gradients are not reduced while the backward pass
    runs.

    Attributes:
        storage: what the parameters are.
        sizes: elements of each parameter, the last one of the model first.
        sharded: whether the distributed optimizer is used.
        ranks: data-parallel x context-parallel ranks, which share the optimizer's work.
    """

    storage: Storage
    sizes: tuple[int, ...]
    sharded: bool
    ranks: int

    @property
    def elements(self) -> int:
        """Length of the buffer, with its padding."""
        if not self.sharded:
            return sum(self.sizes)
        end = sum(_padded(size, PARAMETER_ALIGNMENT) for size in self.sizes)
        return _padded(end, math.lcm(self.ranks, BUCKET_ALIGNMENT))

    @property
    def gradient_bytes(self) -> int:
        """The buffer of the gradients."""
        return self.elements * GRADIENT_BYTES

    @property
    def optimizer_bytes(self) -> int:
        """Optimizer state of one element: Adam's two moments, and a main weight where the parameter is not FP32."""
        return 8 if self.storage == Storage.FP32 else 12

    def owned(self) -> list[int]:
        """Elements whose optimizer state each data-parallel rank holds; padding has none."""
        if not self.sharded:
            return [sum(self.sizes)] * self.ranks
        shard = self.elements // self.ranks
        reached = list(itertools.accumulate((_padded(size, PARAMETER_ALIGNMENT) for size in self.sizes), initial=0))
        counted = list(itertools.accumulate(self.sizes, initial=0))

        def elements_before(index: int) -> int:
            parameter = bisect.bisect_right(reached, index) - 1
            inside = index - reached[parameter]
            return counted[parameter] + (min(inside, self.sizes[parameter]) if parameter < len(self.sizes) else 0)

        ends = [elements_before(rank * shard) for rank in range(self.ranks + 1)]
        return [end - start for start, end in itertools.pairwise(ends)]


def _padded(elements: int, multiple: int) -> int:
    return -(-elements // multiple) * multiple


def parameter_buffers(
    tensors: Iterable[ParameterTensor], storages: Iterable[Storage], sharded: bool, ranks: int
) -> list[ParameterBuffer]:
    """One buffer for each storage.

    Args:
        tensors: the parameters of a rank in the order of the model.
        storages: storage of each.
        sharded: whether the distributed optimizer is used.
        ranks: data-parallel x context-parallel ranks.
    """
    sizes: dict[Storage, list[int]] = {}
    for tensor, storage in zip(tensors, storages, strict=True):
        sizes.setdefault(storage, []).append(tensor.elements)
    return [ParameterBuffer(storage, tuple(found[::-1]), sharded, ranks) for storage, found in sizes.items()]


def optimizer_state(buffers: Iterable[ParameterBuffer]) -> int:
    """Bytes of optimizer state on the data-parallel rank that holds most."""
    by_rank = zip(*([owned * buffer.optimizer_bytes for owned in buffer.owned()] for buffer in buffers), strict=True)
    return max(map(sum, by_rank))


def storage_of(tensor: ParameterTensor, model: ModelConfig, precision: PrecisionConfig, fp8: bool) -> Storage:
    """How a parameter is held.

    Args:
        tensor: the parameter.
        model: the model.
        precision: number formats of the recipe.
        fp8: whether FP8 recipes keep the weights of linears in FP8.
    """
    if precision.name == "fp32" or tensor.kept_fp32:
        return Storage.FP32
    quantised = fp8 and tensor.is_layer_linear and layer_is_fp8(tensor.layer, model, precision)
    return Storage.FP8 if quantised else Storage.BF16


def layer_is_fp8(layer: int, model: ModelConfig, precision: PrecisionConfig) -> bool:
    """Whether the two linears of a layer are quantised: Transformer Engine switches by layer, so both or none."""
    if not precision.name.startswith("fp8"):
        return False
    first, end = 2 * layer, 2 * layer + 2
    return first >= precision.bf16_first_linears and end <= 2 * len(model.pattern) - precision.bf16_last_linears


def fp8_copy(tensor: ParameterTensor, precision: PrecisionConfig) -> int:
    """Bytes that an FP8 weight takes beside its row-wise data.

    Both are Transformer Engine's on Hopper, whose FP8 products want each factor contiguous along the summed dimension:
    the weight again, column-wise, for the gradient of the input, and the scales. `Float8BlockwiseQTensor` has an FP32
    scale for each 128 x 128 block of either copy, rows of scales padded to 4; `Float8Tensor` (current scaling) has one.
    """
    rows, columns = tensor.shape
    if precision.name == "fp8_current_scaling":
        return tensor.elements + 4
    row_blocks, column_blocks = -(-rows // 128), -(-columns // 128)
    scales = row_blocks * _padded(column_blocks, 4) + column_blocks * _padded(row_blocks, 4)
    return tensor.elements + 4 * scales
