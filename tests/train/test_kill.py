"""kill -9 of two real ranks, twice; the same command goes on as if nothing had happened."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from nano_pretrain.checkpoint.manifest import newest_tokens
from nano_pretrain.compose import compose
from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.ledger import ledger
from nano_pretrain.data.shards import open_corpus
from tests.train.small_run import (
    STEPS,
    TOKENS,
    Finished,
    SmallRuns,
    checkpoints,
    learned,
    lines,
    newer,
    steps,
    wait_until,
)


def kill(victims: list[psutil.Process]) -> None:
    """kill -9 of processes that may be gone already."""
    for victim in victims:
        if victim.is_running():
            victim.send_signal(signal.SIGKILL)


def family(process: subprocess.Popen[str]) -> tuple[psutil.Process, list[psutil.Process], list[psutil.Process]]:
    """The launcher, its ranks, and everybody below it."""
    launcher = psutil.Process(process.pid)
    below = launcher.children(recursive=True)
    ranks = [child for child in below if child.ppid() == process.pid and "train" in child.cmdline()]
    return launcher, ranks, below


def assert_all_gone(processes: list[psutil.Process]) -> None:
    """Nothing of a killed run lives on."""
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


def kill_amid_steps(small: SmallRuns, name: str, after: int, who: str) -> Finished:
    """Kill ranks or launcher at a random moment once metrics.jsonl has `after` steps."""
    run, started = small.path(name), time.time()
    process = small.start("launch", name)
    # Written when the files of the run have been taken back to its checkpoint.
    wait_until(lambda: newer(run, "environment.json", started) and steps(run) >= after, process)
    time.sleep(random.random() * 0.05)
    launcher, ranks, below = family(process)
    assert len(ranks) == 2
    kill({"ranks": ranks, "launcher": [launcher]}[who])
    text, _ = process.communicate(timeout=60)
    assert_all_gone(below)
    return Finished(process.returncode, text)


def kill_amid_checkpoint(small: SmallRuns, name: str) -> None:
    """Kill all ranks while the next checkpoint is being written."""
    run, started = small.path(name), time.time()
    process = small.start("launch", name)
    begins = newest_tokens(run)
    wait_until(lambda: newer(run, "checkpoints/.writing-*/*.distcp", started), process)
    launcher, ranks, below = family(process)
    kill([*ranks, launcher])
    process.communicate(timeout=60)
    assert_all_gone(below)
    assert newest_tokens(run) == begins
    assert checkpoints(run)[-1].startswith(".writing-")


@pytest.fixture(scope="module")
def battered(small: SmallRuns, undisturbed: tuple[Path, Finished]) -> tuple[Path, list[Finished]]:
    """A run that was killed twice and then went to its end."""
    killed = kill_amid_steps(small, "battered", 7, "ranks")
    kill_amid_checkpoint(small, "battered")
    return small.path("battered"), [killed, small.run("launch", "battered")]


def test_launcher_tells_which_rank_was_killed(battered: tuple[Path, list[Finished]]) -> None:
    killed = battered[1][0]
    assert killed.code == 1
    assert "was killed by signal 9" in killed.text
    assert "Traceback" not in killed.text.partition("launch: rank")[0]


def test_run_goes_to_its_end(battered: tuple[Path, list[Finished]]) -> None:
    run, (*_, last) = battered
    assert last.code == 0, last.text
    assert f"{run}: continuing at step" in last.text
    assert checkpoints(run) == [str(TOKENS * 3 // 4), str(TOKENS)]


def test_every_step_is_there_once_and_bit_equal(
    battered: tuple[Path, list[Finished]], undisturbed: tuple[Path, Finished]
) -> None:
    run = battered[0]
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert learned(run) == learned(undisturbed[0])


def test_validation_is_equal(battered: tuple[Path, list[Finished]], undisturbed: tuple[Path, Finished]) -> None:
    expected = (undisturbed[0] / "validation.jsonl").read_text()
    assert (battered[0] / "validation.jsonl").read_text() == expected
    assert [line["step"] for line in lines(undisturbed[0] / "validation.jsonl")] == [0, 8, 16, 20]


def test_ledger_is_the_closed_form(small: SmallRuns, battered: tuple[Path, list[Finished]]) -> None:
    recipe = compose(small.command("launch", "battered")[1:]).recipe
    curriculum = Curriculum(recipe, open_corpus(small.corpus).sizes)
    written = json.loads((battered[0] / "ledger.json").read_text())
    assert written == ledger(curriculum, TOKENS)
    assert sum(source["tokens"] for source in written["sources"].values()) == TOKENS


@pytest.mark.full
def test_ranks_end_with_their_launcher_and_the_run_goes_on(
    small: SmallRuns, undisturbed: tuple[Path, Finished]
) -> None:
    kill_amid_steps(small, "orphaned", 12, "launcher")
    done = small.run("launch", "orphaned")
    assert done.code == 0, done.text
    assert learned(small.path("orphaned")) == learned(undisturbed[0])
