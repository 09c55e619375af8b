"""The plan as one JSON object; docs/plan.md describes it. Seconds, bytes, FLOPs and tokens without prefixes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nano_pretrain.plan.cost import total_cost
from nano_pretrain.plan.device import Device
from nano_pretrain.plan.memory import RankMemory
from nano_pretrain.plan.search import Search
from nano_pretrain.plan.whole import Plan, StageReport
from nano_pretrain.recipe.flops import ModelFlops

FORMAT = 1
"""Raised when a name disappears or changes its meaning; new names may come at any time."""


def plan_document(plan: Plan, figure: str) -> dict[str, Any]:
    """Everything that the tables say, and what they round."""
    return {
        "format": FORMAT,
        "run": plan.recipe.run.name,
        "pretraining_of": plan.recipe.pretraining_of,
        "stand_ins": plan.recipe.stand_ins,
        "hardware": _hardware(plan.device),
        "calibration": asdict(plan.calibration) if plan.calibration else None,
        "parameters": {**asdict(plan.parameters), "total": plan.parameters.total},
        "stages": {name: _stage(plan, report) for name, report in plan.stages.items()},
        "sources": {name: asdict(source) for name, source in plan.data.sources.items()},
        "total": total_cost(report.cost for report in plan.stages.values()),
        "figure": figure,
    }


def _hardware(device: Device) -> dict[str, Any]:
    return device.as_dict()


def _stage(plan: Plan, report: StageReport) -> dict[str, Any]:
    stage, cost = report.stage, report.cost
    return {
        "devices": report.devices,
        "layout": {**asdict(report.layout), "data": report.data_parallel},
        "recompute": plan.recipe.recompute.granularity,
        "sequence_length": stage.sequence_length,
        "micro_batch_size": stage.micro_batch_size,
        "micro_batches": report.micro_batches,
        "global_batch_size": stage.global_batch_size,
        "batches": [asdict(batch) for batch in report.batches],
        "steps": cost.steps,
        "tokens": cost.tokens,
        "model_flops_per_token": _model_flops(report.model_flops),
        "executed_flops_per_token": {**report.executed, "training": sum(report.executed.values())},
        "layers_per_position": report.layers,
        "parameters_per_rank": [{**asdict(rank), "total": rank.total} for rank in report.parameters],
        "memory_per_rank": [_memory(rank) for rank in report.memory],
        "fits": report.fits,
        "sent_bytes_per_step": report.time.sent,
        "step_seconds": {**report.time.items, "total": report.time.total},
        "step_seconds_other_overlap": report.other_seconds,
        "tokens_per_second": cost.tokens_per_second,
        "mfu": next(iter(report.mfu.values())),
        "mfu_of_peak": report.mfu,
        "days": cost.days,
        "device_hours": cost.device_hours,
        "megawatt_hours": cost.megawatt_hours,
        "checkpoint": asdict(cost.checkpoints),
        "long_text": asdict(text) if (text := plan.data.long_text.get(stage.name)) else None,
        "phases": plan.data.tokens[stage.name],
    }


def _model_flops(flops: ModelFlops) -> dict[str, int]:
    """Of the forward pass by layer type, and of a training token."""
    return {**asdict(flops), "forward": flops.forward, "training": flops.training}


def _memory(rank: RankMemory) -> dict[str, Any]:
    return {**asdict(rank), "activations": rank.activations.total, "total": rank.total}


def search_document(searches: dict[str, Search], device: Device) -> dict[str, Any]:
    """Layouts that go, best first, the reasons against the others, and where the recipe's own is, by stage."""
    return {
        "format": FORMAT,
        "hardware": _hardware(device),
        "memory_compared": device.memory_bytes is not None,
        "stages": {name: asdict(search) for name, search in searches.items()},
    }
