"""Days, device hours, energy and checkpoints of a stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nano_pretrain.data.stage_plan import StagePlan
from nano_pretrain.plan.device import Device
from nano_pretrain.plan.ranks import rank_tensors, whole_model
from nano_pretrain.recipe.derived import parameter_dtype, stage_ranks
from nano_pretrain.recipe.schema import ParallelConfig, Recipe

DAY = 86_400
MOMENTS_BYTES = 8
MAIN_BYTES = 4


@dataclass(frozen=True)
class Checkpoints:
    """What a stage writes.

    Attributes:
        bytes: of one.
        seconds: to write one, while the ranks wait.
        count: how many the stage writes.
    """

    bytes: int
    seconds: float
    count: int


@dataclass(frozen=True)
class Cost:
    """What a stage costs.

    Attributes:
        steps: optimizer steps.
        tokens: tokens of these.
        devices: ranks.
        checkpoints: what it writes.
        seconds: steps and checkpoints.
        megawatt_hours: of the devices at full power over this time, nothing around them.
    """

    steps: int
    tokens: int
    devices: int
    checkpoints: Checkpoints
    seconds: float
    megawatt_hours: float

    @property
    def days(self) -> float:
        """Wall-clock time in days."""
        return self.seconds / DAY

    @property
    def device_hours(self) -> float:
        """Hours over all ranks."""
        return self.seconds * self.devices / 3600

    @property
    def written_bytes(self) -> int:
        """Of all its checkpoints."""
        return self.checkpoints.bytes * self.checkpoints.count

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks, during a step."""
        return self.tokens / (self.seconds - self.checkpoints.count * self.checkpoints.seconds)


def total_cost(costs: Iterable[Cost]) -> dict[str, float]:
    """What stages cost together, one after the other."""
    stages = list(costs)
    names = ("steps", "tokens", "seconds", "days", "device_hours", "megawatt_hours", "written_bytes")
    return {name: sum(getattr(cost, name) for cost in stages) for name in names}


def stage_cost(recipe: Recipe, stage: StagePlan, training_seconds: float, device: Device) -> Cost:
    """Cost of a stage whose steps take `training_seconds` together."""
    devices = stage_ranks(recipe, stage.config)
    checkpoints = _checkpoints(recipe, stage)
    seconds = training_seconds + checkpoints.count * checkpoints.seconds
    return Cost(
        steps=stage.steps,
        tokens=stage.end_tokens - stage.start_tokens,
        devices=devices,
        checkpoints=checkpoints,
        seconds=seconds,
        megawatt_hours=seconds * devices * device.watts / 3600 / 1e6,
    )


def _checkpoints(recipe: Recipe, stage: StagePlan) -> Checkpoints:
    """One every `checkpoint.every` steps of the run, and one at the end of the stage."""
    size = checkpoint_bytes(recipe)
    last, every = stage.first_step + stage.steps, recipe.checkpoint.every
    count = 1 if not every else last // every - stage.first_step // every + (last % every > 0)
    return Checkpoints(size, size / recipe.plan.storage_gigabytes_per_second / 1e9, count)


def checkpoint_bytes(recipe: Recipe) -> int:
    """Bytes of one checkpoint: parameters in their format, both moments, and FP32 main parameters.

    Without the distributed optimizer (FP32 only) there are no main parameters beside the parameters. Names and indices
    add less than a percent to anything but toys.
    """
    model = recipe.model
    width = 4 if parameter_dtype(recipe.precision) == "float32" else 2
    state = MOMENTS_BYTES + (MAIN_BYTES if recipe.parallel.distributed_optimizer else 0)
    return sum(
        tensor.elements * (state + (4 if tensor.kept_fp32 else width))
        for tensor in rank_tensors(model, ParallelConfig(), whole_model(model))
    )
