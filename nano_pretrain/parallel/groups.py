"""Start and end of the process groups, and where this rank stands in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from nano_pretrain.platform import Platform
from nano_pretrain.recipe.schema import ParallelConfig


@dataclass(frozen=True)
class Ranks:
    """This process in the world, from the environment that torchrun, srun's wrapper and `launch` set."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what only one rank writes."""
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """RANK, WORLD_SIZE and LOCAL_RANK; a process started alone is a world of one."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    env = os.environ
    return Ranks(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")))


@contextmanager
def process_groups(platform: Platform, ranks: Ranks, layout: ParallelConfig, timeout_seconds: int) -> Iterator[None]:
    """torch.distributed and megatron-core's groups for `layout`; data parallelism is what is left of the world."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    timeout = timedelta(seconds=timeout_seconds)
    if ranks.world_size == 1:
        store = torch._C._distributed_c10d.HashStore()
        dist.init_process_group(platform.backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(platform.backend, timeout=timeout)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            context_parallel_size=layout.context,
            create_gloo_process_groups=platform.backend != "gloo",
            distributed_timeout_minutes=timeout_seconds / 60,
        )
        # Without dropout nothing is drawn from these; megatron-core wants the tracker to exist.
        model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def data_parallel_place() -> tuple[int, int]:
    """Rank and size in the data-parallel group, context parallelism not counted."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def context_parallel_place() -> tuple[int, int]:
    """Rank and size in the context-parallel group."""
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()


def all_ranks_max(value: float, device: torch.device) -> float:
    """Largest `value` of all ranks: how they agree on a flag."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def reports_loss() -> bool:
    """Whether this rank's loss counts: last pipeline stage, first tensor-parallel rank."""
    from megatron.core import parallel_state

    return bool(parallel_state.is_pipeline_last_stage()) and parallel_state.get_tensor_model_parallel_rank() == 0
