"""A request to stop two ranks, wherever it falls: a whole checkpoint, exit 75, and the same command goes on exactly."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nano_pretrain.checkpoint.manifest import newest_tokens
from tests.train.small_run import (
    STEPS,
    TOKENS_PER_STEP,
    Finished,
    SmallRuns,
    exit_json,
    finish,
    learned,
    start,
    steps,
    wait_until,
)  # fmt: skip

Chapter = tuple[Finished, dict[str, Any]]
"""How a process ended, and the exit.json it left."""

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "nano_pretrain")


def stop(process: subprocess.Popen[str], moment: Callable[[], bool]) -> Finished:
    """SIGTERM at a moment."""
    wait_until(moment, process)
    os.kill(process.pid, signal.SIGTERM)
    return finish(process)


@pytest.fixture(scope="module")
def stopped(small: SmallRuns, undisturbed: tuple[Path, Finished]) -> dict[str, Chapter]:
    """A run that is stopped amid a step, then amid a checkpoint, and then goes to its end."""
    run = small.path("stopped")
    story: dict[str, Chapter] = {}
    process = small.start("launch", "stopped", "checkpoint.every=0")
    story["step"] = (stop(process, lambda: steps(run) > 0), exit_json(run))
    process = small.start("launch", "stopped", "checkpoint.every=1")
    done = stop(process, lambda: any(run.glob("checkpoints/.writing-*/*.distcp")))
    story["checkpoint"] = (done, exit_json(run))
    story["end"] = (small.run("launch", "stopped"), exit_json(run))
    return story


@pytest.mark.parametrize("chapter", ["step", "checkpoint"])
def test_launch_ends_with_75(stopped: dict[str, Chapter], chapter: str) -> None:
    done, ending = stopped[chapter]
    assert done.code == 75, done.text
    assert (ending["code"], ending["reason"]) == (75, "stopped by SIGTERM")
    assert ending["tokens"] == ending["step"] * TOKENS_PER_STEP
    assert f"stopped by SIGTERM; checkpoint at {ending['tokens']:,} tokens, run again to continue" in done.last_line
    assert "Traceback" not in done.text


def test_torchrun_hides_the_code_and_the_file_has_it(small: SmallRuns) -> None:
    # Long enough not to end before torchrun has passed the signal on.
    command = small.command("train", "torchrun", "stages.pretrain.tokens=1000000", "checkpoint.every=0")
    run = small.path("torchrun")
    done = stop(start(command, TORCHRUN), lambda: steps(run) >= 2)
    assert done.code not in (0, 75)
    ending = exit_json(run)
    assert (ending["code"], ending["reason"]) == (75, "stopped by SIGTERM")
    assert newest_tokens(run) == ending["tokens"]


def test_stops_are_not_put_off_to_the_end(stopped: dict[str, Chapter]) -> None:
    reached = [stopped[chapter][1]["step"] for chapter in ("step", "checkpoint")]
    assert reached == sorted(set(reached))
    assert reached[-1] < STEPS


def test_nothing_is_left_half_written(stopped: dict[str, Chapter], small: SmallRuns) -> None:
    run = small.path("stopped")
    assert not list(run.rglob(".*ing-*")) + list(run.rglob("*.new"))
    assert newest_tokens(run) == STEPS * TOKENS_PER_STEP


def test_run_continues_exactly(
    stopped: dict[str, Chapter], small: SmallRuns, undisturbed: tuple[Path, Finished]
) -> None:
    done, ending = stopped["end"]
    assert (done.code, ending["code"], ending["reason"]) == (0, 0, "finished"), done.text
    assert learned(small.path("stopped")) == learned(undisturbed[0])
    expected = (undisturbed[0] / "validation.jsonl").read_text()
    assert (small.path("stopped") / "validation.jsonl").read_text() == expected
