"""Where a step's time goes, and how far it is from the rate of plain matrix products.

    python -m benchmarks.profile_step [--hidden 256|1024] [--precision fp32|bf16] [--kernels auto|plain] [--threads 2]

The model is that of `benchmarks.step`, or its shape at hidden size 1,024. Seconds are the self times of torch's
operators and of the native kernels, summed over three steps; the bound is the model's FLOPs (`recipe.flops`) at the
best rate of a few matrix products.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.step import MODEL, ours
from nano_pretrain.kernels.native.library import Library
from nano_pretrain.parallel.groups import process_groups, ranks_from_environment
from nano_pretrain.platform import current_platform
from nano_pretrain.recipe.flops import count_flops
from nano_pretrain.recipe.schema import ModelConfig, PrecisionConfig, Recipe

LARGER = ModelConfig(
    pattern=MODEL.pattern,
    hidden_size=1024,
    ffn_hidden_size=4096,
    num_attention_heads=16,
    num_query_groups=4,
    head_dim=64,
    mamba_num_heads=32,
    mamba_head_dim=64,
    mamba_num_groups=4,
    mamba_state_dim=128,
    vocab_size=8192,
    init_std=0.02,
)
MODELS = {256: (MODEL, 4), 1024: (LARGER, 1)}
"""Model and micro-batch size by hidden size."""
LENGTH, STEPS = 1024, 3

KINDS = {
    "aten::mm": "linears and head",
    "aten::addmm": "linears and head",
    "aten::bmm": "scan",
    "aten::_fused_adamw_": "optimizer",
    "aten::copy_": "copies and casts",
}
"""Operators by kind; a native kernel is its own kind, every other operator `elementwise and rest`."""


def native_calls_are_seen() -> None:
    """Let the profiler see the native kernels, which it does not know as operators."""
    call: Any = Library.call

    def seen(library: Library, name: str, *arguments: Any) -> None:
        with record_function(f"native {name}"):
            call(library, name, *arguments)

    setattr(Library, "call", seen)  # noqa: B010 - mypy takes an assignment for a mistake


def seconds_by_kind(events: Any) -> Counter[str]:
    """Self time of each kind in seconds."""
    found: Counter[str] = Counter()
    for event in events:
        name = event.key
        kind = name if name.startswith("native ") else KINDS.get(name, "elementwise and rest")
        found[kind] += event.self_cpu_time_total * 1e-6
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, choices=MODELS, default=256)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--kernels", choices=("auto", "native", "plain"), default="auto")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    model, batch = MODELS[options.hidden]
    recipe = Recipe(model=model, precision=PrecisionConfig(name=options.precision))
    platform = current_platform()
    platform.prepare(0, options.threads, options.kernels)
    native_calls_are_seen()
    peak = platform.peak_flops(torch.bfloat16 if options.precision == "bf16" else torch.float32) or 0.0
    with process_groups(platform, ranks_from_environment(), recipe.parallel, 600):
        tokens = torch.randint(0, model.vocab_size, (batch, LENGTH))
        step = ours(recipe, tokens, tokens.roll(-1, 1))
        step()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        wall = time.perf_counter() - start
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(STEPS):
                step()
    bound = STEPS * batch * LENGTH * count_flops(model, LENGTH).training / peak
    spent = seconds_by_kind(profiler.key_averages())
    print(f"hidden {options.hidden}, {options.precision}, {options.threads} threads, kernels: {platform.kernels()}")
    speed = STEPS * batch * LENGTH / wall
    print(f"  {speed:,.0f} tokens/s, {bound / wall:.0%} of what its FLOPs allow at {peak / 1e9:,.0f} GFLOP/s")
    for kind, seconds in spent.most_common(16):
        print(f"  {seconds / sum(spent.values()):6.1%}  {seconds / STEPS * 1e3:8.1f} ms  {kind}")


if __name__ == "__main__":
    main()
