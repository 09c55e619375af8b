"""Text from a checkpoint, a token at a time, with recurrent state and key/value cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nano_pretrain.checkpoint.files import write_whole
from nano_pretrain.checkpoint.manifest import MANIFEST, damaged_files, read_manifest, whole_checkpoint
from nano_pretrain.checkpoint.sharded import load_checkpoint
from nano_pretrain.data.shards import open_corpus
from nano_pretrain.parallel.groups import Ranks, process_groups
from nano_pretrain.platform import current_platform
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.schema import GenerateConfig, ParallelConfig, PrecisionConfig, Recipe


def generate(recipe: Recipe, options: GenerateConfig, run_dir: Path, prompts: Sequence[str]) -> list[str]:
    """Each prompt with its continuation, computed in the dtype of the weights: BF16 where the run was in FP8.

    Args:
        recipe: the run's recipe.
        options: length, sampling and checkpoint.
        run_dir: directory of the run.
        prompts: texts to continue.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or the corpus with the tokenizer is gone.
    """
    path = chosen_checkpoint(run_dir, options.checkpoint, "generate")
    corpus = open_corpus(Path(recipe.data.path))
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    tokenizer.encode_special_tokens = True
    encoded = [tokenizer.encode(prompt).ids or [corpus.eod_id] for prompt in prompts]
    texts: list[str] = []
    with model_of(recipe, path, max(map(len, encoded)) + options.max_new_tokens) as model:
        for prompt in encoded:
            ids = list(continuation(model, prompt, options, corpus.eod_id, recipe.model.vocab_size))
            texts.append(tokenizer.decode([*prompt, *ids], skip_special_tokens=False))
    return texts


ALONE = ParallelConfig(distributed_optimizer=False)
"""The layout of `model_of`."""


@contextmanager
def model_of(recipe: Recipe, checkpoint: Path, longest: int) -> Iterator[Any]:
    """The model of a checkpoint on one rank, in the dtype of its weights, with the process groups of that rank.

    Args:
        recipe: the run's recipe.
        checkpoint: a whole checkpoint.
        longest: most tokens of a sequence.
    """
    platform = current_platform()
    platform.prepare(0, recipe.cluster.threads_per_rank, recipe.cluster.cpu_kernels)
    from nano_pretrain.model.hybrid import build_model

    with process_groups(platform, Ranks(0, 1, 0), ALONE, recipe.cluster.timeout_seconds):
        model = build_model(without_fp8(recipe), ALONE, platform, longest)
        load_checkpoint(checkpoint, model, optimizer=None)
        yield model


def without_fp8(recipe: Recipe) -> Recipe:
    """The recipe as one rank evaluates and generates: BF16 where the run was in FP8."""
    # A step of generation has one token, and Transformer Engine's FP8 products take multiples of 16.
    if not recipe.precision.name.startswith("fp8"):
        return recipe
    return replace(recipe, precision=PrecisionConfig(name="bf16"))


IDENTITY = ("tokens", "prompt", "temperature", "top_p", "seed")
"""What makes two lines of samples.jsonl the same sample."""


def record_samples(run_dir: Path, options: GenerateConfig, prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Write samples to the run's samples.jsonl; a sample that was drawn before is replaced."""
    path = run_dir / "samples.jsonl"
    tokens = int(whole_checkpoint(run_dir, options.checkpoint, "generate.checkpoint").name)
    common = {"tokens": tokens, "temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
    new = [{**common, "prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
    old = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    drawn = [[sample[name] for name in IDENTITY] for sample in new]
    kept = [sample for sample in old if [sample.get(name) for name in IDENTITY] not in drawn]
    write_whole(path, "".join(f"{json.dumps(sample)}\n" for sample in [*kept, *new]))


def continuation(model: Any, prompt: list[int], options: GenerateConfig, eod_id: int, vocab_size: int) -> Iterator[int]:
    """Sampled token ids, one forward pass of one token each; ends before `eod_id`.

    Args:
        model: model of one rank.
        prompt: token ids, at least one.
        options: sampling.
        eod_id: id that ends a document.
        vocab_size: entries of the tokenizer; padding is never sampled.
    """
    from megatron.core.inference.contexts import StaticInferenceContext

    model.eval()
    generator = torch.Generator().manual_seed(options.seed)
    context = StaticInferenceContext(1, len(prompt) + options.max_new_tokens)
    device = next(model.parameters()).device
    tokens = torch.tensor([prompt], device=device)
    for _ in range(options.max_new_tokens):
        logits = next_logits(model, tokens, context)[0, :vocab_size]
        chosen = sample(logits.float().cpu(), options, generator)
        if chosen == eod_id:
            return
        yield chosen
        tokens = torch.tensor([[chosen]], device=device)


@torch.no_grad()
def next_logits(model: Any, tokens: Tensor, context: Any) -> Tensor:
    """Logits [batch, vocab] after `tokens` [batch, new tokens], which continue what the context has seen."""
    logits: Tensor = model(tokens, None, None, inference_context=context, runtime_gather_output=True)
    context.increment_sequence_len_offset(tokens.shape[1])
    return logits[:, -1]


def sample(logits: Tensor, options: GenerateConfig, generator: torch.Generator) -> int:
    """A token id: the likeliest at temperature 0, else from the nucleus of top_p (Holtzman et al. 2020).

    Args:
        logits: [vocab].
        options: temperature and top_p.
        generator: source of randomness.
    """
    if options.temperature == 0:
        return int(logits.argmax())
    # In double and from the largest down: any temperature above 0 gives numbers.
    scaled = (logits.double() - logits.max()) / options.temperature
    probabilities, order = scaled.softmax(0).sort(descending=True, stable=True)
    before = probabilities.cumsum(0) - probabilities
    kept = probabilities.masked_fill(before >= options.top_p, 0.0)
    return int(order[torch.multinomial(kept, 1, generator=generator)])


def chosen_checkpoint(run_dir: Path, tokens: int | None, verb: str) -> Path:
    """The checkpoint at `tokens`, or the newest; the content of its files is verified.

    Args:
        run_dir: directory of the run.
        tokens: `checkpoint` of the verb's options.
        verb: for the message.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    path = whole_checkpoint(run_dir, tokens, f"{verb}.checkpoint")
    manifest = read_manifest(path)
    damaged = damaged_files(path, manifest.files, manifest) if manifest else [MANIFEST]
    if damaged:
        raise UserError(f"{path}: damaged ({', '.join(damaged)}); choose another with {verb}.checkpoint=TOKENS")
    return path
