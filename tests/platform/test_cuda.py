"""What can be said about the CUDA platform without a GPU: what it imports exists in the installed megatron-core."""

import ast
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from nano_pretrain.kernels import document_attention
from nano_pretrain.platform import Platform
from nano_pretrain.platform.base import Memory
from nano_pretrain.platform.cuda import GUARDS, CudaPlatform, with_documents, without_extra_state
from nano_pretrain.recipe.errors import RecipeError, UserError
from nano_pretrain.recipe.schema import ParallelConfig
from tests.model.building import batch, build, losses
from tests.model.recipes import ALONE, small_recipe
from tests.platform.sources import PRODUCT, bound_names, megatron_imports, megatron_source


def test_the_names_it_imports_exist() -> None:
    imports = list(megatron_imports(PRODUCT / "platform" / "cuda.py"))
    assert imports
    for module, name in imports:
        assert name in bound_names(megatron_source(module)), f"{module}.{name}"


def test_the_mixer_calls_what_is_guarded() -> None:
    mixer = megatron_source("megatron.core.ssm.mamba_mixer")
    called = {n.func.id for n in ast.walk(mixer) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert set(GUARDS) <= called


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 80GB HBM3", torch.float32, 494.7e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, None),
    ],
)
def test_peak_of_the_data_sheet(
    device: str, dtype: torch.dtype, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    assert CudaPlatform().peak_flops(dtype) == (None if expected is None else pytest.approx(expected))


def test_memory_is_that_of_the_ranks_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [SimpleNamespace(name=f"GPU {rank}", total_memory=(rank + 1) * 10**10) for rank in range(2)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    assert CudaPlatform().memory(1) == Memory("GPU 1", 2 * 10**10, ranks=1)


def test_missing_gpu_library_is_named_with_both_ways_out() -> None:
    """Without it megatron-core would build the model from mocks."""
    with pytest.raises(
        UserError, match=r"transformer_engine: not installed.*CUDA_VISIBLE_DEVICES= to train on the CPU"
    ):
        CudaPlatform().prepare(0, None)


class WholeSequences(torch.nn.Module):
    """In the place of Transformer Engine's attention: says what it was given."""

    def __init__(self, config: object, pg_collection: object) -> None:
        super().__init__()

    def forward(self, query: str, key: str, value: str, attention_mask: object, attn_mask_type: str) -> str:
        assert attention_mask is None
        return query + key + value + attn_mask_type


@pytest.mark.parametrize("ranks", [1, 2])
def test_only_documents_take_another_attention(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(size=lambda: ranks)
    given: list[Any] = []

    def recorded(*arguments: Any) -> torch.Tensor:
        given.extend(arguments)
        return torch.zeros(5, 2, 4, 8)

    monkeypatch.setattr(document_attention, "document_attention", recorded)
    attention = with_documents(WholeSequences)(None, pg_collection=SimpleNamespace(cp=group))
    assert attention("q", "k", "v", None, attn_mask_type=" causal") == "qkv causal"
    assert not given
    documents = torch.zeros(2, 5 * ranks)
    assert attention("q", "k", "v", documents, attn_mask_type=" causal").shape == (5, 2, 32)
    assert given == ["q", "k", "v", documents, group if ranks > 1 else None]


def test_documents_reach_the_kernel_as_it_wants_them(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """causal-conv1d refuses others than int32, contiguous, [batch, length]; see test_cuda_signatures.py."""
    from megatron.core.ssm import mamba_mixer

    kernel, given = mamba_mixer.mamba_split_conv1d_scan_combined, []

    def recorded(*arguments: Any, **named: Any) -> torch.Tensor:
        given.append(named["seq_idx"])
        answer: torch.Tensor = kernel(*arguments, **named)
        return answer

    monkeypatch.setattr(mamba_mixer, "mamba_split_conv1d_scan_combined", recorded)
    recipe = small_recipe()
    losses(build(platform, recipe), batch(recipe))
    assert len(given) == recipe.model.pattern.count("M")
    for documents in given:
        assert documents.dtype == torch.int32
        assert documents.is_contiguous()
        assert documents.shape == (2, 48)


def test_a_module_without_extra_state_has_only_its_parameters() -> None:
    class WithState(torch.nn.Linear):
        def get_extra_state(self) -> torch.Tensor:
            return torch.empty(0)

    assert "_extra_state" in WithState(2, 3).state_dict()
    module = without_extra_state(WithState)(2, 3)
    assert isinstance(module, WithState)
    assert set(module.state_dict()) == {"weight", "bias"}
    module.load_state_dict(module.state_dict())


@dataclass
class UserBuffers:
    """In the place of `transformer_engine.pytorch.module.base`."""

    given: dict[str, Any]
    UserBufferQuantizationMode: ClassVar[Any] = SimpleNamespace(NONE="none", FP8="fp8")

    def initialize_ub(self, **arguments: Any) -> None:
        self.given |= arguments


@pytest.mark.parametrize(("precision", "modes"), [("bf16", ["none"]), ("fp8_blockwise", ["fp8", "none"])])
def test_user_buffers_hold_the_tokens_of_a_micro_batch(
    precision: str, modes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = UserBuffers({})
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module.base", base)
    layout = ParallelConfig(tensor=2, context=2, sequence=True, tensor_overlap=True)
    recipe = small_recipe(precision)
    recipe.stages["other"] = replace(recipe.stages["pretrain"], sequence_length=96)
    recipe.stages["pretrain"].parallel = layout
    assert CudaPlatform().prepare_model(recipe, layout) == {"tp_comm_overlap": True, "cuda_graph_impl": "none"}
    # Two samples of 48 tokens, of which context parallelism leaves half.
    assert base.given == {
        "shape": [48, 24],
        "tp_size": 2,
        "quantization_modes": modes,
        "dtype": torch.bfloat16,
        "bootstrap_backend": "nccl",
    }


def test_graphs_get_generators_that_they_can_register(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import tensor_parallel

    given: dict[str, Any] = {}
    monkeypatch.setattr(tensor_parallel, "model_parallel_cuda_manual_seed", lambda seed, **named: given.update(named))
    assert CudaPlatform().prepare_model(small_recipe(), ParallelConfig())["cuda_graph_impl"] == "none"
    assert not given
    found = CudaPlatform().prepare_model(small_recipe(), ParallelConfig(cuda_graphs=True))
    assert found == {"tp_comm_overlap": False, "cuda_graph_impl": "local"}
    assert given == {"use_cudagraphable_rng": True, "force_reset_rng": True}


@pytest.mark.parametrize("option", ["tensor_overlap", "cuda_graphs"])
@pytest.mark.parametrize("of_stage", [False, True])
def test_a_cpu_refuses_what_needs_a_gpu(option: str, of_stage: bool, platform: Platform) -> None:
    recipe = small_recipe()
    layout = replace(ALONE)
    setattr(layout, option, True)
    field = "parallel"
    if of_stage:
        field = "stages.pretrain.parallel"
        recipe.stages["pretrain"].parallel = layout
    else:
        recipe.parallel = layout
    from nano_pretrain.model.hybrid import build_model

    with pytest.raises(RecipeError, match=rf"^{field}\.{option}: needs a GPU, .*; write {field}\.{option}=false$"):
        build_model(recipe, layout, platform, 48)
    build(platform, recipe)  # another layout, as that of `generate`
