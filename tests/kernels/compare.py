"""Comparing a kernel with a reference, values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., Tensor | tuple[Tensor, ...]]
Inputs = dict[str, Any]
"""Tensors, or None, by the kernel's argument names."""


def random_tensor(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def values_and_gradients(kernel: Kernel, inputs: Inputs, output_gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """The outputs, named by number, and the gradient of every floating-point input, named `d` and the input's name.

    Args:
        kernel: called with `inputs` by name.
        inputs: the floating-point ones are differentiated.
        output_gradients: gradient of each output.
    """
    leaves = {
        name: value.clone().requires_grad_() if value is not None and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    answer = kernel(**leaves)
    outputs = (answer,) if isinstance(answer, Tensor) else answer
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    scaled = [gradient.to(output.dtype) for output, gradient in zip(outputs, output_gradients, strict=True)]
    gradients = torch.autograd.grad(outputs, list(wanted.values()), scaled, allow_unused=True)
    found = {f"d{name}": g for name, g in zip(wanted, gradients, strict=True) if g is not None}
    return {str(number): output.detach() for number, output in enumerate(outputs)} | found


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor agrees in the Euclidean norm, relative to the expected one; zero must be zero."""
    assert actual.keys() == expected.keys(), f"{actual.keys() ^ expected.keys()} is off by its absence"
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, f"{worst} is off by {errors[worst]:.1e}, allowed {tolerance:.1e}"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor; infinite where a value is not finite."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).norm()
    if not difference.isfinite():
        return float("inf")
    return 0.0 if difference == 0 else float(difference / expected.double().norm())
