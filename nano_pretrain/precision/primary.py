"""Weights that Transformer Engine holds as FP8 tensors, while they get their first values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def in_high_precision(model: nn.Module) -> Iterator[None]:
    """Give the model plain tensors for these weights; what they hold at the end is quantised into the model's own.

    Transformer Engine keeps the values that such a weight was made of, in its first dtype and on the CPU, and
    megatron-core's optimizer begins with those (`get_high_precision_init_val`). The constructors' are not the initial
    ones, and parts of a quantised tensor are copies. A model without such weights stays as it is. After an exception
    the model has its own weights again, with the values they had.
    """
    held: list[tuple[nn.Module, str, Any]] = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if hasattr(parameter, "get_high_precision_init_val")
    ]
    for module, name, parameter in held:
        setattr(module, name, nn.Parameter(parameter.get_high_precision_init_val()))
    try:
        yield
    finally:
        for module, name, parameter in held:
            setattr(module, name, parameter)
    with torch.no_grad():
        for _, _, parameter in held:
            parameter.copy_(parameter.get_high_precision_init_val().to(parameter.device))
