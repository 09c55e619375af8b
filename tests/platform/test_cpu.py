"""Every adaptation of megatron-core to the CPU is still needed, and still fits what it adapts."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from nano_pretrain.platform import cpu
from tests.distributed.ranks import run_ranks
from tests.platform import facts
from tests.platform.leaving_out import Outcome, run_without
from tests.platform.sources import PRODUCT, bound_names, megatron_imports, megatron_source

# How a run ends without the adaptation, and after how many of its five steps.
FAILURES = {
    "view_torch": (0, "AssertionError: Torch not compiled with CUDA enabled"),
    "mamba_kernels": (0, "ImportError: MambaSSM is not installed"),
    "final_norm": (0, "ImportError: Transformer Engine is not installed"),
    "tensors_as_cuda": (0, "TypeError: Wrapped parameters must be one of torch.cuda.FloatTensor"),
    # Loading finds a step of each parameter where it looks for one.
    "fused_adam": (5, "AssertionError"),
}


def test_every_adaptation_is_tested() -> None:
    names = {adaptation.__name__ for adaptation in cpu.ADAPTATIONS}
    assert names | {"tensors_as_cuda"} == FAILURES.keys() | {"rng_setter", "lone_ranks"}


@pytest.mark.parametrize("name", FAILURES)
def test_without_it_a_run_fails(name: str, tmp_path: Path) -> None:
    outcome: Outcome = run_ranks(run_without, 1, name, tmp_path)[0]
    steps, error = FAILURES[name]
    assert outcome.error is not None
    assert outcome.error.startswith(error)
    assert (len(outcome.losses), outcome.resumed) == (steps, [])


def test_without_the_rng_setter_the_tracker_does_not_switch_and_calls_pile_up() -> None:
    assert run_ranks(facts.rng_tracker, 1, None)[0] == facts.Tracker(True, True, True, 0)
    without: facts.Tracker = run_ranks(facts.rng_tracker, 1, "rng_setter")[0]
    assert not without.switched
    assert without.queued_calls > 0


def test_without_lone_ranks_a_rank_reduces_and_gathers_by_itself() -> None:
    assert run_ranks(facts.collectives_of_a_step, 1, None)[0] == set()
    assert run_ranks(facts.collectives_of_a_step, 1, "lone_ranks")[0] == {"reduce_scatter", "all_gather"}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> facts.WholeRun:
    found: facts.WholeRun = run_ranks(facts.whole_run, 1, tmp_path_factory.mktemp("run"))[0]
    return found


def test_with_all_of_them_a_run_trains_saves_and_resumes(whole_run: facts.WholeRun) -> None:
    outcome = whole_run.outcome
    assert outcome.error is None
    assert len(outcome.losses) == 5
    assert outcome.resumed == outcome.losses[2:]


def test_torch_itself_is_unchanged_after_a_run(whole_run: facts.WholeRun) -> None:
    assert whole_run.changed == []
    assert "CUDA" in whole_run.refused
    assert not whole_run.generator_moved
    assert whole_run.queued_calls == 0


def test_what_is_replaced_exists() -> None:
    replaced: dict[str, list[tuple[str, str]]] = run_ranks(facts.replaced_names, 1)[0]
    assert replaced.keys() == {adaptation.__name__ for adaptation in cpu.ADAPTATIONS}
    for adaptation, names in replaced.items():
        assert names, f"{adaptation} changes nothing"
        for module, name in names:
            assert name in bound_names(megatron_source(module)), (
                f"{adaptation} sets {module}.{name}, which is not there"
            )


def test_the_view_reaches_every_module_that_is_used() -> None:
    plain = set(run_ranks(facts.modules_with_plain_torch, 1)[0])
    files = [path for path in PRODUCT.rglob("*.py") if path != PRODUCT / "platform" / "cuda.py"]
    used = {module for path in files for module, _ in megatron_imports(path)} | set(cpu.MODULES)
    assert len(used) > len(cpu.MODULES)
    assert not plain & used


def test_nothing_is_applied_where_cuda_exists() -> None:
    assert run_ranks(facts.platform_where_cuda_exists, 1)[0] == ("cuda", [])


@pytest.mark.parametrize(("threads", "local_ranks"), [(3, 1), (None, 1), (None, 2), (None, 1000)])
def test_ranks_share_the_cores(threads: int | None, local_ranks: int) -> None:
    expected = threads or max(1, len(os.sched_getaffinity(0)) // local_ranks)
    assert run_ranks(facts.threads_of_a_rank, 1, threads, local_ranks)[0] == expected


@pytest.mark.parametrize("local_ranks", [None, 3])
def test_ranks_share_the_memory(monkeypatch: pytest.MonkeyPatch, local_ranks: int | None) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local_ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    memory = cpu.CpuPlatform().memory(0)
    assert (memory.capacity, memory.ranks) == (psutil.virtual_memory().total, local_ranks or 1)
