"""What a reader of the plan has to know: what does not fit, and what was assumed."""

from __future__ import annotations

from collections.abc import Iterator

from nano_pretrain.plan.calibration import Calibration
from nano_pretrain.plan.device import Device
from nano_pretrain.plan.whole import Plan
from nano_pretrain.recipe.schema import PlanConfig

NOT_COUNTED = (
    "launches of kernels, latencies, stragglers, loading of data, evaluation, clocks that fall with heat, restarts; in "
    "memory the CUDA context, NCCL's and cuBLAS's own and fragmentation, some gigabytes"
)


def notes(plan: Plan) -> list[str]:
    """One line each, warnings first."""
    return [*warnings(plan), *assumptions(plan.device, plan.recipe.plan, plan.calibration)]


def warnings(plan: Plan) -> Iterator[str]:
    """What speaks against the plan, or is missing for it."""
    for report in plan.stages.values():
        if report.fits is False:
            need = max(rank.total for rank in report.memory) / 1e9
            has = f"{plan.device.name} has {plan.device.memory_gigabytes:g} GB"
            yield f"DOES NOT FIT: {report.stage.name} needs {need:.1f} GB on its largest rank, {has}"
    if any(use.available is None for use in plan.data.sources.values()):
        yield f"no corpus is prepared at {plan.recipe.data.path}: epochs are not known"


def assumptions(device: Device, settings: PlanConfig, calibration: Calibration | None) -> Iterator[str]:
    """What the predicted times rest on."""
    shares = ", ".join(f"{name} {share:g}" for name, share in device.shares.items())
    yield f"assumed: of {device.name}'s peaks kernels and collectives reach: {shares}"
    overlap = "reduces gradients and gathers parameters" + (" meanwhile" if settings.overlap else " afterwards")
    yield f"assumed: a step {overlap} (plan.overlap={str(settings.overlap).lower()})"
    yield f"assumed: {settings.storage_gigabytes_per_second:g} GB/s to write checkpoints; {device.watts:g} W a device"
    yield f"not counted: {NOT_COUNTED}"
    yield _calibrated(calibration)


def _calibrated(calibration: Calibration | None) -> str:
    if calibration is None:
        return "not calibrated: plan.metrics=RUN/metrics.jsonl scales all times by a measured run"
    pairs = ", ".join(
        f"{stage} {speed:,.0f} measured, {calibration.predicted[stage]:,.0f} predicted"
        for stage, speed in calibration.measured.items()
    )
    return f"calibrated: all times x {calibration.factor:.3g} by {calibration.path} (tokens per second: {pairs})"
