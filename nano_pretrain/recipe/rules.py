"""Cross-field rules; each is a small function whose message names the field and the fix."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from nano_pretrain.recipe.derived import stage_layout
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.pattern import count_layers
from nano_pretrain.recipe.rules_evaluate import evaluation
from nano_pretrain.recipe.rules_fp8 import fp8_multiples
from nano_pretrain.recipe.rules_gpu import cuda_graphs, tensor_overlap
from nano_pretrain.recipe.rules_precision import bf16_linears
from nano_pretrain.recipe.rules_ranks import check_layout, divides
from nano_pretrain.recipe.rules_stages import batch_ramps, whole_steps
from nano_pretrain.recipe.schema import Recipe

POSITIVE = frozenset({
    "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "mamba_num_heads",
    "mamba_head_dim", "mamba_num_groups", "mamba_state_dim", "mamba_conv_width", "norm_epsilon", "init_std", "tensor",
    "pipeline", "context", "eps", "clip_grad", "lr", "tokens", "sequence_length", "micro_batch_size",
    "global_batch_size", "gpus", "train_bytes", "max_bytes_per_source", "max_epochs", "quota_window",
    "tokens_per_source", "keep", "timeout_seconds", "threads_per_rank", "peak_tflops", "max_new_tokens",
    "grace_seconds", "share", "storage_gigabytes_per_second", "checkpoint",
    "bucket_size", "concurrency", "examples", "extend_to", "file_gigabytes", "harness_limit",
})  # fmt: skip
"""Last names of the fields that must be above 0."""

NOT_NEGATIVE = frozenset({
    "bf16_first_linears", "bf16_last_linears", "weight_decay", "min_lr", "warmup_tokens", "decay_tokens", "every",
    "fp8_every", "temperature", "seed", "ramp_tokens", "start", "increment",
})  # fmt: skip
"""Last names of the fields that must be 0 or above."""

LARGEST = {
    "seed": 2**63 - 1,
    "tokens": 10**18,
    "extend_to": 10**18,
    "ramp_tokens": 10**18,
    "checkpoint": 10**18,
    "bucket_size": 10**12,
    "max_new_tokens": 10**6,
    "examples": 10**6,
    "harness_limit": 10**9,
    "file_gigabytes": 10**6,
    "timeout_seconds": 10**7,
    "grace_seconds": 10**7,
    "threads_per_rank": 4096,
    "concurrency": 4096,
    **dict.fromkeys(("hidden_size", "ffn_hidden_size", "vocab_size", "mamba_state_dim", "mamba_conv_width"), 10**8),
    **dict.fromkeys(("num_attention_heads", "num_query_groups", "head_dim"), 10**6),
    **dict.fromkeys(("mamba_num_heads", "mamba_head_dim", "mamba_num_groups"), 10**6),
    **dict.fromkeys(("tensor", "pipeline", "context"), 10**6),
    **dict.fromkeys(("max_epochs", "keep", "peak_tflops", "storage_gigabytes_per_second"), 10**6),
    **dict.fromkeys(("sequence_length", "global_batch_size", "micro_batch_size", "gpus", "start", "increment"), 10**9),
    **dict.fromkeys(("train_bytes", "max_bytes_per_source", "tokens_per_source"), 10**15),
    "quota_window": 2**20,
    "share": 1,
    **dict.fromkeys(("every", "fp8_every"), 10**15),
    **dict.fromkeys(("lr", "init_std", "weight_decay", "temperature"), 100),
    **dict.fromkeys(("norm_epsilon", "eps"), 1),
}
"""Last names of the fields that must not be above; larger values fail late, in a library."""

TEKKEN_VOCAB_SIZE = 131_072
"""Entries of the Tekken tokenizer, special tokens included."""

CHOICES = {
    "precision.name": ("fp32", "bf16", "fp8_blockwise", "fp8_current_scaling"),
    "recompute.granularity": ("none", "selective", "full"),
    "data.document_boundaries": ("ignore", "reset"),
    "data.tokenizer.kind": ("bpe", "tekken", "file"),
    "data.long_qa.writer": ("extractive", "openai"),
    "log.wandb": ("offline", "online", "disabled"),
    "launch.kind": ("local",),
    "plan.format": ("text", "json"),
    "hf.dtype": ("stored", "bf16", "fp32"),
    "cluster.cpu_kernels": ("auto", "native", "plain"),
}


def check(recipe: Recipe) -> None:
    """Apply every rule that needs nothing but the recipe.

    Raises:
        RecipeError: the first rule that is broken.
    """
    check_fields(recipe)
    for rule in RULES:
        rule(recipe)


def check_fields(recipe: Recipe) -> None:
    """Apply what holds for each field by itself: ranges of numbers, words to choose from.

    Raises:
        RecipeError: the first field that is out of range.
    """
    for name, value in _leaves(recipe, ""):
        _check_number(name, value)
        _check_choice(name, value)


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted name and value of each plain field."""
    for item in fields(node):
        value, name = getattr(node, item.name), prefix + item.name
        if is_dataclass(value):
            yield from _leaves(value, f"{name}.")
        elif isinstance(value, dict) and all(is_dataclass(v) for v in value.values()):
            for key, part in value.items():
                yield from _leaves(part, f"{name}.{key}.")
        else:
            yield name, value


def _check_number(name: str, value: Any) -> None:
    last = name.rpartition(".")[2]
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise RecipeError(name, f"{value} is not a finite number", "write a number")
    if last in POSITIVE and value <= 0:
        raise RecipeError(name, f"{value} is not positive", "write a number above 0")
    if last in NOT_NEGATIVE and value < 0:
        raise RecipeError(name, f"{value} is negative", "write 0 or more")
    if value > LARGEST.get(last, math.inf):
        raise RecipeError(name, f"{value} is too large", f"write at most {LARGEST[last]}")


