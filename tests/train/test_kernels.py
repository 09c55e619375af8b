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
from nano_pretrain.train.environment import check_same_kernels, same_kernels
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
    """The killed run goes on with plain kernels, now for want of a compiler, and a copy of it on native ones."""
    shutil.copytree(killed, small.path("native_after_plain"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "/bin/false")
        plain = small.run("train", "plain_killed")
    native = small.run("train", "native_after_plain", "cluster.cpu_kernels=native")
    return {"plain_killed": plain, "native_after_plain": native}


@pytest.mark.full
def test_plain_kernels_resume_bit_for_bit(small: SmallRuns, continued: dict[str, Finished]) -> None:
    undisturbed = small.run("train", "plain", PLAIN)
    assert undisturbed.code == continued["plain_killed"].code == 0
    assert "kernels: plain PyTorch (cluster.cpu_kernels=plain)\n" in undisturbed.text
    assert learned(small.path("plain_killed")) == learned(small.path("plain"))
    assert len(learned(small.path("plain"))) == STEPS


def test_another_reason_for_plain_kernels_is_no_change(continued: dict[str, Finished]) -> None:
    assert "\nkernels: plain PyTorch, about half as fast as native: CXX=/bin/false" in continued["plain_killed"].text
    assert "so far with kernels" not in continued["plain_killed"].text


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


def kernels_of_ranks(*compilers: str) -> str:
    """What a rank is told when each has another compiler."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ["CXX"] = compilers[rank]
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
    answers = run_ranks(kernels_of_ranks, 2, "g++", "/bin/false")
    assert answers[0] == answers[1]
    assert answers[0].startswith("cluster.cpu_kernels: rank 0 has native, rank 1 has plain PyTorch")
    assert answers[0].endswith("or write cluster.cpu_kernels=plain")


def test_plain_ranks_are_alike_whatever_the_reason() -> None:
    assert run_ranks(kernels_of_ranks, 2, "/bin/true", "/bin/false") == ["nothing", "nothing"]


def test_the_reason_is_no_difference() -> None:
    wanted, failed = "plain PyTorch (cluster.cpu_kernels=plain)", "plain PyTorch, about half as fast as native: no GCC"
    assert same_kernels(wanted, failed)
    assert not same_kernels(wanted, "native")
    assert not same_kernels("native", "mamba-ssm and Transformer Engine")
