"""The plan of a recipe: what it is, what it needs of each rank, how long it takes and what it reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nano_pretrain.data.course import step_batches
from nano_pretrain.data.stage_plan import StagePlan
from nano_pretrain.plan.blocks import executed_flops
from nano_pretrain.plan.calibration import Calibration, calibrate
from nano_pretrain.plan.cost import Cost, stage_cost
from nano_pretrain.plan.data import DataPlan, plan_data
from nano_pretrain.plan.device import Device, check_platform, load_device
from nano_pretrain.plan.memory import RankMemory, stage_memory
from nano_pretrain.plan.params import ParameterCount, count_parameters
from nano_pretrain.plan.ranks import RankParameters, pipeline_parts, rank_parameters
from nano_pretrain.plan.step_time import StepTime, batch_time, step_time
from nano_pretrain.plan.work import layer_format, plain_format
from nano_pretrain.recipe.derived import stage_layout, stage_ranks
from nano_pretrain.recipe.flops import ModelFlops, count_flops
from nano_pretrain.recipe.rules_ranks import check_batches
from nano_pretrain.recipe.schema import ParallelConfig, Recipe, StageConfig


@dataclass(frozen=True)
class Batch:
    """Steps of one size.

    Attributes:
        global_batch_size: samples of each.
        micro_batches: of a rank in each.
        steps: how many.
        step_seconds: of one, calibrated.
    """

    global_batch_size: int
    micro_batches: int
    steps: int
    step_seconds: float


@dataclass(frozen=True)
class StageReport:
    """One stage on the chosen hardware.

    Attributes:
        stage: on the clock of the run.
        layout: of its ranks.
        devices: its ranks.
        model_flops: of a token, forward, by layer type.
        executed: FLOPs that kernels execute for a training token, by item.
        layers: how many each pipeline position holds.
        parameters: of a rank of each pipeline position.
        memory: of a rank of each pipeline position.
        fits: whether all of them have room; None if the hardware's memory is not known.
        batches: all of its steps, in order.
        time: of one of its last steps, which are the largest, calibrated.
        other_seconds: of such a step with the other `parallel.overlap`, calibrated.
        cost: of the stage.
        peaks: format -> dense peak of all ranks in FLOP/s: the parameters' format, and FP8 if linears multiply in it.
    """

    stage: StagePlan
    layout: ParallelConfig
    devices: int
    model_flops: ModelFlops
    executed: dict[str, float]
    layers: list[int]
    parameters: list[RankParameters]
    memory: list[RankMemory]
    fits: bool | None
    batches: list[Batch]
    time: StepTime
    other_seconds: float
    cost: Cost
    peaks: dict[str, float]

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
        """Micro-batches of a rank in one of the last steps."""
        return self.batches[-1].micro_batches

    @property
    def mfu(self) -> dict[str, float]:
        """Model FLOPs over each of `peaks`; the first is that of metrics.jsonl."""
        speed = self.cost.tokens_per_second * self.model_flops.training
        return {name: speed / peak for name, peak in self.peaks.items()}


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
        UserError: hardware, metrics or corpus are not what they should be, the curriculum is wrong, or the
            hardware has no kernels for a stage.
    """
    device = load_device(recipe)
    for name in recipe.stages:
        check_platform(recipe, name, device)
        check_batches(recipe, name, step_batches(name, recipe.stages[name]))
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
    parts = pipeline_parts(recipe.model, layout, stage.sequence_length)
    memory = stage_memory(recipe, stage.name, platform=device.platform)
    batches = _batches(recipe, stage, device, factor)
    other = replace(stage.config, parallel=replace(layout, overlap=not layout.overlap))
    return StageReport(
        stage=stage,
        layout=layout,
        devices=devices,
        model_flops=count_flops(recipe.model, stage.sequence_length),
        executed=executed_flops(recipe, stage.name, device.platform),
        layers=[len(part.layers) for part in parts],
        parameters=[rank_parameters(recipe.model, layout, part) for part in parts],
        memory=memory,
        fits=fits(memory, device),
        batches=batches,
        time=step_time(recipe, stage.name, device).scaled(factor),
        other_seconds=factor * step_time(replace(recipe, stages={stage.name: other}), stage.name, device).total,
        cost=stage_cost(recipe, stage, sum(batch.steps * batch.step_seconds for batch in batches), device),
        peaks={name: devices * device.peak(name) for name in _formats(recipe, device)},
    )


def _batches(recipe: Recipe, stage: StagePlan, device: Device, factor: float) -> list[Batch]:
    layout = stage_layout(recipe, stage.config)
    copies = stage_ranks(recipe, stage.config) // (layout.tensor * layout.context * layout.pipeline)
    found = []
    for size, steps in stage.clock.runs:
        samples = size // stage.sequence_length
        seconds = factor * batch_time(recipe, stage.name, samples, device).total
        found.append(Batch(samples, samples // (copies * stage.micro_batch_size), steps, seconds))
    return found


def _formats(recipe: Recipe, device: Device) -> list[str]:
    """The parameters' format, then what else linears multiply in."""
    layers = range(len(recipe.model.pattern))
    of_layers = (layer_format(recipe.model, recipe.precision, layer, device.platform) for layer in layers)
    return list(dict.fromkeys([plain_format(recipe.precision), *of_layers]))


def fits(memory: list[RankMemory], device: Device) -> bool | None:
    """Whether every rank has room; None if the device's memory is not known."""
    if device.memory_bytes is None:
        return None
    return max(rank.total for rank in memory) <= device.memory_bytes
