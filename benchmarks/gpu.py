"""Tokens per second and model FLOPs utilisation of 9B-shaped layers on one GPU: a whole BF16 step.

    python -m benchmarks.gpu [--repeats 10] [--log docs/log.md]

A model of a few layers of one kind, then one of all kinds in the 9B's proportions, each with a vocabulary that is small
beside them. A figure is the median of the repeats, kernels compiled before. What was measured is printed and appended
to the log; without a GPU nothing is measured and nothing appended.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from nano_pretrain.compose import compose
from nano_pretrain.parallel.groups import process_groups, ranks_from_environment
from nano_pretrain.platform import Platform, current_platform
from nano_pretrain.platform.versions import ON_CUDA
from nano_pretrain.recipe.errors import EXIT_USER_ERROR
from nano_pretrain.recipe.flops import count_flops
from nano_pretrain.recipe.schema import ParallelConfig, PrecisionConfig, Recipe

LENGTH, BATCH, VOCABULARY = 8192, 1, 8192
PATTERNS = {"Mamba-2": "MMMM", "feed-forward": "----", "attention": "****", "as the 9B": "M-M-M*-M-M-M-M-"}
WARMUP = 3
"""Steps before the first that counts: kernels are compiled and tuned in them."""


@dataclass(frozen=True)
class Speed:
    """Of the model of one pattern.

    Attributes:
        name: of the pattern.
        tokens_per_second: median.
        mfu: share of the GPU's dense BF16 peak that the model's FLOPs make; None where the peak is not known.
        gigabytes: largest memory of tensors.
    """

    name: str
    tokens_per_second: float
    mfu: float | None
    gigabytes: float


def recipe_of(pattern: str) -> Recipe:
    """The 9B's widths in BF16, with another pattern and a small vocabulary."""
    model = compose(["recipe=nano_9b_v2"]).recipe.model
    return Recipe(model=replace(model, pattern=pattern, vocab_size=VOCABULARY), precision=PrecisionConfig(name="bf16"))


def measure(name: str, platform: Platform, device: torch.device, repeats: int) -> Speed:
    """Median of the steps of the model of a pattern; the process groups exist."""
    from nano_pretrain.data.loader import MicroBatch
    from nano_pretrain.model.hybrid import build_model
    from nano_pretrain.train.step import Trainable

    recipe = recipe_of(PATTERNS[name])
    # The model before is held by cycles of its hooks.
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    model = build_model(recipe, recipe.parallel, platform, LENGTH)
    trainable = Trainable(recipe, recipe.parallel, platform, model)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), device=device)
    batch = MicroBatch(tokens, tokens.roll(-1, 1), None)
    seconds = []
    for _ in range(WARMUP + repeats):
        start = time.perf_counter()
        trainable.step(iter([batch]), 1, (LENGTH, BATCH), 1e-4, stop=False)
        platform.synchronize()
        seconds.append(time.perf_counter() - start)
    speed = BATCH * LENGTH / statistics.median(seconds[WARMUP:])
    peak = platform.peak_flops(torch.bfloat16)
    mfu = speed * count_flops(recipe.model, LENGTH).training / peak if peak else None
    return Speed(name, speed, mfu, torch.cuda.max_memory_allocated() / 1e9)


def block(device: str, day: str, speeds: list[Speed]) -> str:
    """A dated block for the log."""
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "megatron-core", *_installed()))
    lines = [
        f"## {day} · `make bench-gpu` ({device}, {versions})",
        "",
        f"One GPU, BF16, {BATCH} x {LENGTH:,} tokens, layers of the 9B; forward, backward, Adam.",
        "",
        "| layers | pattern | tokens/s | MFU | GB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for speed in speeds:
        mfu = "unknown" if speed.mfu is None else f"{speed.mfu:.1%}"
        row = (
            speed.name,
            f"`{PATTERNS[speed.name]}`",
            f"{speed.tokens_per_second:,.0f}",
            mfu,
            f"{speed.gigabytes:.1f}",
        )
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, ""])


def _installed() -> Iterator[str]:
    """The GPU libraries; `block` is also tested where there are none."""
    from importlib.util import find_spec

    return (package for package in ON_CUDA if find_spec(package.replace("-", "_")))


def main() -> int:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--log", type=Path, default=Path("docs/log.md"))
    options = parser.parse_args()
    platform = current_platform()
    if platform.name != "cuda":
        print("benchmarks.gpu: no GPU was found, and nothing is measured", file=sys.stderr)
        return EXIT_USER_ERROR
    device = platform.prepare(0, None)
    with process_groups(platform, ranks_from_environment(), ParallelConfig(), 600):
        speeds = [measure(name, platform, device, options.repeats) for name in PATTERNS]
    text = block(torch.cuda.get_device_name(), datetime.now(UTC).date().isoformat(), speeds)
    print(text)
    with options.log.open("a") as log:
        log.write(f"\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
