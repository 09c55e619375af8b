"""Any rank of any layout in this process: process groups that do nothing, and a model whose tensors hold nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from nano_pretrain.platform import cpu
from nano_pretrain.recipe.schema import ParallelConfig, Recipe

LENGTH = 4096
"""Sequence length that the layers are divided for."""


class MetaPlatform(cpu.CpuPlatform):
    """The CPU, whose tensors are on the meta device."""

    def optimizer_scope(self) -> AbstractContextManager[None]:
        """`Tensor.type()` as megatron-core's optimizers want it."""
        return _meta_as_cuda()


@contextmanager
def _meta_as_cuda() -> Iterator[None]:
    original = torch.Tensor.type

    def type_name(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(tensor, *args, **kwargs)
        return answer.replace("torch.meta.", "torch.cuda.") if isinstance(answer, str) else answer

    with mock.patch.object(torch.Tensor, "type", type_name):
        yield


@dataclass(frozen=True)
class Place:
    """A rank: its pipeline position, and its number among the data- and context-parallel ranks of a model shard."""

    layout: ParallelConfig
    data_parallel: int
    position: int = 0
    replica: int = 0

    @property
    def replicas(self) -> int:
        """Data- and context-parallel ranks."""
        return self.data_parallel * self.layout.context

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.layout.tensor * self.replicas * self.layout.pipeline

    @property
    def rank(self) -> int:
        """The first tensor-parallel rank there, in megatron-core's order: tensor, context, data, pipeline."""
        return self.layout.tensor * (self.replica + self.replicas * self.position)


@contextmanager
def fake_rank(place: Place) -> Iterator[MetaPlatform]:
    """The process groups of a rank, and the meta device wherever tensors are made."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    platform = MetaPlatform()
    platform.prepare(0, threads=1, kernels="plain")
    dist.init_process_group("fake", store=FakeStore(), rank=place.rank, world_size=place.world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=place.layout.tensor,
            pipeline_model_parallel_size=place.layout.pipeline,
            context_parallel_size=place.layout.context,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)
        device = torch.device("meta")
        with mock.patch.object(cpu._CpuAsCuda, "current_device", return_value=device), device:
            yield platform
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def meta_model(recipe: Recipe, place: Place, platform: MetaPlatform) -> Any:
    """The rank's part of the model; drawing initial weights is left out, since there is nothing to fill."""
    from nano_pretrain.model import hybrid

    with mock.patch.object(hybrid, "initialise_weights"):
        return hybrid.build_model(recipe, place.layout, platform, LENGTH)


@dataclass(frozen=True)
class Bytes:
    """What the trainer allocates for a rank before its first step, and Adam in it."""

    weights: int
    gradients: int
    optimizer: int


def trainer_bytes(recipe: Recipe, place: Place) -> Bytes:
    """Bytes of the trainer's own wrapper and optimizer around the rank's part of the model."""
    from nano_pretrain.train.step import Trainable

    with fake_rank(place) as platform:
        model = meta_model(recipe, place, platform)
        trainable = Trainable(recipe, place.layout, platform, model)
        optimizer = trainable.optimizer
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            with platform.optimizer_scope():
                part.init_state_fn(part.optimizer, part.config)
        weights = _storages(model.parameters())
        gradients = _storages(buffer.grad_data for buffer in trainable.wrapped.buffers)
        kept = {key: size for key, size in _storages(_optimizer_tensors(optimizer)).items() if key not in weights}
        return Bytes(sum(weights.values()), sum(gradients.values()), sum(kept.values()))


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """Main weights, some of which are views of the parameters, and moments."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        yield from (parameter for group in part.optimizer.param_groups for parameter in group["params"])
        values = (value for state in part.optimizer.state.values() for value in state.values())
        yield from (value for value in values if isinstance(value, torch.Tensor))


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of each storage that the tensors view."""
    return {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
