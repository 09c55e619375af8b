"""What a reader of the plan has to know: what does not fit, and what was assumed."""

from __future__ import annotations

from collections.abc import Iterator

from nano_pretrain.plan.calibration import Calibration
from nano_pretrain.plan.data import repetition_notes, short_phase_notes, short_text_notes, shorter_stage_notes
from nano_pretrain.plan.device import Device
from nano_pretrain.plan.room import without_room_on
from nano_pretrain.plan.whole import Plan
from nano_pretrain.recipe.rules_precision import LINEARS_PER_LAYER, fp8_layers
from nano_pretrain.recipe.schema import PlanConfig

NOT_COUNTED = (
    "launches of kernels, latencies, stragglers, loading of data, evaluation, clocks that fall with heat, restarts; in "
    "memory the CUDA context, NCCL's and cuBLAS's own and fragmentation, some gigabytes"
)


def notes(plan: Plan) -> list[str]:
    """One line each, warnings first."""
    assumed = assumptions(plan.device, plan.recipe.plan, plan.calibration)
    return [*warnings(plan), *_of_precision(plan), *_of_layouts(plan), *assumed]


def warnings(plan: Plan) -> Iterator[str]:
    """What speaks against the plan, or is missing for it."""
    for refusal in without_room_on(plan.device, plan.recipe):
        yield f"DOES NOT FIT: {refusal}"
    if any(report.layout.pipeline > 1 for report in plan.stages.values()):
        yield "the kernels and waits of a step are those of its slowest pipeline position, the rest is its bubble"
    if any(use.available is None for use in plan.data.sources.values()):
        yield f"no corpus is prepared at {plan.recipe.data.path}: epochs are not known"
    repeats = {name: use.repeats for name, use in plan.data.sources.items() if use.repeats}
    yield from repetition_notes(repeats, len(plan.data.sources))
    yield from short_text_notes(plan.data.long_text)
    yield from shorter_stage_notes(plan.data.curriculum)
    yield from short_phase_notes(plan.data.curriculum)


def _of_precision(plan: Plan) -> Iterator[str]:
    """How much of a model that is trained in FP8 is."""
    pattern, precision = plan.recipe.model.pattern, plan.recipe.precision
    if layers := len(fp8_layers(pattern, precision)):
        share = f"{LINEARS_PER_LAYER * layers} of {LINEARS_PER_LAYER * len(pattern)} linears in FP8"
        counted = ", counted as BF16 in time and memory: a CPU has no FP8 products"
        yield f"{precision.name}: {share}{counted if plan.device.platform == 'cpu' else ''}"


def _of_layouts(plan: Plan) -> Iterator[str]:
    """What the stages' layouts are assumed to do, and which of them the command line's `parallel` does not reach."""
    layouts = [report.layout for report in plan.stages.values()]
    for name, report in plan.stages.items():
        if len(report.batches) > 1:
            yield f"{name}'s batch grows: a step's seconds and bytes sent are the last ones'; days and MFU are of all"
    if plan.device.platform == "cuda" and any(layout.overlap for layout in layouts):
        yield "assumed: overlap hides gradients behind the last backward and parameters behind the first forward pass"
    if any(layout.tensor_overlap or layout.cuda_graphs for layout in layouts):
        yield "not counted: what tensor_overlap and cuda_graphs save, and the memory of their buffers"
    for name, report in plan.stages.items():
        if report.config.parallel is not None:
            yield f"{name} has a layout of its own, stages.{name}.parallel: what is written to parallel is not for it"


def assumptions(device: Device, settings: PlanConfig, calibration: Calibration | None) -> Iterator[str]:
    """What the predicted times rest on."""
    shares = ", ".join(f"{name} {share:g}" for name, share in device.shares.items() if device.tflops.get(name, 1))
    yield f"assumed: of {device.name}'s peaks kernels and collectives reach: {shares}"
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
    by = calibration.recipe or "this recipe, because no recipe.yaml lies beside it"
    speeds = f"tokens per second: {pairs}; predicted by {by}"
    return f"calibrated: all times x {calibration.factor:.3g} by {calibration.path} ({speeds})"
