"""Which checkpoint text is drawn from, and how samples are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nano_pretrain.evaluate.generate import chosen_checkpoint, record_samples, sample
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.schema import GenerateConfig
from tests.checkpoint.test_manifest import write


def test_newest_checkpoint_is_taken_unless_one_is_named(tmp_path: Path) -> None:
    old, new = write(tmp_path, 64), write(tmp_path, 128)
    assert chosen_checkpoint(tmp_path, None, "generate") == new
    assert chosen_checkpoint(tmp_path, 64, "generate") == old
    with pytest.raises(
        UserError, match=r"generate\.checkpoint: no whole checkpoint at 96 tokens; choose one of 64, 128"
    ):
        chosen_checkpoint(tmp_path, 96, "generate")


def test_checkpoint_of_changed_content_is_refused(tmp_path: Path) -> None:
    (write(tmp_path, 64) / "common.pt").write_bytes(b"y")
    with pytest.raises(UserError, match=r"damaged \(common\.pt\)"):
        chosen_checkpoint(tmp_path, None, "generate")


def test_run_without_checkpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no whole checkpoint; train the run first"):
        chosen_checkpoint(tmp_path, None, "generate")


def test_sample_drawn_again_replaces_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, 64)
    options = GenerateConfig()
    record_samples(tmp_path, options, ["a", "b"], ["a1", "b1"])
    record_samples(tmp_path, options, ["b"], ["b2"])
    record_samples(tmp_path, replace(options, seed=1), ["b"], ["b3"])
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["text"], line["seed"]) for line in lines] == [
        ("a", "a1", 0),
        ("b", "b2", 0),
        ("b", "b3", 1),
    ]
    assert {line["tokens"] for line in lines} == {64}


def test_tiny_temperature_is_greedy() -> None:
    logits = torch.tensor([0.0, 3.0, 2.9])
    options = GenerateConfig(temperature=1e-40)
    assert sample(logits, options, torch.Generator().manual_seed(0)) == 1
