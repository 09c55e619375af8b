"""Steps on GPUs against steps on a CPU from the same weights, and layouts of GPUs against one; needs a CUDA device.

No tolerance here was measured: each is reasoned, and the first run on a GPU has to confirm it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nano_pretrain.recipe.schema import ParallelConfig
from tests.distributed.courses import write_start
from tests.distributed.ranks import run_ranks
from tests.gpu.course import Course, gpu_recipe, take
from tests.gpu.on_a_cpu import on_a_cpu
from tests.kernels.compare import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

STEPS, MIDDLE = 5, 2
GRADIENT = {"fp32": 2e-2, "bf16": 0.15}
"""Of a tensor. On a GPU "fp32" multiplies in TF32: each factor is rounded by up to 2^-11, in some thirty products on
the way forward and back, 3e-3; a gradient that is the rest of terms that cancel has several times as much. BF16 rounds
by 2^-9, on both sides and also what is added: 2e-2, and the same factor."""
LOSS = {"fp32": 5e-4, "bf16": 1e-3}
"""Relative. A token's loss carries the roundings of a dozen products, 2e-3 in TF32 and 1e-2 in BF16 (see
tests/distributed/test_bf16.py); the mean is over 1,024 tokens, and weights drift apart over the steps."""
NORM = {"fp32": 1e-2, "bf16": 3e-2}
"""Of the gradient norm: the largest tensors decide on it, which are hardly sums that cancel."""

ONE = ParallelConfig()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that a CPU wrote; all recipes here have the same."""
    directory = tmp_path_factory.mktemp("start")
    on_a_cpu(write_start, gpu_recipe("fp32"), directory)
    return directory


def on_gpus(recipe: Any, layout: ParallelConfig, ranks: int, *arguments: Any) -> Course:
    """A course on so many GPUs; compilation of kernels included."""
    found: list[Course] = run_ranks(take, ranks, recipe, layout, *arguments, timeout=600)
    assert all(course.losses == found[0].losses for course in found), "every rank reports the same"
    return found[0]


def assert_same_course(found: Course, expected: Course, precision: str) -> None:
    assert len(found.losses) == len(expected.losses)
    assert found.losses == pytest.approx(expected.losses, rel=LOSS[precision])
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=NORM[precision])


@pytest.mark.parametrize("documents", ["reset", "ignore"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_equals_that_of_a_cpu(precision: str, documents: str, start: Path) -> None:
    recipe = gpu_recipe(precision)
    recipe.data.document_boundaries = documents
    expected = on_a_cpu(take, recipe, ONE, start, range(STEPS))
    found = on_gpus(recipe, ONE, 1, start, range(STEPS))
    assert_close(found.gradients, expected.gradients, GRADIENT[precision])
    assert_same_course(found, expected, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_goes_from_cpu_to_gpu_and_back(precision: str, start: Path, tmp_path: Path) -> None:
    recipe = gpu_recipe(precision)
    on_a_cpu(take, recipe, ONE, start, range(MIDDLE), tmp_path / "cpu")
    on_gpus(recipe, ONE, 1, start, range(MIDDLE), tmp_path / "gpu")
    for directory in ("cpu", "gpu"):
        rest = (tmp_path / directory, range(MIDDLE, STEPS))
        on_cpu: Course = on_a_cpu(take, recipe, ONE, *rest)
        assert_same_course(on_gpus(recipe, ONE, 1, *rest), on_cpu, precision)


@two_gpus
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(ParallelConfig(tensor=2), id="TP2"),
        pytest.param(ParallelConfig(tensor=2, sequence=True), id="TP2 with SP"),
        pytest.param(ParallelConfig(pipeline=2), id="PP2"),
        pytest.param(ParallelConfig(context=2), id="CP2"),
        pytest.param(ParallelConfig(), id="DP2"),
    ],
)
@pytest.mark.parametrize("documents", ["reset", "ignore"])
def test_layouts_equal_one_gpu(layout: ParallelConfig, documents: str, start: Path) -> None:
    # Transformer Engine's attention has no FP32 under context parallelism.
    precision = "bf16" if layout.context > 1 and documents == "ignore" else "fp32"
    recipe = gpu_recipe(precision)
    recipe.data.document_boundaries = documents
    expected = on_gpus(recipe, ONE, 1, start, range(STEPS))
    assert_same_course(on_gpus(recipe, layout, 2, start, range(STEPS)), expected, precision)


@two_gpus
def test_overlap_within_tensor_parallelism_changes_no_step(start: Path) -> None:
    recipe = gpu_recipe("bf16")
    layouts = [ParallelConfig(tensor=2, sequence=True, tensor_overlap=overlap) for overlap in (False, True)]
    courses = []
    for layout in layouts:
        recipe.parallel = layout
        courses.append(on_gpus(recipe, layout, 2, start, range(STEPS)))
    # Reduced by other kernels, in another order.
    assert_same_course(courses[1], courses[0], "bf16")


def test_graphs_change_no_step(start: Path) -> None:
    recipe = gpu_recipe("bf16")
    recipe.data.document_boundaries = "ignore"
    courses = []
    for graphs in (False, True):
        recipe.parallel = ParallelConfig(cuda_graphs=graphs, overlap=False)
        courses.append(on_gpus(recipe, recipe.parallel, 1, start, range(STEPS)))
    # The same kernels; atomic additions may come in another order.
    assert_same_course(courses[1], courses[0], "bf16")


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputation_changes_no_step(granularity: str, start: Path) -> None:
    recipe = gpu_recipe("bf16")
    expected = on_gpus(recipe, ONE, 1, start, range(STEPS))
    recipe.recompute.granularity = granularity
    assert_same_course(on_gpus(recipe, ONE, 1, start, range(STEPS)), expected, "bf16")
