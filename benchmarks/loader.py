"""Tokens per second of reading samples, against megatron-core's `BlendedDataset` over `GPTDataset`, in one run.

    python -m benchmarks.loader [--repeats 7]

Both read the prepared shards of `tiny` with the blend of its first phase, in one process and one thread, the page cache
warm: consecutive samples, each time other ones, as int64 tokens and labels, in micro-batches of 4. A figure is the
median of the repeats, in turn. Building megatron-core's indexes is not in it (`benchmarks.order` has that).

Ours computes the order as it reads, and cuts a sample from the documents as they lie in the shard. megatron-core looks
the order up and gathers a sample document by document in a shuffled order; it also replaces padding, copies a loss
mask, and returns position ids, which it makes once. Its attention mask is turned off, its fastest setting. Its samples
are measured in micro-batches by torch's `DataLoader` without workers, and alone, as a data set gives them one by one:
that leaves out their copy into a batch, which ours has.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.step import measure
from nano_pretrain.compose import compose
from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.loader import BatchReader, MicroBatch
from nano_pretrain.data.shards import Corpus, open_corpus, read_manifest
from nano_pretrain.recipe.schema import DataConfig, PhaseConfig, Recipe, StageConfig

LENGTHS = (512, 8192)
MICRO_BATCH, GLOBAL_BATCH = 4, 16
TOKENS = 1 << 21
"""Read in one measurement."""


def our_batches(corpus: Corpus, blend: Mapping[str, float], length: int, samples: int) -> Iterator[MicroBatch]:
    """Micro-batches of a run of one stage and phase."""
    phases = {"all": PhaseConfig(share=1.0, blend=blend)}
    stage = StageConfig(
        tokens=samples * length,
        sequence_length=length,
        micro_batch_size=MICRO_BATCH,
        global_batch_size=GLOBAL_BATCH,
        phases=phases,
    )
    curriculum = Curriculum(Recipe(data=DataConfig(max_epochs=1e9), stages={"all": stage}), corpus.sizes)
    reader = BatchReader(corpus, curriculum, (0, 1), False, torch.device("cpu"))
    for consumed in range(0, curriculum.total_tokens, GLOBAL_BATCH * length):
        yield from reader.micro_batches(consumed)


def their_dataset(corpus: Corpus, blend: Mapping[str, float], length: int, samples: int, cache: Path) -> Any:
    """A data set for each shard, a source's weight divided over its shards by their tokens."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    manifest, weights = read_manifest(corpus.path), dict[str, float]()
    for name, weight in blend.items():
        for shard in manifest["sources"][name]["train"]["shards"]:
            weights[str(corpus.path / "train" / shard["name"])] = weight * shard["tokens"] / corpus.train[name].tokens
    tokenizer = SimpleNamespace(vocab_size=corpus.vocab_size, eod=corpus.eod_id, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=length,
        blend=(list(weights), list(weights.values())),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]


def reading(batches: Iterator[Any], count: int) -> Callable[[], None]:
    """A step that reads the next `count` of the batches."""

    def step() -> None:
        read = sum(1 for _ in islice(batches, count))
        assert read == count, f"{read} batches are left of {count}"

    return step


def compare(corpus: Corpus, blend: Mapping[str, float], length: int, repeats: int) -> None:
    """Print the speeds at one sequence length, and how many times slower than ours each is."""
    samples = TOKENS // length
    total = samples * (repeats + 1)
    with tempfile.TemporaryDirectory() as cache:
        dataset = their_dataset(corpus, blend, length, total, Path(cache))
        steps = {
            "nano_pretrain, micro-batches": reading(our_batches(corpus, blend, length, total), samples // MICRO_BATCH),
            "megatron-core, micro-batches": reading(iter(DataLoader(dataset, MICRO_BATCH)), samples // MICRO_BATCH),
            "megatron-core, samples alone": reading((dataset[number] for number in range(total)), samples),
        }
        medians = measure(steps, repeats)
    ours = next(iter(medians.values()))
    for name, seconds in medians.items():
        speed = f"{TOKENS / seconds / 1e6:7.1f}M tokens/s  {1e6 * seconds / samples:6.1f} us/sample"
        print(f"{length:5} tokens  {name}  {speed}  ratio {seconds / ours:.2f}", flush=True)


def main() -> None:
    """Print the comparison at both sequence lengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = compose(["recipe=tiny"]).recipe
    corpus = open_corpus(Path(recipe.data.path))
    for file in (corpus.path / "train").iterdir():
        file.read_bytes()
    # megatron-core asks for the rank before it writes its indexes.
    store = torch._C._distributed_c10d.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    for length in LENGTHS:
        compare(corpus, next(iter(recipe.stages["pretrain"].phases.values())).blend, length, options.repeats)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
