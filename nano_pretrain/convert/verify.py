"""Verification of a conversion against transformers' own model: weights bit for bit, then what both models compute.

In FP32 on both sides from the values that were converted; FP32 rounding is all that may differ. Where the weights agree
and the numbers do not, transformers reads another model out of config.json than was trained.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from torch import Tensor

from nano_pretrain.convert.hf_files import read_tokenizer
from nano_pretrain.convert.names import hf_tensors
from nano_pretrain.convert.sides import Sides
from nano_pretrain.convert.verify_layers import compare_layers
from nano_pretrain.convert.verify_whole import compare_logits
from nano_pretrain.data.shards import TOKENIZER_NAME, open_corpus
from nano_pretrain.plan.params import count_parameters
from nano_pretrain.platform import current_platform
from nano_pretrain.platform.versions import check_versions
from nano_pretrain.recipe.errors import RunError, UserError
from nano_pretrain.recipe.schema import Recipe

BOUND = {"cpu": 1e-4, "cuda": 1e-2}
"""Of the largest logit, counted as at least 1, and of what a layer adds. FP32 rounding of two implementations came to
1.3e-6 at most, in layers as wide as those of nano_12b_v2; the least of the mistakes in tests/convert/test_verify.py, a
clamp that only the smallest steps reach, to 1.4e-3. On CUDA, where this has not run so far, Transformer Engine and
mamba-ssm multiply FP32 as TF32, whose factors have 11 bits."""

SAMPLE_TOKENS = (200, 256)
"""Of the samples for whole models: between and at a whole number of the chunks of both models' scans, 64 and 128."""
LAYER_TOKENS = 72
"""Of the sample for layers: more than a chunk of our scan, and few, since models that large are slow on a CPU."""

_BYTES_PER_PARAMETER = 16
"""For whole models: both in FP32, and as much again for reading them, for logits and to spare."""

_PARAGRAPH = (
    "The state of a recurrent layer is a summary of everything it has read, of a size that does not grow. What it "
    "keeps it must choose: 3 numbers out of 1,024, a name, the first line of a function. def area(r): return 3.14159 "
    "* r ** 2. Attention, on the other hand, forgets nothing and pays for it twice, in memory and in time. "
)


def prepare_transformers() -> None:
    """See that transformers is there, and silence what it says of loading and of kernels that it does not have.

    Raises:
        UserError: it is not installed, or another version.
    """
    try:
        check_versions(["transformers"])
    except UserError as error:
        raise UserError(f"hf.verify: {error}, or write hf.verify=false") from error
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def verify(sides: Sides) -> None:
    """Compare a conversion, before it is published, with transformers' own model; says in a line what was found.

    Args:
        sides: the conversion.

    Raises:
        RunError: a weight, a layer or the logits differ; the message names the first.
    """
    prepare_transformers()
    began, bound = time.perf_counter(), BOUND[current_platform().name]
    found = _whole(sides, bound) if _has_room(sides.recipe) else _by_layers(sides, bound)
    seconds, count = time.perf_counter() - began, len(hf_tensors(sides.model))
    print(f"verified in {seconds:,.1f} s with transformers {version('transformers')}: {count} tensors {found}")


def _whole(sides: Sides, bound: float) -> str:
    samples, text = _samples(sides, SAMPLE_TOKENS)
    found = compare_logits(sides, samples)
    if not _within(found.difference, found.largest, bound):
        # Names the layer, if it is one.
        compare_layers(sides, samples[0], bound)
        raise _differing(sides, found.difference, found.largest)
    return (
        f"bit-equal after loading, logits of {sum(SAMPLE_TOKENS)} tokens of {text} within {found.difference:.1e} "
        f"(largest {found.largest:.1f}), the same next token likeliest after {found.greedy} of them"
    )


def _by_layers(sides: Sides, bound: float) -> str:
    (sample,), text = _samples(sides, (LAYER_TOKENS,))
    found = compare_layers(sides, sample, bound)
    if not _within(found.difference, found.largest, bound):
        raise _differing(sides, found.difference, found.largest)
    return (
        f"bit-equal, {len(sides.model.pattern)} layers one at a time, for want of memory: on {LAYER_TOKENS} tokens of "
        f"{text} each within {found.layer:.1e} of what it adds, logits within {found.difference:.1e} "
        f"(largest {found.largest:.1f})"
    )


def _within(difference: float, largest: float, bound: float) -> bool:
    """Whether logits are the same; not if they are no numbers."""
    return difference <= bound * max(1.0, largest)


def _differing(sides: Sides, difference: float, largest: float) -> RunError:
    return RunError(
        f"logits differ from those of transformers by up to {difference:.2e} (largest {largest:.2e}), with the same "
        f"weights; look at {sides.hf.directory}/config.json"
    )


def _has_room(recipe: Recipe) -> bool:
    """Whether memory, of the machine and of the device, has room for both models at once."""
    there = min(current_platform().memory(0).capacity, psutil.virtual_memory().available)
    return count_parameters(recipe.model).total * _BYTES_PER_PARAMETER < there


def _samples(sides: Sides, lengths: Sequence[int]) -> tuple[list[Tensor], str]:
    """Token ids, a tensor for each length, and what they are."""
    ids, text = _ids(sides, sum(lengths))
    return list(ids.split(list(lengths))), text


def _ids(sides: Sides, count: int) -> tuple[Tensor, str]:
    """Token ids of the run's held-out text, of a paragraph where there is none, or random ones without a tokenizer."""
    vocabulary = sides.model.vocab_size
    with suppress(UserError):
        corpus = open_corpus(Path(sides.recipe.data.path))
        stream = max(corpus.heldout.values(), key=lambda stream: stream.tokens)
        if corpus.vocab_size == vocabulary and stream.tokens >= count:
            return torch.from_numpy(stream.read((stream.tokens - count) // 2, count)), "held-out text"
    path = sides.hf.directory / TOKENIZER_NAME
    if path.is_file():
        ids = read_tokenizer(path, "hf.path").encode(_PARAGRAPH, add_special_tokens=False).ids
        if ids and max(ids) < vocabulary:
            return torch.tensor(ids).repeat(-(-count // len(ids)))[:count], "text"
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0)), "no text, but random ids"
