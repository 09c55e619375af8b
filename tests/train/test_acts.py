"""A run that is told in mid-run to take larger steps and to go on for longer, also when it is killed afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nano_pretrain.checkpoint.manifest import read_manifest, whole_checkpoints
from tests.train.small_run import TOKENS, TOKENS_PER_STEP, SmallRuns, checkpoints, learned, lines, wait_until

LONGER = TOKENS + 8 * TOKENS_PER_STEP
ACTS = ["stages.pretrain.global_batch_size=16", f"stages.pretrain.schedule.extend_to={LONGER}"]


@pytest.fixture(scope="module")
def begun(small: SmallRuns) -> Path:
    """A run that was killed in its stable part."""
    run = small.path("acts_begun")
    process = small.start("train", run.name)
    wait_until(lambda: checkpoints(run)[:1] == [str(5 * TOKENS_PER_STEP)], process)
    process.kill()
    process.communicate()
    return run


def begun_again(small: SmallRuns, begun: Path, name: str) -> Path:
    shutil.copytree(begun, small.path(name))
    return small.path(name)


def newest(run: Path) -> int:
    """Tokens of its last checkpoint."""
    return max(int(name) for name in checkpoints(run) if name.isdigit())


@pytest.fixture(scope="module")
def told(small: SmallRuns, begun: Path) -> Path:
    run = begun_again(small, begun, "acts")
    done = small.run("train", run.name, *ACTS)
    assert done.code == 0, done.text
    assert "stages.pretrain.global_batch_size is 16 from " in done.text
    return run


def test_steps_and_horizon_change_from_there_on(told: Path) -> None:
    history = lines(told / "recipe_history.jsonl")
    (since,) = {act["tokens"] for act in history}
    assert {act["field"]: (act["before"], act["after"]) for act in history} == {
        "stages.pretrain.global_batch_size": (8, 16),
        "stages.pretrain.schedule.extend_to": (None, LONGER),
    }
    steps = lines(told / "metrics.jsonl")
    assert all(step["global_batch_size"] == (8 if step["tokens"] <= since else 16) for step in steps)
    # The last step is a whole one.
    assert 0 <= steps[-1]["tokens"] - LONGER < 2 * TOKENS_PER_STEP
    # The decay is as long as it was, before the new end.
    assert {step["lr"] for step in steps if 2048 <= step["tokens"] <= LONGER - 4096} == {max(s["lr"] for s in steps)}
    assert steps[-1]["lr"] == min(step["lr"] for step in steps[3:])


def test_checkpoints_know_how_much_the_run_was_told(told: Path) -> None:
    (since,) = {act["tokens"] for act in lines(told / "recipe_history.jsonl")}
    manifests = {path.name: read_manifest(path) for path in whole_checkpoints(told)}
    assert {name: manifest and manifest.acts for name, manifest in manifests.items()} == {
        name: 2 if int(name) > since else 0 for name in manifests
    }
    assert int(max(manifests, key=int)) > since


def test_the_past_can_not_be_told_otherwise(small: SmallRuns, told: Path) -> None:
    done = small.run("train", told.name, ACTS[0], "stages.pretrain.schedule.extend_to=1e6")
    assert done.code == 2, done.text
    assert "it can change no more" in done.text
    assert small.run("train", told.name, *ACTS).code == 0


@pytest.mark.full
def test_a_kill_after_the_act_changes_nothing(small: SmallRuns, begun: Path, told: Path) -> None:
    run = begun_again(small, begun, "acts_killed")
    process = small.start("train", run.name, *ACTS)
    wait_until(lambda: newest(run) > newest(begun) and (run / "recipe_history.jsonl").exists(), process)
    process.kill()
    process.communicate()
    # The command of the small runs names the batch, so the act is named again.
    done = small.run("train", run.name, *ACTS)
    assert done.code == 0, done.text
    assert learned(run) == learned(told)
