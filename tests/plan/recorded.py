"""Collectives of one training step, as torch hands them to gloo."""

from __future__ import annotations

from collections import Counter
from typing import Any

from nano_pretrain.recipe.schema import ParallelConfig, Recipe
from tests.distributed.training import Run, groups

OPERATIONS = {
    "c10d::_allgather_base_": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "c10d::allreduce_": "all-reduce",
    "c10d::allreduce_coalesced_": "all-reduce",
    "c10d::allgather_into_tensor_coalesced_": "all-gather",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "c10d::alltoall_base_": "all-to-all",
    "c10d::send": "send",
}
SILENT = ("c10d::recv_", "c10d::broadcast_", "c10d::barrier")
"""What sends nothing, or a few bytes."""


def bytes_handed_over(recipe: Recipe, layout: ParallelConfig) -> dict[str, int]:
    """Bytes of the whole tensors of each kind of collective in the second step of this rank; the first sets up."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found: Counter[str] = Counter()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function._schema.name
            if name.startswith("c10d::") and name not in SILENT and _group_size(args) > 1:
                # An operation that is not known fails the test by its name.
                found[OPERATIONS.get(name, name)] += max(_bytes(argument) for argument in args[:2])
            return function(*args, **(kwargs or {}))

    with groups(layout) as platform:
        run = Run(recipe, layout, platform)
        run.train(1)
        with Recorder():  # type: ignore[no-untyped-call]
            run.train(1)
    return dict(found)


def _group_size(arguments: Any) -> int:
    import torch
    import torch.distributed as dist

    found = [argument for argument in arguments if isinstance(argument, torch.ScriptObject)]
    return max((dist.ProcessGroup.unbox(group).size() for group in found[:1]), default=2)


def _bytes(argument: Any) -> int:
    """Of a tensor, or of all in a list."""
    import torch

    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument)) if isinstance(argument, (list, tuple)) else 0
