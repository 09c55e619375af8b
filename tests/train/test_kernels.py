"""Runs on either implementation of the kernels: exact resume, and what is said where a run changes between them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from nano_pretrain.parallel.groups import Ranks
from nano_pretrain.platform.cpu import CpuPlatform
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.train.environment import check_same_kernels
from tests.distributed.ranks import run_ranks
from tests.train.small_run import STEPS, Finished, SmallRuns, checkpoints, learned, lines, start, wait_until

PLAIN = "cluster.cpu_kernels=plain"


@pytest.fixture(scope="module")
def killed(small: SmallRuns) -> Path:
    """A run on plain kernels that was killed after its first checkpoint."""
    run = small.path("plain_killed")
    process = start(small.command("train", run.name, PLAIN))
    wait_until(lambda: any(name.isdecimal() and int(name) > 0 for name in checkpoints(run)), process)
    process.kill()
    process.communicate()
    return run


@pytest.fixture(scope="module")
def continued(small: SmallRuns, killed: Path) -> dict[str, Finished]:
    """The killed run goes on as it was, and a copy of it on native kernels."""
    shutil.copytree(killed, small.path("native_after_plain"))
    return {
        "plain_killed": small.run("train", "plain_killed", PLAIN),
        "native_after_plain": small.run("train", "native_after_plain", "cluster.cpu_kernels=native"),
    }


@pytest.mark.full
def test_plain_kernels_resume_bit_for_bit(small: SmallRuns, continued: dict[str, Finished]) -> None:
    undisturbed = small.run("train", "plain", PLAIN)
    assert undisturbed.code == continued["plain_killed"].code == 0
    assert "kernels: plain PyTorch (cluster.cpu_kernels=plain)\n" in undisturbed.text
    assert "so far with kernels" not in continued["plain_killed"].text
    assert learned(small.path("plain_killed")) == learned(small.path("plain"))
    assert len(learned(small.path("plain"))) == STEPS


def test_a_change_of_kernels_is_said_and_changes_only_the_rounding(
    small: SmallRuns, continued: dict[str, Finished]
) -> None:
    done, run = continued["native_after_plain"], small.path("native_after_plain")
    assert done.code == 0
    assert "so far with kernels: plain PyTorch (cluster.cpu_kernels=plain); losses now differ by rounding" in done.text
    assert "\nkernels: native\n" in done.text
    assert json.loads((run / "environment.json").read_text())["kernels"] == "native"
    pairs = zip(lines(run / "metrics.jsonl"), lines(small.path("plain_killed") / "metrics.jsonl"), strict=True)
    # BF16 rounds activations to 2^-9 of their size; the mean over 1,024 tokens of losses near 5 differs by far less.
    assert all(abs(changed["loss"] - same["loss"]) < 0.02 for changed, same in pairs)


def test_native_without_a_compiler_is_refused(small: SmallRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    refused = small.run("train", "refused", "cluster.cpu_kernels=native")
    assert refused.code == 2
    assert refused.last_line == (
        "nano-pretrain: cluster.cpu_kernels: native kernels cannot be had: CXX=/bin/false is not GCC; unset it, or let "
        "it name g++"
    )


def kernels_of_one_rank_fail() -> str:
    """What rank 0 says when rank 1 has no compiler."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank == 1:
        os.environ["CXX"] = "/bin/false"
    platform = CpuPlatform()
    platform.prepare(rank, 1, "auto")
    dist.init_process_group("gloo")
    try:
        check_same_kernels(platform, Ranks(rank, world, rank))
    except UserError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return "nothing"


def test_ranks_with_unlike_kernels_are_refused() -> None:
    answers = run_ranks(kernels_of_one_rank_fail, 2)
    assert answers[0] == answers[1]
    assert answers[0].startswith("cluster.cpu_kernels: rank 0 has native, rank 1 has plain PyTorch")
    assert answers[0].endswith("or write cluster.cpu_kernels=plain")
