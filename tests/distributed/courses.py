"""Courses: ten steps of training in a layout from weights that one rank wrote, with all that is compared with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nano_pretrain.checkpoint.sharded import load_checkpoint, sharded_state
from nano_pretrain.recipe.schema import ParallelConfig, Recipe
from tests.distributed.training import Run, Steps, groups, save_state

Mistake = Callable[[], AbstractContextManager[Any]]
SAVED, END = 3, 10
"""Steps after which a course saves; the first is where other layouts continue."""


@dataclass(frozen=True)
class Layout:
    """A layout of so many ranks.

    Attributes:
        ranks: all of them.
        parallel: what the recipe says; data parallelism is what is left.
        micro_batch: samples of a forward pass.
        kernels: `cluster.cpu_kernels`.
    """

    ranks: int
    parallel: ParallelConfig
    micro_batch: int = 2
    kernels: str = "auto"

    @property
    def data_parallel(self) -> int:
        """Ranks that read different samples."""
        return self.ranks // (self.parallel.tensor * self.parallel.pipeline * self.parallel.context)


@dataclass(frozen=True)
class Fed:
    """What the model of a rank was given.

    Attributes:
        place: this rank in its tensor-, pipeline-, context- and data-parallel group.
        tokens: arrays [batch, length / context-parallel ranks], one a forward pass.
        labels: as tokens.
        documents: [batch, length].
    """

    place: tuple[int, int, int, int]
    tokens: list[Any]
    labels: list[Any]
    documents: list[Any]


@dataclass(frozen=True)
class Course:
    """What a rank reports.

    Attributes:
        steps: of the training, equal on all ranks.
        copies_that_differ: parameters of which two ranks have copies with different bits at the end.
        fed: what its model was given.
    """

    steps: Steps
    copies_that_differ: list[str]
    fed: Fed


def write_start(recipe: Recipe, directory: Path) -> None:
    """One rank's weights, which are BF16 numbers in FP32: courses in both precisions begin with the same.

    They are not initial ones, of which norms and D are the same for all channels.

    Args:
        recipe: in FP32.
        directory: where they go.
    """
    import torch

    from nano_pretrain.model.hybrid import build_model

    layout = ParallelConfig()
    with groups(layout) as platform, torch.no_grad():
        model = build_model(recipe, layout, platform, 48)
        generator = torch.Generator().manual_seed(7)
        for parameter in model.parameters():
            away = parameter * (1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            parameter.copy_(away.bfloat16())
        save_state(sharded_state(model, None, loading=False), directory)


def take(
    recipe: Recipe, layout: Layout, start: Path, directory: Path, mistake: Mistake = nullcontext, end: int = END
) -> Course:
    """Train from the weights in `start`, with a mistake.

    Writes in `directory`: `initial`, the weights before those of `start` are loaded; `gradients` of the first step,
    unclipped; checkpoints after steps 3 and `end`.
    """
    with groups(layout.parallel, layout.kernels) as platform, mistake():
        run = Run(recipe, layout.parallel, platform, partial(_begin, start=start, initial=directory / "initial"))
        fed = _record(run.trainable.model)
        _save_next_gradients(run, directory / "gradients")
        first = run.train(SAVED)
        run.save(directory)
        last = run.train(end - SAVED)
        if end > SAVED:
            run.save(directory)
        steps = Steps(first.losses + last.losses, first.grad_norms + last.grad_norms)
        return Course(steps, _copies_that_differ(run.trainable.model), fed)


def resume(recipe: Recipe, layout: Layout, source: Path, directory: Path, begin: int, end: int) -> Steps:
    """Load the checkpoint `begin` in `source`, save it again in `directory`, train to step `end`, save."""
    with groups(layout.parallel, layout.kernels) as platform:
        run = Run(recipe, layout.parallel, platform)
        run.load(source, begin)
        run.save(directory)
        steps = run.train(end - begin)
        run.save(directory)
        return steps


def _begin(model: Any, start: Path, initial: Path) -> None:
    save_state(sharded_state(model, None, loading=False), initial)
    load_checkpoint(start, model, None)


def _record(model: Any) -> Fed:
    """What `model` is given from now on."""
    from megatron.core import parallel_state as state

    fed = Fed(
        (
            state.get_tensor_model_parallel_rank(),
            state.get_pipeline_model_parallel_rank(),
            state.get_context_parallel_rank(),
            state.get_data_parallel_rank(),
        ),
        [],
        [],
        [],
    )

    def record(module: Any, inputs: Any, others: Any) -> None:
        tokens, _, documents = inputs
        for found, given in ((fed.tokens, tokens), (fed.labels, others["labels"]), (fed.documents, documents)):
            found.append(given.numpy().copy())

    model.register_forward_pre_hook(record, with_kwargs=True)
    return fed


def _save_next_gradients(run: Run, path: Path) -> None:
    """Let the next step write its gradients, in the place of the weights, when they are summed and not yet clipped."""
    optimizer = run.trainable.optimizer
    step = optimizer.step

    def write_and_step() -> Any:
        optimizer.step = step
        _gather_gradients(run.trainable.wrapped)
        parameters = list(run.trainable.model.parameters())
        weights = [parameter.data for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.main_grad.to(parameter.dtype)
        save_state(sharded_state(run.trainable.model, None, loading=False), path)
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight
        return step()

    optimizer.step = write_and_step


def _gather_gradients(wrapped: Any) -> None:
    """Give every rank all gradients, of which the distributed optimizer leaves it a part of each bucket."""
    import torch.distributed as dist

    if not wrapped.ddp_config.use_distributed_optimizer:
        return
    group = wrapped.intra_dp_cp_group
    for buffer in wrapped.buffers:
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def _copies_that_differ(model: Any) -> list[str]:
    """Names of the parameters whose bits are not those of the other ranks that hold a copy of them."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as state

    hashes = {
        name: hashlib.sha256(p.detach().flatten().view(torch.uint8).numpy()).digest()
        for name, p in model.named_parameters()
    }
    sharded = {name for name, p in model.named_parameters() if getattr(p, "tensor_model_parallel", False)}
    differing: set[str] = set()
    for group, names in (
        (state.get_data_parallel_group(with_context_parallel=True), hashes.keys()),
        (state.get_tensor_model_parallel_group(), hashes.keys() - sharded),
    ):
        found: list[Any] = [None] * group.size()
        dist.all_gather_object(found, {name: hashes[name] for name in names}, group=group)
        differing |= {name for name in names if any(other[name] != hashes[name] for other in found)}
    return sorted(differing)
