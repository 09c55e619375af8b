"""What a recipe asks of GPUs, on facts of GPUs that are not here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nano_pretrain.compose import compose
from nano_pretrain.parallel.groups import Ranks
from nano_pretrain.platform import cuda
from nano_pretrain.platform.cuda_limits import (
    CudaFacts,
    check_attention,
    check_bf16_layers,
    check_convolution,
    check_cuda,
    check_fp8_support,
    check_graphs,
    check_scan,
)
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.load import tree
from nano_pretrain.recipe.schema import ParallelConfig, PrecisionConfig
from nano_pretrain.train import run
from nano_pretrain.train.signals import StopRequest

HOPPER = CudaFacts((9, 0), (12, 9))
NAMES = sorted(path.stem for path in (tree("recipes") / "recipe").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_runs_on_hopper(name: str) -> None:
    check_cuda(compose([f"recipe={name}"]).recipe, HOPPER)


@pytest.mark.parametrize(
    ("precision", "capability", "cuda", "message"),
    [
        ("fp8_blockwise", (8, 9), (12, 9), "needs compute capability 9.0, .* 8.9; .*name=fp8_current_scaling$"),
        ("fp8_blockwise", (8, 0), (12, 9), "needs compute capability 9.0, .* 8.0; write precision.name=bf16$"),
        ("fp8_blockwise", (9, 0), (12, 8), "needs CUDA 12.9, torch was built with 12.8; .* precision.name=bf16$"),
        ("fp8_current_scaling", (8, 6), (13, 0), "needs compute capability 8.9, .* 8.6; write precision.name=bf16$"),
        ("fp8_current_scaling", (9, 0), (12, 0), "needs CUDA 12.1, torch was built with 12.0; .* precision.name=bf16$"),
    ],
)  # fmt: skip
def test_fp8_on_what_is_too_old(
    precision: str, capability: tuple[int, int], cuda: tuple[int, int], message: str
) -> None:
    with pytest.raises(RecipeError, match=rf"^precision\.name: {precision} {message}"):
        check_fp8_support(PrecisionConfig(precision), CudaFacts(capability, cuda))


def test_other_precisions_need_nothing_and_newer_versions_count_as_numbers() -> None:
    check_fp8_support(PrecisionConfig("bf16"), CudaFacts((7, 0), (11, 8)))
    check_fp8_support(PrecisionConfig("fp8_current_scaling"), CudaFacts((8, 9), (12, 1)))
    check_fp8_support(PrecisionConfig("fp8_blockwise"), CudaFacts((10, 0), (12, 10)))


@pytest.mark.parametrize("capability", [(10, 0), (10, 3), (12, 0)])
def test_blackwell_computes_blockwise_with_scales_that_are_powers_of_two(capability: tuple[int, int]) -> None:
    blockwise = PrecisionConfig("fp8_blockwise")
    check_fp8_support(blockwise, CudaFacts(capability, (12, 9)))
    check_fp8_support(PrecisionConfig("fp8_current_scaling"), CudaFacts(capability, (12, 9), fp32_scales=True))
    message = (
        r"^precision\.name: fp8_blockwise needs scales .* powers of two .*; unset NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
    )
    with pytest.raises(RecipeError, match=message):
        check_fp8_support(blockwise, CudaFacts(capability, (12, 9), fp32_scales=True))
    check_fp8_support(blockwise, CudaFacts((9, 0), (12, 9), fp32_scales=True))


@pytest.mark.parametrize(("value", "asked"), [("1", True), ("0", False), (None, False)])
def test_the_environment_asks_for_other_scales(monkeypatch: pytest.MonkeyPatch, value: str | None, asked: bool) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda local_rank: (10, 0))
    monkeypatch.delenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", raising=False)
    if value is not None:
        monkeypatch.setenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", value)
    assert cuda.cuda_facts(0) == CudaFacts((10, 0), (12, 9), fp32_scales=asked)


def test_a_stage_that_the_scan_cannot_address_is_named() -> None:
    recipe = compose(["recipe=nano_12b_v2"]).recipe
    stage = recipe.stages["long_context"]
    recipe.stages["long_context"] = replace(stage, parallel=ParallelConfig(tensor=4, sequence=True))
    check_scan(recipe, "pretrain")
    with pytest.raises(RecipeError, match=r"^stages\.long_context\.sequence_length: in_proj's .* raise parallel\.cont"):
        check_cuda(recipe, HOPPER)
    recipe.model.pattern = "*-"
    check_cuda(recipe, HOPPER)


def test_context_parallel_ranks_keep_a_copy_of_a_group() -> None:
    recipe = compose(["recipe=tiny"]).recipe
    recipe.parallel = ParallelConfig(context=16)
    # Two heads of 16 channels and one group of 32 states: z, x, B, C and dt are 4 x 32 + 2 rows.
    stage = recipe.stages["pretrain"] = replace(
        recipe.stages["pretrain"], micro_batch_size=1, sequence_length=(2**31 - 1) // 130
    )
    check_scan(recipe, "pretrain")
    stage.sequence_length += 1
    with pytest.raises(RecipeError, match="in_proj's output"):
        check_scan(recipe, "pretrain")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mamba_conv_width", 5, r"^model\.mamba_conv_width: causal-conv1d has widths 2 to 4, not 5; write 4"),
        ("mamba_head_dim", 33, r"^parallel\.tensor: .* 1180 channels .* a multiple of 8; lower tensor or context"),
    ],
)
def test_a_convolution_without_a_kernel(field: str, value: int, message: str) -> None:
    recipe = compose(["recipe=tiny"]).recipe
    widths: dict[str, Any] = {"mamba_num_heads": 28, "mamba_num_groups": 4, "mamba_state_dim": 32, "mamba_head_dim": 32}
    recipe.model = replace(recipe.model, **widths)
    check_convolution(recipe, "pretrain")
    setattr(recipe.model, field, value)
    with pytest.raises(RecipeError, match=message):
        check_convolution(recipe, "pretrain")
    recipe.model.pattern = "*-"
    check_convolution(recipe, "pretrain")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("", None),
        ("parallel.pipeline=5", None),
        ("parallel.pipeline=6", "first_linears: 4 linears are 2 layers, .* 11 layers // 6 pipeline stages = 1 at an "
         r"end; write precision\.bf16_first_linears=2 precision\.bf16_last_linears=2, or parallel\.pipeline=5 or less"),
        ("parallel.pipeline=6 precision.bf16_first_linears=2", r"last_linears: .*; write [^ ]+\.bf16_last_linears=2,"),
        ("parallel.pipeline=6 precision=bf16", None),
    ],
)  # fmt: skip
def test_bf16_layers_at_an_end_of_a_pipeline(overrides: str, message: str | None) -> None:
    arguments = ["recipe=tiny", "cluster.gpus=30", "stages.pretrain.global_batch_size=240", *overrides.split()]
    recipe = compose(arguments).recipe
    if message is None:
        check_bf16_layers(recipe, "pretrain")
        return
    with pytest.raises(RecipeError, match=rf"^precision\.bf16_{message}"):
        check_cuda(recipe, HOPPER)


def test_fp32_attention_under_context_parallelism() -> None:
    recipe = compose(["recipe=tiny", "precision=fp32", "data.document_boundaries=ignore"]).recipe
    check_attention(recipe, "pretrain")
    recipe.parallel = ParallelConfig(context=2)
    with pytest.raises(
        RecipeError, match=r"^parallel\.context: .* no FP32 .*; write parallel\.context=1, precision\.name=bf16 or"
    ):
        check_attention(recipe, "pretrain")
    recipe.data.document_boundaries = "reset"
    check_attention(recipe, "pretrain")
    recipe.data.document_boundaries, recipe.model.pattern = "ignore", "M-"
    check_attention(recipe, "pretrain")


@pytest.mark.parametrize(
    ("graphs", "segments", "capability", "refused"),
    [
        (True, True, (9, 0), True),
        (True, True, (10, 0), False),
        (True, False, (9, 0), False),
        (False, True, (9, 0), False),
    ],
)
def test_graphs_whose_memory_two_would_manage(
    graphs: bool, segments: bool, capability: tuple[int, int], refused: bool
) -> None:
    recipe = compose(["recipe=tiny"]).recipe
    recipe.parallel = ParallelConfig(cuda_graphs=graphs)
    facts = CudaFacts(capability, (12, 9), segments_in_graphs=segments)
    if not refused:
        check_graphs(recipe, "pretrain", facts)
        return
    with pytest.raises(RecipeError, match=r"^parallel\.cuda_graphs: PYTORCH_CUDA_ALLOC_CONF .*; set NCCL_GRAPH_REGIS"):
        check_graphs(recipe, "pretrain", facts)


@pytest.mark.parametrize(("register", "together"), [(None, True), ("1", True), ("0", False)])
def test_the_environment_lets_two_manage_the_memory_of_graphs(
    monkeypatch: pytest.MonkeyPatch, register: str | None, together: bool
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda local_rank: (9, 0))
    monkeypatch.delenv("NCCL_GRAPH_REGISTER", raising=False)
    assert not cuda.cuda_facts(0).segments_in_graphs
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512,expandable_segments:True")
    if register is not None:
        monkeypatch.setenv("NCCL_GRAPH_REGISTER", register)
    assert cuda.cuda_facts(0).segments_in_graphs == together


def test_train_checks_before_it_prepares_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu: Any = SimpleNamespace(name="cuda")
    monkeypatch.setattr(run, "current_platform", lambda: gpu)
    monkeypatch.setattr(cuda, "cuda_facts", lambda local_rank: CudaFacts((8, 0), (12, 9)))
    with pytest.raises(RecipeError, match=r"^precision\.name: fp8_blockwise needs"):
        run._train(compose(["recipe=nano_12b_v2"]).recipe, (), tmp_path, Ranks(0, 1, 0), StopRequest(), gpu)
