"""What of the GPU benchmark can be shown without a GPU: its models go on one, and it measures nothing here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from nano_pretrain.platform.cuda_limits import CudaFacts, check_cuda
from nano_pretrain.recipe.errors import EXIT_USER_ERROR
from nano_pretrain.recipe.pattern import count_layers
from nano_pretrain.recipe.schema import StageConfig


@pytest.mark.parametrize("name", gpu.PATTERNS)
def test_the_models_go_on_a_gpu(name: str) -> None:
    recipe = gpu.recipe_of(gpu.PATTERNS[name])
    assert recipe.model.hidden_size == 4480
    recipe.stages["pretrain"] = StageConfig(sequence_length=gpu.LENGTH, micro_batch_size=gpu.BATCH)
    check_cuda(recipe, CudaFacts((9, 0), (12, 9)))


def test_the_mixed_model_has_every_kind() -> None:
    counts = count_layers(gpu.PATTERNS["as the 9B"])
    assert counts.mamba
    assert counts.feed_forward
    assert counts.attention


def test_the_block_names_device_and_day() -> None:
    speeds = [gpu.Speed("Mamba-2", 12345.6, 0.321, 40.04), gpu.Speed("attention", 1.0, None, 2.0)]
    lines = gpu.block("A GPU", "2030-01-02", speeds).splitlines()
    assert lines[0].startswith("## 2030-01-02 · `make bench-gpu` (A GPU, torch 2.")
    assert lines[-2:] == ["| Mamba-2 | `MMMM` | 12,346 | 32.1% | 40.0 |", "| attention | `****` | 1 | unknown | 2.0 |"]


def test_without_a_gpu_nothing_is_measured_and_nothing_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.md"
    monkeypatch.setattr(sys, "argv", ["gpu", "--log", str(log)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == EXIT_USER_ERROR
    assert capsys.readouterr().err == "benchmarks.gpu: no GPU was found, and nothing is measured\n"
    assert not log.exists()
