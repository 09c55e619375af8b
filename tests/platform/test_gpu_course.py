"""What the tests in tests/gpu do on GPUs, done on the CPU: there nothing of theirs may fail for a reason of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from nano_pretrain.recipe.schema import ParallelConfig
from tests.distributed.courses import write_start
from tests.distributed.ranks import run_ranks
from tests.gpu.course import Course, gpu_recipe, take
from tests.gpu.on_a_cpu import on_a_cpu
from tests.kernels.compare import assert_close

ONE = ParallelConfig()
ROUNDING = 1e-5
"""Sums in another order, as in tests/distributed/layouts.py."""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("start")
    run_ranks(write_start, 1, gpu_recipe("fp32"), directory)
    return directory


def test_a_course_continues_from_its_checkpoint_and_on_another_layout(start: Path, tmp_path: Path) -> None:
    recipe = gpu_recipe("fp32")
    (whole,) = run_ranks(take, 1, recipe, ONE, start, range(2))
    (first,) = run_ranks(take, 1, recipe, ONE, start, range(1), tmp_path / "first")
    rest: list[Course] = run_ranks(take, 2, recipe, ParallelConfig(context=2), tmp_path / "first", range(1, 2))
    assert first.losses == whole.losses[:1]
    assert len(first.gradients) > 40
    for course in rest:
        assert course.losses == pytest.approx(whole.losses[1:], rel=ROUNDING)
        assert course.grad_norms == pytest.approx(whole.grad_norms[1:], rel=ROUNDING)
        assert not course.gradients


@pytest.mark.full
def test_the_cpus_side_in_a_process_of_its_own(start: Path) -> None:
    recipe = gpu_recipe("fp32")
    (expected,) = run_ranks(take, 1, recipe, ONE, start, range(1))
    found: Course = on_a_cpu(take, recipe, ONE, start, range(1))
    assert_close(found.gradients, expected.gradients, ROUNDING)
    assert found.losses == pytest.approx(expected.losses, rel=ROUNDING)


@pytest.mark.full
def test_what_fails_there_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"take failed on the CPU:\n(.|\n)*TypeError"):
        on_a_cpu(take)
