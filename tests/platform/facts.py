"""What a rank, a fresh process in which megatron-core is imported and not yet adapted, finds out about adaptations."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from nano_pretrain.parallel.groups import process_groups, ranks_from_environment
from nano_pretrain.platform import cpu, current_platform
from nano_pretrain.recipe.schema import ParallelConfig
from tests.platform.leaving_out import Outcome, run_without


@dataclass(frozen=True)
class WholeRun:
    """What the CPU platform left behind after a whole run.

    Attributes:
        outcome: the run.
        changed: attributes of torch, torch.cuda, torch.Tensor and the like that are not what they were.
        refused: the error of a tensor on the device "cuda".
        generator_moved: whether torch's CPU generator is in another state.
        queued_calls: how many calls more wait for CUDA to start.
    """

    outcome: Outcome
    changed: list[str]
    refused: str
    generator_moved: bool
    queued_calls: int


def whole_run(directory: Path) -> WholeRun:
    """Run with all adaptations, and compare torch with what it was before."""
    import torch

    spaces: tuple[Any, ...] = (
        torch,
        torch.Tensor,
        torch.cuda,
        torch.cuda.random,
        torch.random,
        torch.nn.functional,
        torch.distributed,
    )
    before = [dict(vars(space)) for space in spaces]
    state, queued = torch.get_rng_state(), len(torch.cuda._queued_calls)
    outcome = run_without(None, directory)
    changed = [
        f"{space.__name__}.{name}"
        for space, values in zip(spaces, before, strict=True)
        for name, value in values.items()
        if vars(space).get(name) is not value
    ]
    moved = not torch.equal(torch.get_rng_state(), state)
    return WholeRun(outcome, changed, _refusal(torch), moved, len(torch.cuda._queued_calls) - queued)


def _refusal(torch: Any) -> str:
    try:
        torch.tensor([1.0], device="cuda")
    except (AssertionError, RuntimeError) as error:
        return str(error)
    return "none"


def replaced_names() -> dict[str, list[tuple[str, str]]]:
    """Module and name of everything that each adaptation sets, in the order of `ADAPTATIONS`."""
    view: ModuleType = cpu._CpuTorch()
    found = {}
    for adaptation in cpu.ADAPTATIONS:
        before = _megatron_names()
        adaptation(view)
        found[adaptation.__name__] = _changes(before)
    return found


def _megatron_names() -> dict[str, dict[str, Any]]:
    return {name: dict(vars(module)) for name, module in sys.modules.items() if name.startswith("megatron.core")}


def _changes(before: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Module and name of what is new or another object now."""
    return [
        (module, key)
        for module, names in before.items()
        for key, value in vars(sys.modules[module]).items()
        if key not in names or names[key] is not value
    ]


def modules_with_plain_torch() -> list[str]:
    """Modules of megatron-core whose `torch` is not the view, after the adaptation."""
    import torch

    cpu.adapt_megatron()
    return [
        name
        for name, module in sys.modules.items()
        if name.startswith("megatron.core") and module.__dict__.get("torch") is torch
    ]


@dataclass(frozen=True)
class Tracker:
    """The RNG tracker's generator in a fork.

    Attributes:
        switched: whether a fork draws from a generator of its own.
        restored: whether the one outside is untouched after it.
        cpu_untouched: whether torch's CPU generator stayed where it was, seeding included.
        queued_calls: calls that wait for CUDA to start, because of it.
    """

    switched: bool
    restored: bool
    cpu_untouched: bool
    queued_calls: int


def rng_tracker(without: str | None) -> Tracker:
    """Fork the tracker, with all adaptations but one."""
    import torch

    cpu.ADAPTATIONS = tuple(adaptation for adaptation in cpu.ADAPTATIONS if adaptation.__name__ != without)
    queued, cpu_state = len(torch.cuda._queued_calls), torch.get_rng_state()
    platform = current_platform()
    platform.prepare(0, threads=1)
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    with process_groups(platform, ranks_from_environment(), ParallelConfig(), timeout_seconds=60):
        outside = random.torch.cuda.get_rng_state()
        with random.get_cuda_rng_tracker().fork():
            switched = not torch.equal(random.torch.cuda.get_rng_state(), outside)
        restored = torch.equal(random.torch.cuda.get_rng_state(), outside)
    untouched = torch.equal(torch.get_rng_state(), cpu_state)
    return Tracker(switched, restored, untouched, len(torch.cuda._queued_calls) - queued)


def collectives_of_a_step(without: str | None) -> set[str]:
    """Which kinds of collective between a buffer and its parts one step calls, with all adaptations but one."""
    from torch.profiler import profile

    from nano_pretrain.train.step import Trainable
    from tests.model.building import batch, build
    from tests.model.recipes import small_recipe

    cpu.ADAPTATIONS = tuple(adaptation for adaptation in cpu.ADAPTATIONS if adaptation.__name__ != without)
    platform, recipe = current_platform(), small_recipe("bf16")
    platform.prepare(0, threads=1)
    with process_groups(platform, ranks_from_environment(), recipe.parallel, timeout_seconds=60):
        trainable = Trainable(recipe, recipe.parallel, platform, build(platform, recipe))
        with profile() as profiler:
            trainable.step(iter([batch(recipe, seed=0)]), 1, (48, 2), lr=1e-2, stop=False)
    called = [event.key.replace("allgather", "all_gather") for event in profiler.key_averages()]
    return {kind for kind in ("reduce_scatter", "all_gather") if any(f"c10d::{kind}" in name for name in called)}


def platform_where_cuda_exists() -> tuple[str, list[str]]:
    """The platform's name, and which names of megatron-core it changed, where torch says that there is a GPU."""
    import torch

    torch.cuda.is_available = lambda: True
    before = _megatron_names()
    name = current_platform().name
    return name, [f"{module}.{key}" for module, key in _changes(before)]


def threads_of_a_rank(threads: int | None, local_ranks: int) -> int:
    """Threads after `prepare`."""
    import torch

    os.environ["LOCAL_WORLD_SIZE"] = str(local_ranks)
    current_platform().prepare(0, threads)
    return torch.get_num_threads()