def _check_choice(name: str, value: Any) -> None:
    choices = CHOICES.get(name)
    if choices and value not in choices:
        raise RecipeError(name, f"{value!r} is unknown", f"choose one of {', '.join(choices)}")


def model_shapes(recipe: Recipe) -> None:
    """The pattern's letters, heads against groups, a vocabulary that holds the special tokens."""
    model = recipe.model
    counts = count_layers(model.pattern)
    if counts.attention:
        divides(
            "model.num_attention_heads", model.num_attention_heads, model.num_query_groups, "model.num_query_groups"
        )
    if counts.mamba:
        divides("model.mamba_num_heads", model.mamba_num_heads, model.mamba_num_groups, "model.mamba_num_groups")
    if model.vocab_size < 512:
        raise RecipeError(
            "model.vocab_size",
            f"{model.vocab_size} does not hold 256 bytes and the special tokens",
            "write 512 or more",
        )


def data_settings(recipe: Recipe) -> None:
    """The vocabulary of a tokenizer that is not trained here; a held-out share that leaves text to train on."""
    vocab_size, share = recipe.model.vocab_size, recipe.data.heldout_share
    if recipe.data.tokenizer.kind == "tekken" and vocab_size != TEKKEN_VOCAB_SIZE:
        raise RecipeError(
            "model.vocab_size",
            f"Tekken has {TEKKEN_VOCAB_SIZE} entries, not {vocab_size}",
            f"write model.vocab_size={TEKKEN_VOCAB_SIZE}",
        )
    if recipe.data.tokenizer.kind == "file" and recipe.data.tokenizer.file is None:
        raise RecipeError("data.tokenizer.file", "is not given", "write data.tokenizer.file=PATH of a tokenizer.json")
    if not 0 < share < 0.5:
        raise RecipeError("data.heldout_share", f"{share} is outside (0, 0.5)", "write for example 0.01")


def optimizer_ranges(recipe: Recipe) -> None:
    """Decay of the moments in [0, 1); the nucleus of the sampling in (0, 1]."""
    for name in ("beta1", "beta2"):
        value = getattr(recipe.optimizer, name)
        if not 0 <= value < 1:
            raise RecipeError(f"optimizer.{name}", f"{value} is outside [0, 1)", "write for example 0.9")
    if not 0 < recipe.generate.top_p <= 1:
        raise RecipeError("generate.top_p", f"{recipe.generate.top_p} is outside (0, 1]", "write for example 0.95")


def layouts(recipe: Recipe) -> None:
    """Each stage's layout divides the model, the ranks and the batch."""
    if not recipe.stages:
        raise RecipeError(
            "stages", "the recipe has no stage", "add stages.NAME.tokens and the rest, or choose a recipe"
        )
    if recipe.plan.search:
        # The search checks each layout it tries; the command line refuses `plan.search` to every other verb.
        return
    for name in recipe.stages:
        check_layout(recipe, name)


def distributed_optimizer(recipe: Recipe) -> None:
    """Replicated optimizer state is for FP32 runs: megatron-core 0.16 cannot save it for a BF16 Mamba model."""
    for name, stage in recipe.stages.items():
        prefix = f"stages.{name}.parallel" if stage.parallel else "parallel"
        sharded = stage_layout(recipe, stage).distributed_optimizer
        if not sharded and recipe.precision.name != "fp32":
            raise RecipeError(
                f"{prefix}.distributed_optimizer",
                f"false cannot be checkpointed under {recipe.precision.name}",
                f"write {prefix}.distributed_optimizer=true",
            )
        if sharded != recipe.parallel.distributed_optimizer:
            raise RecipeError(
                f"{prefix}.distributed_optimizer",
                "differs from parallel.distributed_optimizer, and a checkpoint cannot change it",
                "write the same in all stages",
            )


def profiled_steps(recipe: Recipe) -> None:
    """The profile is of a first to a last step."""
    steps = recipe.log.profile
    if steps is not None and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
        raise RecipeError("log.profile", f"{list(steps)} is not a first and a last step", "write for example [10,12]")


def validation_reads_samples(recipe: Recipe) -> None:
    """The held-out tokens of a source hold at least one sample of every stage."""
    read = recipe.validation.tokens_per_source
    longest = max(stage.sequence_length for stage in recipe.stages.values())
    if read < longest:
        raise RecipeError(
            "validation.tokens_per_source", f"{read} is less than a sample of {longest}", f"write at least {longest}"
        )


def names(recipe: Recipe) -> None:
    """The run's name is one directory name, directories and the corpus are named."""
    directories = {"run.dir": recipe.run.dir, "data.path": recipe.data.path, "data.cache_dir": recipe.data.cache_dir}
    for field, directory in directories.items():
        if not directory:
            raise RecipeError(field, "is empty", "write a directory, or . for this one")
    if not recipe.data.corpus:
        raise RecipeError("data.corpus", "is empty", "write the name of a file in data_blend/corpora")
    name = recipe.run.name
    if (name is not None and not re.fullmatch(r"[A-Za-z0-9_=.,+-]{1,200}", name)) or name in (".", ".."):
        raise RecipeError("run.name", f"{name!r} is not a directory name", "use letters, digits and _ = . , + -")


RULES: tuple[Callable[[Recipe], None], ...] = (
    model_shapes,
    data_settings,
    optimizer_ranges,
    bf16_linears,
    layouts,
    fp8_multiples,
    distributed_optimizer,
    tensor_overlap,
    cuda_graphs,
    profiled_steps,
    validation_reads_samples,
    evaluation,
    whole_steps,
    batch_ramps,
    names,
)
