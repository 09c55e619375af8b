"""Text from a checkpoint, a token at a time, with recurrent state and key/value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nano_pretrain.checkpoint.manifest import Manifest, checkpoints_directory, read_manifest, whole_checkpoints
from nano_pretrain.checkpoint.sharded import load_checkpoint
from nano_pretrain.data.shards import open_corpus
from nano_pretrain.parallel.groups import Ranks, process_groups
from nano_pretrain.platform import current_platform
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.schema import GenerateConfig, ParallelConfig, Recipe
from nano_pretrain.train.directory import append_line


def generate(recipe: Recipe, options: GenerateConfig, run_dir: Path, prompts: Sequence[str]) -> list[str]:
    """Each prompt with its continuation; also appended to the run's samples.jsonl.

    Args:
        recipe: the run's recipe.
        options: length, sampling and checkpoint.
        run_dir: directory of the run.
        prompts: texts to continue.

    Raises:
        UserError: there is no such checkpoint, or the corpus with the tokenizer is gone.
    """
    path, manifest = _checkpoint(run_dir, options.checkpoint)
    corpus = open_corpus(Path(recipe.data.path))
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    tokenizer.encode_special_tokens = True
    encoded = [tokenizer.encode(prompt).ids or [corpus.eod_id] for prompt in prompts]
    platform = current_platform()
    platform.prepare(0, recipe.cluster.threads_per_rank)
    from nano_pretrain.model.hybrid import build_model

    layout = ParallelConfig(distributed_optimizer=False)
    texts: list[str] = []
    with process_groups(platform, Ranks(0, 1, 0), layout, recipe.cluster.timeout_seconds):
        model = build_model(recipe, layout, platform, max(map(len, encoded)) + options.max_new_tokens)
        load_checkpoint(path, model, optimizer=None)
        for prompt in encoded:
            ids = list(continuation(model, prompt, options, corpus.eod_id, recipe.model.vocab_size))
            texts.append(tokenizer.decode([*prompt, *ids], skip_special_tokens=False))
    for prompt_text, text in zip(prompts, texts, strict=True):
        line = {
            "tokens": manifest.tokens, "prompt": prompt_text, "text": text,
            "temperature": options.temperature, "top_p": options.top_p,
        }  # fmt: skip
        append_line(run_dir / "samples.jsonl", line)
    return texts


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
    probabilities, order = (logits / options.temperature).softmax(0).sort(descending=True, stable=True)
    before = probabilities.cumsum(0) - probabilities
    kept = probabilities.masked_fill(before >= options.top_p, 0.0)
    return int(order[torch.multinomial(kept, 1, generator=generator)])


def _checkpoint(run_dir: Path, tokens: int | None) -> tuple[Path, Manifest]:
    """The wanted checkpoint, or the newest."""
    whole = whole_checkpoints(run_dir)
    if not whole:
        raise UserError(f"{checkpoints_directory(run_dir)}: no whole checkpoint; train the run first")
    known = {int(path.name): path for path in whole}
    if tokens is not None and tokens not in known:
        listed = ", ".join(map(str, sorted(known)))
        raise UserError(f"generate.checkpoint: no whole checkpoint at {tokens} tokens; choose one of {listed}")
    path = whole[0] if tokens is None else known[tokens]
    manifest = read_manifest(path)
    assert manifest is not None
    return path, manifest
