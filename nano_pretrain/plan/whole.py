"""The plan of a recipe: what it is, what it needs of each rank, how long it takes and what it reads."""

from __future__ import annotations

from dataclasses import dataclass

from nano_pretrain.data.curriculum import StagePlan
from nano_pretrain.plan.blocks import executed_flops
from nano_pretrain.plan.calibration import Calibration, calibrate
from nano_pretrain.plan.cost import Cost, stage_cost
from nano_pretrain.plan.data import DataPlan, plan_data
from nano_pretrain.plan.device import Device, load_device
from nano_pretrain.plan.flops import ModelFlops, count_flops
from nano_pretrain.plan.memory import RankMemory, stage_memory
from nano_pretrain.plan.params import ParameterCount, count_parameters
from nano_pretrain.plan.ranks import RankParameters, pipeline_parts, rank_parameters
from nano_pretrain.plan.step_time import StepTime, step_time
from nano_pretrain.plan.work import plain_format
from nano_pretrain.platform.cuda_limits import check_scan
from nano_pretrain.recipe.derived import stage_layout, stage_ranks
from nano_pretrain.recipe.schema import ParallelConfig, Recipe, StageConfig


@dataclass(frozen=True)
class StageReport:
    """One stage on the chosen hardware.

    Attributes:
        stage: on the clock of the run.
        layout: of its ranks.
        devices: its ranks.
        model_flops: of a token, forward, by layer type.
        executed: FLOPs that kernels execute for a training token, by item.
        parameters: of a rank of each pipeline position.
        memory: of a rank of each pipeline position.
        fits: whether all of them have room; None if the hardware's memory is not known.
        time: of a step, calibrated.
        cost: of the stage.
        peak_flops: dense peak of all ranks in the format that `mfu` refers to.
    """

    stage: StagePlan
    layout: ParallelConfig
    devices: int
    model_flops: ModelFlops
    executed: dict[str, float]
    parameters: list[RankParameters]
    memory: list[RankMemory]
    fits: bool | None
    time: StepTime
    cost: Cost
    peak_flops: float

    @property
    def config(self) -> StageConfig:
        """The stage in the recipe."""
        return self.stage.config

    @property
    def data_parallel(self) -> int:
        """Copies of the model."""
        return self.devices // (self.layout.tensor * self.layout.context * self.layout.pipeline)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a rank in a step."""
        return self.stage.global_batch_size // (self.data_parallel * self.stage.micro_batch_size)

    @property
    def mfu(self) -> float:
        """Model FLOPs over the dense peak of the parameters' format, as in metrics.jsonl."""
        return self.cost.tokens_per_second * self.model_flops.training / self.peak_flops


@dataclass(frozen=True)
class Plan:
    """All that `plan` says of a recipe."""

    recipe: Recipe
    device: Device
    calibration: Calibration | None
    parameters: ParameterCount
    stages: dict[str, StageReport]
    data: DataPlan


def make_plan(recipe: Recipe) -> Plan:
    """Plan a checked recipe.

    Raises:
        UserError: hardware, metrics or corpus are not what they should be, the curriculum is wrong, or a stage is too
            long for a GPU's kernels.
    """
    device = load_device(recipe)
    if device.platform == "cuda":
        for name in recipe.stages:
            check_scan(recipe, name)
    data = plan_data(recipe)
    calibration = calibrate(recipe, device)
    factor = calibration.factor if calibration else 1.0
    return Plan(
        recipe=recipe,
        device=device,
        calibration=calibration,
        parameters=count_parameters(recipe.model),
        stages={stage.name: _report(recipe, stage, device, factor) for stage in data.curriculum.stages},
        data=data,
    )


def _report(recipe: Recipe, stage: StagePlan, device: Device, factor: float) -> StageReport:
    layout, devices = stage_layout(recipe, stage.config), stage_ranks(recipe, stage.config)
    memory = stage_memory(recipe, stage.name, platform=device.platform)
    time = step_time(recipe, stage.name, device).scaled(factor)
    return StageReport(
        stage=stage,
        layout=layout,
        devices=devices,
        model_flops=count_flops(recipe.model, stage.sequence_length),
        executed=executed_flops(recipe, stage.name, device.platform),
        parameters=[rank_parameters(recipe.model, layout, part) for part in pipeline_parts(recipe.model, layout)],
        memory=memory,
        fits=fits(memory, device),
        time=time,
        cost=stage_cost(recipe, stage, time.total, device),
        peak_flops=devices * device.peak(plain_format(recipe.precision)),
    )


def fits(memory: list[RankMemory], device: Device) -> bool | None:
    """Whether every rank has room; None if the device's memory is not known."""
    if device.memory_bytes is None:
        return None
    return max(rank.total for rank in memory) <= device.memory_bytes
