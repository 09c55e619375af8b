"""Seconds of one optimizer step: a roofline of the rank's kernels, what it waits for, pipeline bubble, optimizer.

A kernel takes the longer of its FLOPs at the rate it reaches and its bytes at the memory's (Williams et al. 2009). A
collective that runs behind a kernel costs what it takes longer than that kernel. Micro-batches go through the pipeline
one forward, one backward (Narayanan et al. 2021, arXiv 2104.04473): with m of them and t_i seconds for one at position
i, sum t_i + (m - 1) max t_i, of which m max t_i is work and the rest the bubble. After the last one gradients are
reduced, the optimizer steps and parameters are gathered.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from nano_pretrain.plan.blocks import LAYER_ITEMS, VOCABULARY, Block, Run, blocks
from nano_pretrain.plan.communication import (
    Transfer,
    groups,
    parameter_bytes,
    pipeline_transfers,
    step_transfers,
    sum_by_kind,
)
from nano_pretrain.plan.device import Device
from nano_pretrain.plan.ranks import Part, pipeline_parts, rank_parameters
from nano_pretrain.plan.work import BYTES, total_seconds, work_of
from nano_pretrain.recipe.derived import stage_layout, stage_ranks
from nano_pretrain.recipe.schema import ParallelConfig, Recipe

ITEMS = (*LAYER_ITEMS.values(), VOCABULARY, "recomputation", "tensor", "context", "pipeline", "bubble", "gradients",
         "parameters", "optimizer")  # fmt: skip
"""What a step is made of: kernels by layer type, those that run again, waiting for others by group, the pipeline's
bubble, and what follows the last micro-batch."""

ADAM_BYTES = 44
"""Bytes moved for each parameter of a shard, all FP32: gradient for its norm (4) and clipping (8), then gradient (4),
main parameter (8) and both moments (16), read and written, and what the copy to the model reads (4)."""

BACKWARD_SHARE = 2 / 3
"""Of a micro-batch: two products for one of the forward pass."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        items: seconds by item of `ITEMS`; kernels and waiting are those of the slowest pipeline position.
        sent: kind of collective -> bytes that a rank sends in a step, of the position that sends most of the kind.
    """

    items: dict[str, float]
    sent: dict[str, float]

    @property
    def total(self) -> float:
        """All items."""
        return sum(self.items.values())

    def scaled(self, factor: float) -> StepTime:
        """With every time multiplied."""
        return StepTime({item: factor * seconds for item, seconds in self.items.items()}, self.sent)


def step_time(recipe: Recipe, stage_name: str, device: Device) -> StepTime:
    """Predicted time of a step of a stage, and what is sent in it.

    Raises:
        RecipeError: the device cannot compute in the recipe's format.
    """
    stage = recipe.stages[stage_name]
    parts = pipeline_parts(recipe.model, stage_layout(recipe, stage), stage.sequence_length)
    positions = [_Position(recipe, stage_name, device, part) for part in parts]
    slowest = max(positions, key=lambda position: position.seconds)
    items = {item: slowest.micro_batches * slowest.micro_batch.get(item, 0.0) for item in ITEMS}
    items["bubble"] = sum(position.seconds for position in positions) - slowest.seconds
    after = [position.after() for position in positions]
    items |= after[max(range(len(after)), key=lambda index: sum(after[index].values()))]
    sent = [position.sent() for position in positions]
    kinds = dict.fromkeys(kind for found in sent for kind in found)
    return StepTime(items, {kind: max(found.get(kind, 0.0) for found in sent) for kind in kinds})


def batch_time(recipe: Recipe, stage_name: str, batch: int, device: Device) -> StepTime:
    """As `step_time`, of a step of `batch` samples: that of a stage whose batch changes."""
    stage = replace(recipe.stages[stage_name], global_batch_size=batch)
    return step_time(replace(recipe, stages={stage_name: stage}), stage_name, device)


class _Position:
    """The ranks of one pipeline position.

    Args:
        recipe: the recipe.
        stage_name: a stage of it.
        device: the hardware.
        part: the layers of the position.

    Attributes:
        micro_batches: of a step.
        micro_batch: seconds of one by item.
        seconds: of one.
    """

    def __init__(self, recipe: Recipe, stage_name: str, device: Device, part: Part) -> None:
        self.recipe, self.device, self.part = recipe, device, part
        stage = recipe.stages[stage_name]
        self.layout: ParallelConfig = stage_layout(recipe, stage)
        data_parallel = stage_ranks(recipe, stage) // (self.layout.tensor * self.layout.context * self.layout.pipeline)
        self.groups = groups(self.layout, data_parallel)
        self.micro_batches = stage.global_batch_size // (data_parallel * stage.micro_batch_size)
        work = work_of(recipe.model, recipe.precision, stage, self.layout, device.platform)
        self.blocks = list(blocks(recipe, work, part, self.layout.sequence))
        self.between = pipeline_transfers(work, part, self.layout.pipeline)
        self.last = step_transfers(recipe, self.layout, part, device.platform, self.groups["data"].size)
        self.micro_batch = self._micro_batch()
        self.seconds = sum(self.micro_batch.values())

    def _micro_batch(self) -> dict[str, float]:
        seconds = dict.fromkeys(ITEMS, 0.0)
        for block in self.blocks:
            self._compute(seconds, block)
            for run in block.runs:
                self._wait(seconds, block.count, run)
        self._wait(seconds, 1, Run(transfers=self.between))
        return seconds

    def _compute(self, seconds: dict[str, float], block: Block) -> None:
        once = block.forward.kernels + block.backward.kernels
        seconds[block.item] += block.count * total_seconds(once, self.device)
        seconds["recomputation"] += block.count * total_seconds(block.repeated.kernels, self.device)

    def _wait(self, seconds: dict[str, float], count: int, run: Run) -> None:
        for transfer in run.transfers:
            hidden = total_seconds((kernel for kernel in run.kernels if kernel.name == transfer.behind), self.device)
            exposed = transfer.seconds(self.groups[transfer.group], self.device) - hidden
            seconds[transfer.group] += count * max(0.0, exposed)

    def after(self) -> dict[str, float]:
        """Seconds of what follows the last micro-batch, by item.

        With `parallel.overlap` gradients have the time of the last backward pass, parameters that of the first forward
        pass; on a CPU nothing is gained, where the cores that compute also copy what is sent.
        """
        hides = self.layout.overlap and self.device.platform == "cuda"
        shares = {"gradients": BACKWARD_SHARE, "parameters": 1 - BACKWARD_SHARE}
        seconds = {"gradients": 0.0, "parameters": 0.0, "optimizer": self._optimizer()}
        for transfer in self.last:
            item = transfer.kind.rpartition(" ")[2]
            window = shares[item] * self.seconds if hides else 0.0
            seconds[item] += max(0.0, transfer.seconds(self.groups[transfer.group], self.device) - window)
        return seconds

    def _optimizer(self) -> float:
        """Zeroing the gradients, Adam on this rank's shard, writing its parameters."""
        parameters = rank_parameters(self.recipe.model, self.layout, self.part).total
        shards = self.groups["data"].size if self.layout.distributed_optimizer else 1
        written = parameter_bytes(self.recipe, self.layout, self.part, self.device.platform)
        moved = BYTES["fp32"] * parameters + (ADAM_BYTES * parameters + written) / shards
        return moved / self.device.memory_rate

    def sent(self) -> dict[str, float]:
        """Bytes that a rank sends in a step, by kind."""
        each: Iterable[Transfer] = (
            transfer for block in self.blocks for run in block.runs for transfer in block.count * run.transfers
        )
        found = sum_by_kind([*each, *self.between])
        return {kind: self.micro_batches * size for kind, size in found.items()} | sum_by_kind(self.last)
