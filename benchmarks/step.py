"""Tokens per second of a whole step (forward, backward, Adam) against transformers' NemotronH, in one run.

    python -m benchmarks.step [--precision fp32|bf16] [--kernels auto|native|plain] [--repeats 7] [--threads 2]

Both models have the same shapes, both run with denormals flushed; a figure is the median of the repeats, in turn. The
peer runs with torch as it comes, and in FP32 a second time with the matrix products that this project's platform
chooses (`platform/products.py`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from nano_pretrain.parallel.groups import process_groups, ranks_from_environment
from nano_pretrain.platform import current_platform
from nano_pretrain.recipe.schema import ModelConfig, PrecisionConfig, Recipe

MODEL = ModelConfig(
    pattern="M-M-M-M*-",
    hidden_size=256,
    ffn_hidden_size=1024,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=32,
    mamba_num_heads=16,
    mamba_head_dim=32,
    mamba_num_groups=4,
    mamba_state_dim=64,
    vocab_size=8192,
    init_std=0.05,
)
LENGTH, BATCH = 1024, 4


def ours(recipe: Recipe, tokens: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """A step of this project's trainer."""
    from nano_pretrain.data.loader import MicroBatch
    from nano_pretrain.model.hybrid import build_model
    from nano_pretrain.train.step import Trainable

    platform = current_platform()
    trainable = Trainable(recipe, recipe.parallel, platform, build_model(recipe, recipe.parallel, platform, LENGTH))
    batch = MicroBatch(tokens, labels, None)

    def step() -> None:
        trainable.step(iter([batch]), 1, (LENGTH, BATCH), 1e-3, stop=False)
        platform.synchronize()

    return step


def theirs(recipe: Recipe, tokens: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """A step of transformers' model with torch's fused AdamW."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    model = recipe.model
    config = NemotronHConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        hybrid_override_pattern=model.pattern,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.head_dim,
        mamba_num_heads=model.mamba_num_heads,
        mamba_head_dim=model.mamba_head_dim,
        n_groups=model.mamba_num_groups,
        ssm_state_size=model.mamba_state_dim,
        chunk_size=128,
        use_cache=False,
    )
    dtype = torch.float32 if recipe.precision.name == "fp32" else torch.bfloat16
    peer = NemotronHForCausalLM(config).to(dtype)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        logits = peer(tokens).logits.float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()

    return step


def torch_products() -> Any:
    """torch's setting for FP32 matrix products on a CPU."""
    mkldnn: Any = torch.backends.mkldnn
    return mkldnn.matmul


def with_default_products(step: Callable[[], None]) -> Callable[[], None]:
    """The step with the matrix products that torch chooses by itself."""

    def defaulted() -> None:
        before = torch_products().fp32_precision
        torch_products().fp32_precision = "none"
        step()
        torch_products().fp32_precision = before

    return defaulted


def measure(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each step; one unmeasured step each first, then in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Print the speeds, and how many times slower than ours each is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--kernels", choices=("auto", "native", "plain"), default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    recipe = Recipe(model=MODEL, precision=PrecisionConfig(name=options.precision))
    platform = current_platform()
    device = platform.prepare(0, options.threads, options.kernels)
    with process_groups(platform, ranks_from_environment(), recipe.parallel, 600):
        tokens = torch.randint(0, MODEL.vocab_size, (BATCH, LENGTH), device=device)
        labels = tokens.roll(-1, 1)
        steps = {"nano_pretrain": ours(recipe, tokens, labels)}
        if device.type == "cpu":
            peer = theirs(recipe, tokens, labels)
            steps["transformers"] = with_default_products(peer)
            if options.precision == "fp32" and torch_products().fp32_precision != "none":
                steps["transformers, our products"] = peer
        medians = measure(steps, options.repeats)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {options.threads} threads"
    for name, seconds in medians.items():
        ratio = seconds / medians["nano_pretrain"]
        print(f"{name:27} {options.precision}  {BATCH * LENGTH / seconds:9,.0f} tokens/s  ratio {ratio:.2f}  ({where})")
    print(f"kernels: {platform.kernels()}")


if __name__ == "__main__":
    main()
