"""A profile of some steps, and of what was left of them when the run stopped."""

from __future__ import annotations

import json

import pytest

from tests.train.small_run import SmallRuns

TEN_STEPS = "stages.pretrain.tokens=10240"


def traced(runs: SmallRuns, name: str, step: int) -> list[str]:
    """Names of what was recorded."""
    trace = json.loads((runs.path(name) / f"logs/trace-rank-0-from-step-{step}.json").read_text())
    return [event["name"] for event in trace["traceEvents"] if event.get("cat") == "cpu_op"]


def test_the_steps_asked_for_are_profiled(small: SmallRuns) -> None:
    assert small.run("train", "profiled", "cluster.gpus=1", TEN_STEPS, "log.profile=[2,3]").code == 0
    # One lookup for each of the four micro-batches of a step.
    assert traced(small, "profiled", 2).count("aten::embedding") == 8


@pytest.mark.full
def test_a_profile_that_the_run_ends_in_is_written(small: SmallRuns) -> None:
    assert small.run("train", "ends", "cluster.gpus=1", TEN_STEPS, "log.profile=[10,20]").code == 0
    # The step, and the held-out samples at the end.
    assert traced(small, "ends", 10).count("aten::embedding") > 4


@pytest.mark.parametrize("steps", ["[3,2]", "[0,1]", "[1]", "[]"])
def test_steps_that_are_none_are_refused(small: SmallRuns, steps: str) -> None:
    answer = small.run("plan", "wrong", f"log.profile={steps}")
    assert answer.code == 2
    assert "log.profile:" in answer.text
