"""What can be said about the CUDA platform without a GPU: what it imports exists in the installed megatron-core."""

import ast

import pytest
import torch

from nano_pretrain.platform.cuda import GUARDS, CudaPlatform, _without_documents
from nano_pretrain.recipe.errors import UserError
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


def test_missing_gpu_library_is_named_with_both_ways_out() -> None:
    """Without it megatron-core would build the model from mocks."""
    with pytest.raises(
        UserError, match=r"transformer_engine: not installed.*CUDA_VISIBLE_DEVICES= to train on the CPU"
    ):
        CudaPlatform().prepare(0, None)


def test_documents_are_refused_by_an_attention_that_would_ignore_them() -> None:
    class WholeSequences(torch.nn.Module):
        def forward(self, query: str, key: str, value: str, attention_mask: object) -> str:
            return query + key + value

    attention = _without_documents(WholeSequences)()
    assert attention("q", "k", "v", None) == "qkv"
    with pytest.raises(UserError, match=r"data\.document_boundaries: reset is not available"):
        attention("q", "k", "v", torch.zeros(1, 4))
