"""The corpus of `tiny`, for real: every shard has the hash it always had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from nano_pretrain.data.shards import TOKENIZER_NAME, open_corpus, read_manifest, token_byte_lengths
from nano_pretrain.prepare.run import prepare
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.load import tree, typed_recipe
from nano_pretrain.recipe.schema import Recipe
from tests.prepare.small_corpus import tree_hashes

PINNED = Path(__file__).with_name("tiny_hashes.json")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiny() -> Recipe:
    """The recipe, its corpus prepared in the checkout's own `data/`, where `make pretrain` finds it."""
    ConfigStore.instance().store(name="schema", node=Recipe)
    with initialize_config_dir(str(tree("recipes")), version_base="1.3"):
        recipe = typed_recipe(compose("config"))
    recipe.data.path = str(ROOT / recipe.data.path)
    recipe.data.cache_dir = str(ROOT / recipe.data.cache_dir)
    try:
        prepare(recipe)
    except UserError as error:
        if "cannot be fetched" in str(error):
            pytest.skip(str(error))
        raise
    return recipe


def test_the_shards_are_the_pinned_ones(tiny: Recipe) -> None:
    pinned = json.loads(PINNED.read_text())
    path = Path(tiny.data.path)
    hashes = {name: sha for name, sha in tree_hashes(path).items() if name.endswith((".bin", ".idx"))}
    assert read_manifest(path)["tokenizer"]["made_by"] == f"tokenizers {tokenizers.__version__}"
    assert hashes == pinned["shards"], f"pinned with tokenizers {pinned['tokenizers']}"
    assert tree_hashes(path)[TOKENIZER_NAME] == pinned["tokenizer"]
    assert open_corpus(path).fingerprint == pinned["fingerprint"]


def test_every_token_stands_for_its_bytes(tiny: Recipe) -> None:
    corpus = open_corpus(Path(tiny.data.path))
    lengths = token_byte_lengths(corpus.tokenizer_file)
    assert lengths.size == corpus.vocab_size == tiny.model.vocab_size
    for stream in [*corpus.train.values(), *corpus.heldout.values()]:
        ids = stream.read(0, stream.tokens)
        assert lengths[ids].sum() == stream.bytes
        assert (ids == corpus.eod_id).sum() == stream.documents


def test_each_source_holds_out_enough_to_measure(tiny: Recipe) -> None:
    corpus = open_corpus(Path(tiny.data.path))
    assert len(set(corpus.categories.values())) >= 8
    for name, stream in corpus.heldout.items():
        assert stream.bytes > 20_000, name
        assert stream.bytes < 0.2 * corpus.train[name].bytes, name
    least = sorted(stream.bytes for stream in corpus.heldout.values())
    assert least[2] > 60_000


def test_no_source_is_read_more_than_twice(tiny: Recipe) -> None:
    corpus = open_corpus(Path(tiny.data.path))
    stage = tiny.stages["pretrain"]
    for name, stream in corpus.train.items():
        weights = [
            (phase.share or 0, phase.blend.get(name, 0) / sum(phase.blend.values())) for phase in stage.phases.values()
        ]
        assert sum(share * weight for share, weight in weights) * stage.tokens <= 2 * stream.tokens, name
