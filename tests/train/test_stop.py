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

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "nano_pretrain")


def stop(process: subprocess.Popen[str], moment: Callable[[], bool]) -> Finished:
    """SIGTERM at a moment."""
    wait_until(moment, process)
    os.kill(process.pid, signal.SIGTERM)
    return finish(process)


@pytest.fixture(scope="module")
def stopped(small: SmallRuns, undisturbed: tuple[Path, Finished]) -> dict[str, tuple[Finished, dict[str, Any]]]:
    """A run that is stopped under torchrun, amid a step, amid a checkpoint, and then goes to its end."""
    run = small.path("stopped")
    story: dict[str, tuple[Finished, dict[str, Any]]] = {}

    def tell(chapter: str, done: Finished) -> None:
        story[chapter] = (done, exit_json(run))

    command = small.command("train", "stopped", "checkpoint.every=0")
    tell("torchrun", stop(start(command, TORCHRUN), lambda: steps(run) >= 3))
    process = small.start("launch", "stopped", "checkpoint.every=0")
    begins = steps(run)
    tell("step", stop(process, lambda: steps(run) > begins))
    process = small.start("launch", "stopped", "checkpoint.every=1")
    tell("checkpoint", stop(process, lambda: any((run / "checkpoints").glob(".writing-*/*.distcp"))))
    tell("end", small.run("launch", "stopped"))
    return story


@pytest.mark.parametrize("chapter", ["step", "checkpoint"])
def test_launch_ends_with_75(stopped: dict[str, tuple[Finished, dict[str, Any]]], chapter: str) -> None:
    done, ending = stopped[chapter]
    assert done.code == 75, done.text
    assert (ending["code"], ending["reason"]) == (75, "stopped by SIGTERM")
    assert ending["tokens"] == ending["step"] * TOKENS_PER_STEP
    assert f"stopped by SIGTERM; checkpoint at {ending['tokens']:,} tokens, run again to continue" in done.last_line
    assert "Traceback" not in done.text


def test_torchrun_hides_the_code_and_the_file_has_it(stopped: dict[str, tuple[Finished, dict[str, Any]]]) -> None:
    done, ending = stopped["torchrun"]
    assert done.code not in (0, 75)
    assert (ending["code"], ending["reason"]) == (75, "stopped by SIGTERM")


def test_stop_costs_at_most_the_step_it_falls_into(stopped: dict[str, tuple[Finished, dict[str, Any]]]) -> None:
    reached = [stopped[chapter][1]["step"] for chapter in ("torchrun", "step", "checkpoint")]
    assert reached == sorted(set(reached))
    assert reached[-1] < STEPS


def test_nothing_is_left_half_written(stopped: dict[str, tuple[Finished, dict[str, Any]]], small: SmallRuns) -> None:
    run = small.path("stopped")
    assert not list(run.rglob(".*ing-*")) + list(run.rglob("*.new"))
    assert newest_tokens(run) == STEPS * TOKENS_PER_STEP


def test_run_continues_exactly(
    stopped: dict[str, tuple[Finished, dict[str, Any]]], small: SmallRuns, undisturbed: tuple[Path, Finished]
) -> None:
    done, ending = stopped["end"]
    assert (done.code, ending["code"], ending["reason"]) == (0, 0, "finished"), done.text
    assert learned(small.path("stopped")) == learned(undisturbed[0])
    expected = (undisturbed[0] / "validation.jsonl").read_text()
    assert (small.path("stopped") / "validation.jsonl").read_text() == expected
