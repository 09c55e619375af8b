"""What a measured run says about the predicted speed: one factor for all times."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from nano_pretrain.plan.device import Device
from nano_pretrain.plan.step_time import batch_time
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.load import recorded_recipe
from nano_pretrain.recipe.rules_ranks import check_batches, check_layout
from nano_pretrain.recipe.schema import Recipe


@dataclass(frozen=True)
class Calibration:
    """A measured run beside its prediction.

    Attributes:
        path: its metrics.jsonl.
        recipe: the recipe by which it is predicted, beside its metrics; None for the one that is planned.
        measured: stage -> tokens per second of its steps, each taken to be as fast as the median of its batch.
        predicted: stage -> tokens per second of these steps by the hardware's file alone.
        factor: measured time over predicted time of all its steps; every predicted time is multiplied by it.
    """

    path: str
    recipe: str | None
    measured: dict[str, float]
    predicted: dict[str, float]
    factor: float


def calibrate(recipe: Recipe, device: Device) -> Calibration | None:
    """Compare the run of `plan.metrics` with its prediction on the same hardware; None if no run is named.

    The run is predicted by the recipe beside its metrics, and by this one if there is none there.

    Raises:
        RecipeError: there are no measured steps of a stage of that recipe, or the run was on the other platform.
        UserError: the recipe beside the metrics cannot be read.
    """
    if recipe.plan.metrics is None:
        return None
    path = Path(recipe.plan.metrics)
    _check_platform(path, device)
    speeds: dict[tuple[str, int], list[float]] = {}
    for stage, batch, speed in _measured(path):
        speeds.setdefault((stage, batch), []).append(speed)
    recorded = path.with_name("recipe.yaml")
    stages = [stage for stage, _ in speeds]
    run = _measured_recipe(recipe, recorded.parent, stages) if recorded.exists() else recipe
    compared = {step: found for step, found in speeds.items() if _runs(run, *step)}
    if not compared:
        known = ", ".join(run.stages)
        raise RecipeError(
            "plan.metrics", f"{path} has no steps of {known} on their ranks", "write the metrics.jsonl of a run"
        )
    tokens, measured, predicted = (defaultdict[str, float](float) for _ in range(3))
    for (stage, batch), found in compared.items():
        size = batch * run.stages[stage].sequence_length
        tokens[stage] += len(found) * size
        measured[stage] += len(found) * size / median(found)
        predicted[stage] += len(found) * batch_time(run, stage, batch, device).total
    return Calibration(
        path=str(path),
        recipe=str(recorded) if recorded.exists() else None,
        measured={stage: tokens[stage] / measured[stage] for stage in tokens},
        predicted={stage: tokens[stage] / predicted[stage] for stage in tokens},
        factor=sum(measured.values()) / sum(predicted.values()),
    )


def _runs(run: Recipe, stage: str, batch: int) -> bool:
    """Whether a stage of the run goes with such a batch; its earlier steps may have been on other ranks."""
    if stage not in run.stages:
        return False
    try:
        check_batches(run, stage, [batch])
    except RecipeError:
        return False
    return True


def _measured(path: Path) -> Iterator[tuple[str, int, float]]:
    """Stage, samples and tokens per second of each step; lines that are torn are left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise RecipeError(
            "plan.metrics", f"{path} cannot be read ({error.strerror})", "write the metrics.jsonl of a run"
        ) from error
    for line in lines:
        try:
            record = json.loads(line)
            stage, batch = str(record["stage"]), int(record["global_batch_size"])
            speed = float(record["tokens_per_second"])
        except (ValueError, KeyError, TypeError):
            continue
        if batch > 0 and isfinite(speed) and speed > 0:
            yield stage, batch, speed


def _measured_recipe(recipe: Recipe, directory: Path, stages: list[str]) -> Recipe:
    """What was measured: that run's recipe under this recipe's assumptions.

    The run's environment is that of its last start: the last of `stages` ran on the ranks that it names.

    Raises:
        RecipeError: it cannot have run on them.
    """
    run = recorded_recipe(directory)
    run.plan = recipe.plan
    run.cluster.peak_tflops = recipe.cluster.peak_tflops
    ranks = _world(directory)
    last = stages[-1] if stages else ""
    if ranks is not None and last in run.stages:
        run.stages[last] = replace(run.stages[last], gpus=ranks)
        try:
            check_layout(run, last)
        except RecipeError as error:
            problem = f"{directory / 'environment.json'} names {ranks} ranks, on which {last} cannot have run ({error})"
            raise RecipeError("plan.metrics", problem, "restore that file, or remove it") from error
    return run


def _check_platform(metrics: Path, device: Device) -> None:
    """A run on a CPU says nothing about a GPU, nor the other way round; one that does not say is believed."""
    platform = _environment(metrics.parent).get("platform", device.platform)
    if platform != device.platform:
        raise RecipeError(
            "plan.metrics",
            f"{metrics} was measured on {platform}, and plan.hardware is {device.name}",
            "write the metrics.jsonl of a run on that hardware, or its plan.hardware",
        )


def _world(directory: Path) -> int | None:
    """Ranks of a run; None if it does not say."""
    try:
        return int(_environment(directory)["layout"]["world"])
    except (ValueError, KeyError, TypeError):
        return None


def _environment(directory: Path) -> dict[str, Any]:
    """The run's environment.json; empty if there is none."""
    try:
        found = json.loads((directory / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
