"""Comparing checkpoints tensor by tensor, and courses with one rank's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nano_pretrain.recipe.schema import ParallelConfig
from tests.distributed.training import groups

Differences = dict[str, float]


def differences(pairs: Sequence[tuple[Path, Path]]) -> list[Differences]:
    """Relative difference in norm of each whole tensor of two checkpoints; infinite if it is missing in one.

    What replicated optimizer state does not hold, the FP32 copy of FP32 weights, is left out.

    Args:
        pairs: the checkpoint that is right, and the other.
    """
    with groups(ParallelConfig()):
        return [_differences(_tensors(expected), _tensors(actual)) for expected, actual in pairs]


def _tensors(path: Path) -> dict[str, Any]:
    import torch
    from megatron.core import dist_checkpointing

    loaded: dict[str, Any] = dist_checkpointing.load_plain_tensors(str(path))
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def _differences(expected: dict[str, Any], actual: dict[str, Any]) -> Differences:
    if not any(".param." in name for name in actual):
        expected = {name: value for name, value in expected.items() if ".param." not in name}
    result = dict.fromkeys(expected.keys() ^ actual.keys(), float("inf"))
    for name in expected.keys() & actual.keys():
        difference = (expected[name].double() - actual[name].double()).norm()
        result[name] = float(difference / expected[name].double().norm()) if difference else 0.0
    return result
