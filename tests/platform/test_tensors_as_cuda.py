"""Tensors pretend to be on a GPU only within the scope."""

import pytest
import torch

from nano_pretrain.platform.cpu import tensors_as_cuda


def test_types_are_named_as_on_a_gpu_within_the_scope() -> None:
    tensor = torch.ones(2, dtype=torch.bfloat16)
    with tensors_as_cuda():
        assert tensor.type() == "torch.cuda.BFloat16Tensor"
        assert tensor.type(torch.float32).dtype == torch.float32
        assert tensor.cuda() is tensor
    assert tensor.type() == "torch.BFloat16Tensor"


def test_tensors_are_restored_after_an_error() -> None:
    before = torch.Tensor.type, torch.Tensor.cuda
    with pytest.raises(KeyError), tensors_as_cuda():
        raise KeyError
    assert (torch.Tensor.type, torch.Tensor.cuda) == before
