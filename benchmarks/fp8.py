"""Time of a linear, and of a training step, with FP8 operands against BF16, in one run.

    python -m benchmarks.fp8 [--sizes 512 1024] [--tokens 2048] [--repeats 7] [--threads 2]

Input, weight and output are BF16, and so is the weight's gradient, which is added to an FP32 buffer as in a run. A
figure is the median of the repeats, which take turns; denormals are flushed, as in a run.

A step is forward, backward and update of a hybrid with layers of each kind, whose linears are all quantised: also with
their losses counted, as every `log.fp8_every`-th step does. Its memory is the largest of a process of its own that
takes two steps.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step import measure
from nano_pretrain.kernels.native.library import implementation
from nano_pretrain.parallel.groups import Ranks, process_groups
from nano_pretrain.platform import Platform, current_platform
from nano_pretrain.precision.linear import BLOCKWISE, CURRENT_SCALING, Fp8Recipe
from nano_pretrain.precision.losses import QuantisationLosses
from nano_pretrain.precision.parallel import Fp8Forward
from nano_pretrain.recipe.schema import ModelConfig, PrecisionConfig, Recipe

Linear = Callable[[Tensor, Tensor], Tensor]


def fp8_linear(recipe: Fp8Recipe) -> Linear:
    """The trainer's, on one rank."""
    forward = Fp8Forward(recipe, 0, QuantisationLosses(["linear"]))
    return partial(forward, bias=None, allreduce_dgrad=False, sequence_parallel=False, tp_group=None)


LINEARS: dict[str, tuple[str, Linear]] = {
    "BF16": ("native", F.linear),
    "blockwise, native": ("native", fp8_linear(BLOCKWISE)),
    "blockwise, plain": ("plain", fp8_linear(BLOCKWISE)),
    "blockwise with FP32 scales, native": ("native", fp8_linear(replace(BLOCKWISE, power_of_two=False))),
    "current scaling, native": ("native", fp8_linear(CURRENT_SCALING)),
}
"""Name -> kernels in use, linear."""


def forward_and_backward(name: str, size: int, tokens: int) -> Callable[[], None]:
    """One use of a linear, both ways."""
    kernels, linear = LINEARS[name]
    x = torch.randn(tokens, size, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(size, size, dtype=torch.bfloat16) / size**0.5)
    gradient, main_grad = torch.randn(tokens, size, dtype=torch.bfloat16), torch.zeros(size, size)

    def step() -> None:
        x.grad = weight.grad = None
        with implementation(kernels):
            linear(x, weight).backward(gradient)
        assert weight.grad is not None
        main_grad.add_(weight.grad)

    return step


LENGTH = 1024
STEPS = ("bf16", "fp8_blockwise", "fp8_current_scaling")
"""Values of `precision.name`."""


def model_of(size: int) -> ModelConfig:
    """Two Mamba-2 layers, three feed-forward, one attention; wide as the 12B in proportion, for a vocabulary of 8k."""
    return ModelConfig(
        pattern="M-M-*-", hidden_size=size, ffn_hidden_size=4 * size, num_attention_heads=size // 64,
        num_query_groups=4, head_dim=64, mamba_num_heads=size // 32, mamba_head_dim=64, mamba_num_groups=8,
        mamba_state_dim=128, vocab_size=8192, init_std=0.02,
    )  # fmt: skip


def training_step(platform: Platform, precision: str, size: int, tokens: int) -> tuple[Any, Callable[[], None]]:
    """A model, and a step of it."""
    from nano_pretrain.data.loader import MicroBatch
    from nano_pretrain.model.hybrid import build_model
    from nano_pretrain.train.step import Trainable

    recipe = Recipe(model=model_of(size), precision=PrecisionConfig(precision))
    model = build_model(recipe, recipe.parallel, platform, LENGTH)
    trainable = Trainable(recipe, recipe.parallel, platform, model)
    shape = LENGTH, tokens // LENGTH
    batch = torch.randint(0, recipe.model.vocab_size, (shape[1], LENGTH))
    micro_batch = MicroBatch(batch, batch.roll(-1, 1), None)

    def step() -> None:
        trainable.step(iter([micro_batch]), 1, shape, 1e-3, stop=False)

    return model, step


@contextmanager
def one_rank(threads: int) -> Iterator[Platform]:
    """The platform with native kernels and process groups."""
    platform = current_platform()
    platform.prepare(0, threads, "native")
    with process_groups(platform, Ranks(0, 1, 0), Recipe().parallel, 600):
        yield platform


def peak_bytes(precision: str, size: int, tokens: int, threads: int) -> int:
    """Largest memory of this process after two steps."""
    with one_rank(threads) as platform:
        _, step = training_step(platform, precision, size, tokens)
        step()
        step()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def counted(model: Any, step: Callable[[], None]) -> Callable[[], None]:
    """The step with the losses of quantisation."""

    def watched() -> None:
        model.quantisation_losses.counting = True
        step()
        model.quantisation_losses.counting = False

    return watched


def print_steps(size: int, tokens: int, repeats: int, threads: int) -> None:
    """Seconds, ratio to BF16 and memory of a step in each precision."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = {name: pool.apply(peak_bytes, (name, size, tokens, threads)) for name in STEPS}
    with one_rank(threads) as platform:
        built = {name: training_step(platform, name, size, tokens) for name in STEPS}
        steps = {name: step for name, (_, step) in built.items()}
        medians = measure({**steps, "fp8_blockwise, counted": counted(*built["fp8_blockwise"])}, repeats)
    for name, seconds in medians.items():
        held = f"{memory[name] / 2**20:6,.0f} MiB" if name in memory else ""
        print(f"step at {size}  {name:24} {seconds * 1e3:7.0f} ms  ratio {seconds / medians['bf16']:.2f}  {held}")


def main() -> None:
    """Print milliseconds and ratios to BF16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    current_platform().prepare(0, options.threads, "native")
    for size in options.sizes:
        medians = measure({name: forward_and_backward(name, size, options.tokens) for name in LINEARS}, options.repeats)
        for name, seconds in medians.items():
            ratio = seconds / medians["BF16"]
            print(f"{options.tokens} x {size} x {size}  {name:40} {seconds * 1e3:7.2f} ms  ratio {ratio:.2f}")
    for size in options.sizes:
        print_steps(size, options.tokens, options.repeats, options.threads)


if __name__ == "__main__":
    main()
