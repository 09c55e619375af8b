"""The contiguous buffers of megatron-core's DistributedDataParallel, and the optimizer shards cut from them.

Source: `distributed/param_and_grad_buffer.py` and `optimizer/distrib_optimizer.py` of megatron-core 0.16.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, cached_property

from nano_pretrain.plan.ranks import ParameterTensor
from nano_pretrain.recipe.rules_precision import fp8_layers
from nano_pretrain.recipe.schema import ModelConfig, ParallelConfig, PrecisionConfig

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
class Bucket:
    """Parameters of a buffer that follow each other, whose gradients are reduced together.

    Attributes:
        starts: where each parameter begins in the buffer.
        sizes: elements of each.
        start: where the bucket begins.
        end: where it ends, with its padding.
        layer: of its last parameter, which completes it in the backward pass; `EMBEDDING` and `HEAD` among them.
    """

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    end: int
    layer: int

    def owned(self, ranks: int) -> list[int]:
        """Parameters' elements in each of so many equal parts: all but the padding behind parameters."""
        shard = (self.end - self.start) // ranks
        found = [shard] * ranks
        for start, size, following in zip(self.starts, self.sizes, (*self.starts[1:], self.end), strict=True):
            gap, end = start + size - self.start, following - self.start
            while gap < end:
                rank = gap // shard
                until = min(end, (rank + 1) * shard)
                found[rank] -= until - gap
                gap = until
        return found


EMBEDDING, HEAD = -1, 2**31
"""Where the parameters outside the layers stand among them."""


@dataclass(frozen=True)
class ParameterBuffer:
    """All parameters of one storage that a rank holds, and their gradients, in the order of the buffer.

    With the distributed optimizer both are one tensor each, in which a parameter begins at a multiple of 64 elements
    and a bucket ends at a multiple of 128 and of the ranks that share it; without it parameters stay where they are and
    the gradients follow each other without gaps.

    Attributes:
        storage: what the parameters are.
        sizes: elements of each parameter, the last one of the model first.
        layers: layer of each, or `EMBEDDING` or `HEAD`.
        sharded: whether the distributed optimizer is used.
        ranks: data-parallel x context-parallel ranks, which share the optimizer's work.
        bucket_size: elements with which a bucket is full; None for one bucket.
    """

    storage: Storage
    sizes: tuple[int, ...]
    layers: tuple[int, ...]
    sharded: bool
    ranks: int
    bucket_size: int | None

    @cached_property
    def buckets(self) -> list[Bucket]:
        """In the order in which the backward pass completes them."""
        found: list[Bucket] = []
        starts: list[int] = []
        start = end = 0
        for index, size in enumerate(self.sizes):
            starts.append(self._aligned(end, PARAMETER_ALIGNMENT))
            end = starts[-1] + size
            full = self.bucket_size is not None and end - start >= self.bucket_size
            if full or index == len(self.sizes) - 1:
                end = self._aligned(end, math.lcm(self.ranks, BUCKET_ALIGNMENT))
                sizes = self.sizes[index + 1 - len(starts) : index + 1]
                found.append(Bucket(tuple(starts), sizes, start, end, self.layers[index]))
                start, starts = end, []
        return found

    def _aligned(self, elements: int, multiple: int) -> int:
        return _padded(elements, multiple) if self.sharded else elements

    @property
    def elements(self) -> int:
        """Length of the buffer, with its padding."""
        return self.buckets[-1].end

    @property
    def gradient_bytes(self) -> int:
        """The buffer of the gradients."""
        return self.elements * GRADIENT_BYTES

    def reduced_before(self, layer: int) -> int:
        """Bytes of the gradients that are complete, and on their way, when the backward pass comes to a layer."""
        return GRADIENT_BYTES * sum(bucket.end - bucket.start for bucket in self.buckets if bucket.layer > layer)

    @property
    def optimizer_bytes(self) -> int:
        """Optimizer state of one element: Adam's two moments, and a main weight where the parameter is not FP32."""
        return 8 if self.storage == Storage.FP32 else 12

    def owned(self) -> list[int]:
        """Elements whose optimizer state each data-parallel rank holds, a part of each bucket; padding has none."""
        if not self.sharded:
            return [sum(self.sizes)] * self.ranks
        return [sum(parts) for parts in zip(*(bucket.owned(self.ranks) for bucket in self.buckets), strict=True)]


def _padded(elements: int, multiple: int) -> int:
    return -(-elements // multiple) * multiple


def bucket_size(layout: ParallelConfig, data_parallel: int, position: int) -> int | None:
    """Elements of a bucket on a rank of a pipeline position; None for one bucket, behind the first position too."""
    if not layout.overlap or position > 0:
        return None
    return layout.bucket_size or max(40_000_000, 1_000_000 * data_parallel)


def parameter_buffers(
    tensors: Iterable[ParameterTensor],
    storages: Iterable[Storage],
    sharded: bool,
    ranks: int,
    elements_of_bucket: int | None,
) -> tuple[ParameterBuffer, ...]:
    """One buffer for each storage.

    Args:
        tensors: the parameters of a rank in the order of the model.
        storages: storage of each.
        sharded: whether the distributed optimizer is used.
        ranks: data-parallel x context-parallel ranks.
        elements_of_bucket: see `bucket_size`.
    """
    members: dict[Storage, list[ParameterTensor]] = {}
    for tensor, storage in zip(tensors, storages, strict=True):
        members.setdefault(storage, []).append(tensor)
    return tuple(
        ParameterBuffer(
            storage,
            tuple(tensor.elements for tensor in found[::-1]),
            tuple(_place(tensor) for tensor in found[::-1]),
            sharded,
            ranks,
            elements_of_bucket,
        )
        for storage, found in members.items()
    )


def _place(tensor: ParameterTensor) -> int:
    if tensor.layer >= 0:
        return tensor.layer
    return EMBEDDING if tensor.holder == "embedding" else HEAD


@cache
def optimizer_state(buffers: tuple[ParameterBuffer, ...]) -> int:
    """Bytes of optimizer state on the data-parallel rank that holds most.

    A search asks it again for each micro-batch and recomputation, which change nothing.
    """
    owned = [(buffer.owned(), buffer.optimizer_bytes) for buffer in buffers]
    return max(map(sum, zip(*([count * size for count in counts] for counts, size in owned), strict=True)))


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
    return layer in fp8_layers(model.pattern, precision)


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
