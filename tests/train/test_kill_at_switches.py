"""kill -9 of a launch around the switch to a stage on other ranks, and around changes of phase and batch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from nano_pretrain.checkpoint.manifest import newest_tokens, read_manifest, whole_checkpoints
from nano_pretrain.train.before import asks_for_restart
from tests.corpora import BLEND
from tests.train.small_run import (
    TOKENS_PER_STEP,
    Finished,
    SmallRuns,
    exit_json,
    finish,
    learned,
    lines,
    newer,
    steps,
    wait_until,
)
from tests.train.test_kill import assert_all_gone

SWITCH = 10
"""Steps of the first stage, on one rank; four follow on two."""
TWO_STAGES = [
    "extension=tiny_4k", "cluster.gpus=1", f"stages.pretrain.tokens={SWITCH * TOKENS_PER_STEP}",
    "stages.long_context.tokens=4096", "stages.long_context.sequence_length=256",
    f"stages.long_context.phases.lc.blend={BLEND}", "evaluate.lengths=[402]", "evaluate.tasks=[niah_single]",
    "evaluate.examples=2", "validation.every=0",
]  # fmt: skip


def at_switch(run: Path) -> bool:
    """Its checkpoint has got its name; the ledger, the evaluation and exit.json are still to come."""
    return newest_tokens(run) == SWITCH * TOKENS_PER_STEP


def in_evaluation(run: Path) -> bool:
    return at_switch(run) and bool(json.loads((run / "ledger.json").read_text())["tokens"] == newest_tokens(run))


def others_load(run: Path) -> bool:
    """The ranks of the second stage have taken the run's files back to the checkpoint."""
    return at_switch(run) and newer(run, "environment.json", whole_checkpoints(run)[0].stat().st_mtime)


def others_train(run: Path) -> bool:
    return steps(run) > SWITCH


def kill_group(process: subprocess.Popen[str]) -> None:
    """Ranks lead sessions of their own and end with their launcher."""
    below = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert_all_gone(below)


def killed(small: SmallRuns, name: str, moment: Callable[[Path], bool]) -> Finished:
    """A launch that is killed, and the next one."""
    process = small.start("launch", name, *TWO_STAGES)
    wait_until(lambda: moment(small.path(name)), process)
    kill_group(process)
    return small.run("launch", name, *TWO_STAGES)


def copy_as_killed(process: subprocess.Popen[str], run: Path, copy: Path) -> None:
    """What a kill -9 at this moment would leave: everybody stands still while it is copied."""
    everybody = [launcher := psutil.Process(process.pid), *launcher.children(recursive=True)]
    for member in everybody:
        member.suspend()
    shutil.copytree(run, copy)
    for member in everybody:
        member.resume()


@pytest.fixture(scope="module")
def stories(small: SmallRuns) -> dict[str, Finished]:
    """A launch that nobody disturbs, and one that goes on from what it had at the end of the first stage."""
    run, copy = small.path("switch"), small.path("copied")
    process = small.start("launch", run.name, *TWO_STAGES)
    wait_until(lambda: at_switch(run), process)
    copy_as_killed(process, run, copy)
    second = small.start("launch", copy.name, *TWO_STAGES)
    return {"switch": finish(process), "copied": finish(second)}


def left(run: Path) -> dict[str, Any]:
    """What has to be the same in every bit."""
    manifest = read_manifest(whole_checkpoints(run)[0])
    assert manifest is not None
    return {
        "steps": learned(run),
        "ledger": json.loads((run / "ledger.json").read_text()),
        # Weights and optimizer. The rest names its writer, and a mark of parameter groups that no load brings back.
        "tensors": {name: entry for name, entry in manifest.files.items() if name.endswith(".distcp")},
        "evaluated": [(line["tokens"], line["stage"], line["length"]) for line in lines(run / "evaluation.jsonl")],
    }


def test_launch_goes_on_with_other_ranks(stories: dict[str, Finished], small: SmallRuns) -> None:
    done, run = stories["switch"], small.path("switch")
    assert done.code == 0, done.text
    said = "needs 2 ranks, built for its layout; checkpoint at 10,240 tokens, start so many, as `launch` does by itself"
    assert f"{run}: stage long_context {said}" in done.text
    assert [line["stage"] for line in lines(run / "metrics.jsonl")] == ["pretrain"] * SWITCH + ["long_context"] * 4
    assert exit_json(run)["reason"] == "finished"


def test_a_kill_at_the_switch_changes_nothing(stories: dict[str, Finished], small: SmallRuns) -> None:
    done = stories["copied"]
    assert done.code == 0, done.text
    # The ranks of the second stage begin: those of the first had nothing left to train.
    assert done.text.startswith(f"{small.path('copied')}: continuing at step {SWITCH}, ")
    assert left(small.path("copied")) == left(small.path("switch"))


@pytest.mark.full
@pytest.mark.parametrize("moment", [at_switch, in_evaluation, others_load, others_train])
def test_kills_around_the_switch_change_nothing(
    moment: Callable[[Path], bool], stories: dict[str, Finished], small: SmallRuns
) -> None:
    done = killed(small, moment.__name__, moment)
    assert done.code == 0, done.text
    assert left(small.path(moment.__name__)) == left(small.path("switch"))


@pytest.mark.full
def test_train_ends_with_75_at_the_switch_and_launch_goes_on(stories: dict[str, Finished], small: SmallRuns) -> None:
    done, run = small.run("train", "by_hand", *TWO_STAGES), small.path("by_hand")
    assert done.code == 75, done.text
    assert newest_tokens(run) == SWITCH * TOKENS_PER_STEP
    assert asks_for_restart(run)
    assert small.run("launch", "by_hand", *TWO_STAGES).code == 0
    assert left(run) == left(small.path("switch"))


GROWING = ["cluster.gpus=1", "validation.every=0"] + [
    f"stages.pretrain.batch_ramp.{field}" for field in ("start=4", "increment=4", "ramp_tokens=2560")
]
CHANGES = {"global_batch_size": 5, "phase": 15}
"""Steps before the first one of 8 samples, and before the first one of the second phase."""


def killed_behind(small: SmallRuns, name: str, step: int, tokens: int) -> None:
    """Train until the checkpoint after `step` steps lies a step behind, and kill."""
    run = small.path(name)
    process = small.start("train", name, *GROWING, f"checkpoint.every={step}")
    wait_until(lambda: newest_tokens(run) == tokens and steps(run) > step, process)
    kill_group(process)
    assert newest_tokens(run) == tokens


@pytest.mark.full
def test_checkpoints_on_before_and_after_changes_of_batch_and_phase(small: SmallRuns) -> None:
    whole = small.run("train", "growing", *GROWING)
    assert whole.code == 0, whole.text
    found = lines(small.path("growing") / "metrics.jsonl")
    for change, step in CHANGES.items():
        assert found[step - 1][change] == found[0][change] != found[step][change]
        for landed in (step - 1, step, step + 1):
            killed_behind(small, "growing_killed", landed, found[landed - 1]["tokens"])
    done = small.run("train", "growing_killed", *GROWING)
    assert done.code == 0, done.text
    assert left(small.path("growing_killed")) == left(small.path("growing"))
