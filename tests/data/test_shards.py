"""Shards: the same bytes as megatron-core's, read by memory map, damage named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nano_pretrain.data.indexed_file import (
    IndexedFileWriter,
    WrittenPair,
    bin_path,
    idx_path,
    token_dtype,
)
from nano_pretrain.data.shards import TokenShard, TokenStream, open_corpus, token_byte_lengths
from nano_pretrain.recipe.errors import UserError
from tests.corpora import write_corpus

Documents = list[list[int]]
documents_of_bytes = st.lists(st.lists(st.integers(0, 65_499), min_size=1, max_size=20), min_size=1, max_size=12)


def write(prefix: Path, documents: Documents, vocab_size: int = 4096) -> WrittenPair:
    with IndexedFileWriter(prefix, token_dtype(vocab_size)) as writer:
        for document in documents:
            writer.add(document)
        return writer.finish()


def flat(documents: Documents) -> npt.NDArray[np.int64]:
    return np.array([token for document in documents for token in document], np.int64)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(4096, "uint16"), (65_499, "uint16"), (65_500, "int32"), (131_072, "int32")]
)
def test_token_type_is_megatrons(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype) == np.dtype(DType.optimal_dtype(vocab_size))


@pytest.mark.parametrize("vocab_size", [4096, 131_072])
def test_megatron_reads_what_we_write(tmp_path: Path, vocab_size: int) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocab_size, size).tolist() for size in (1, 7, 300, 2)]
    write(tmp_path / "a.b", documents, vocab_size)
    dataset = IndexedDataset(str(tmp_path / "a.b"))
    assert [dataset[number].tolist() for number in range(len(dataset))] == documents
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert dataset.sequence_lengths.tolist() == [1, 7, 300, 2]


@pytest.mark.parametrize("vocab_size", [4096, 131_072])
def test_the_pair_is_megatrons_byte_for_byte(tmp_path: Path, vocab_size: int) -> None:
    documents = [[5, 6, 2], [vocab_size - 1, 2], [2]]
    builder = IndexedDatasetBuilder(str(bin_path(tmp_path / "theirs")), dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(idx_path(tmp_path / "theirs")))
    write(tmp_path / "ours", documents, vocab_size)

    assert bin_path(tmp_path / "ours").read_bytes() == bin_path(tmp_path / "theirs").read_bytes()
    assert idx_path(tmp_path / "ours").read_bytes() == idx_path(tmp_path / "theirs").read_bytes()
    shard = TokenShard(tmp_path / "theirs")
    assert (shard.tokens, shard.documents) == (6, 3)
    assert shard.read(0, 6).tolist() == [5, 6, 2, vocab_size - 1, 2, 2]


def test_megatrons_documents_of_several_sequences_are_read(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(bin_path(tmp_path / "x")), dtype=np.uint16, multimodal=True)
    builder.add_document(torch.arange(5), [2, 3], [0, 1])
    builder.finalize(str(idx_path(tmp_path / "x")))
    shard = TokenShard(tmp_path / "x")
    assert (shard.documents, shard.read(1, 3).tolist()) == (1, [1, 2, 3])


@given(shards=st.lists(documents_of_bytes, min_size=1, max_size=4), data=st.data())
def test_a_stream_is_the_concatenation_of_its_shards(
    tmp_path_factory: pytest.TempPathFactory, shards: list[Documents], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("stream")
    for number, documents in enumerate(shards):
        write(path / f"s{number}", documents)
    stream = TokenStream("s", [TokenShard(path / f"s{number}") for number in range(len(shards))], text_bytes=0)
    everything = np.concatenate([flat(documents) for documents in shards])
    start = data.draw(st.integers(0, everything.size))
    length = data.draw(st.integers(0, everything.size - start))
    got = stream.read(start, length)
    assert got.dtype == np.int64
    assert got.tolist() == everything[start : start + length].tolist()
    assert stream.documents == sum(map(len, shards))
    for bad_start, bad_length in [(start, everything.size - start + 1), (-1, 1), (0, -1)]:
        with pytest.raises(ValueError, match="do not lie within"):
            stream.read(bad_start, bad_length)


@given(shards=st.lists(documents_of_bytes, min_size=1, max_size=4))
def test_every_token_has_its_shard_and_the_start_of_its_document(
    tmp_path_factory: pytest.TempPathFactory, shards: list[Documents]
) -> None:
    path = tmp_path_factory.mktemp("places")
    for number, documents in enumerate(shards):
        write(path / f"s.{number}", documents)
    stream = TokenStream("s", [TokenShard(path / f"s.{number}") for number in range(len(shards))], text_bytes=0)
    token = 0
    for number, documents in enumerate(shards):
        begin = token
        for document in documents:
            start = token
            for _ in document:
                assert stream.locate(token) == (f"s.{number}", token - begin)
                assert stream.size.document_start(token) == start
                token += 1
    with pytest.raises(ValueError, match="do not lie within"):
        stream.locate(token)


def test_a_document_of_several_sequences_begins_with_the_first(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(bin_path(tmp_path / "x")), dtype=np.uint16)
    for lengths in ([2, 3], [1], [4, 1]):
        builder.add_document(torch.arange(sum(lengths)), lengths)
    builder.finalize(str(idx_path(tmp_path / "x")))
    shard = TokenShard(tmp_path / "x")
    assert [shard.document_start(token) for token in range(11)] == [0, 0, 0, 0, 0, 5, 6, 6, 6, 6, 6]


def test_an_empty_shard_is_read(tmp_path: Path) -> None:
    write(tmp_path / "e", [])
    write(tmp_path / "f", [[1, 2]])
    stream = TokenStream("s", [TokenShard(tmp_path / name) for name in "efe"], text_bytes=0)
    assert stream.read(0, 2).tolist() == [1, 2]
    assert TokenShard(tmp_path / "e").read(0, 0).tolist() == []


def test_an_id_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with IndexedFileWriter(tmp_path / "x", token_dtype(4096)) as writer:
        for bad in (-1, 65_536):
            with pytest.raises(ValueError, match="do not fit uint16"):
                writer.add([bad])


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("fault", ["cut", "grown", "absent"])
def test_damage_names_the_file(tmp_path: Path, suffix: str, fault: str) -> None:
    write(tmp_path / "s", [[1, 2, 3], [4]])
    file = tmp_path / f"s{suffix}"
    if fault == "absent":
        file.unlink()
    else:
        raw = file.read_bytes()
        file.write_bytes(raw[:-1] if fault == "cut" else raw + b"\0")
    with pytest.raises(UserError) as caught:
        TokenShard(tmp_path / "s")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_something_else_is_not_an_index(tmp_path: Path) -> None:
    write(tmp_path / "s", [[1]])
    idx_path(tmp_path / "s").write_bytes(b"PK\x03\x04" * 30)
    with pytest.raises(UserError, match="not a Megatron index"):
        TokenShard(tmp_path / "s")


def test_no_corpus_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `nano-pretrain prepare` first"):
        open_corpus(tmp_path / "nothing")


@pytest.mark.parametrize("content", ["", "[]", '{"format": 99}', '{"format": 1}', '{"format": 1, "tokenizer": 3}'])
def test_a_strange_manifest_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json") as caught:
        open_corpus(tmp_path)
    assert "\n" not in str(caught.value)


def with_generations(path: Path, *generations: Any) -> Path:
    """A corpus whose source alpha has a shard of each of these generations."""
    write_corpus(path)
    manifest = json.loads((path / "manifest.json").read_text())
    (shard,) = manifest["sources"]["alpha"]["train"]["shards"]
    manifest["sources"]["alpha"]["train"]["shards"] = [{**shard, "generation": number} for number in generations]
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_generations_of_shards_have_their_tokens(tmp_path: Path) -> None:
    plain = open_corpus(write_corpus(tmp_path / "plain")).sizes["alpha"].generations
    sizes = open_corpus(with_generations(tmp_path / "more", 0, 0, 1, 2, 2)).sizes
    assert sizes["alpha"].generations == (2 * plain[0], plain[0], 2 * plain[0])
    assert len(sizes["beta"].generations) == 1
    assert sizes["alpha"].document_start(plain[0]) == plain[0]


@pytest.mark.parametrize(
    ("generations", "words"),
    [((1,), "has generation 1; write 0,"), ((0, 2), "2; write 0 or 1"), ((0, 1, 0), "0; write 1 or 2"), ((-1,), "-1")],
)
def test_generations_have_no_gaps(tmp_path: Path, generations: tuple[int, ...], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        open_corpus(with_generations(tmp_path / "c", *generations))
    assert "manifest.json: shard alpha-00000 has generation" in str(caught.value)
    with pytest.raises(UserError, match="damaged"):
        open_corpus(with_generations(tmp_path / "d", "0"))


def test_byte_lengths_add_up_to_the_text(tmp_path: Path) -> None:
    text = "Smørrebrød, 日本語 and 🙂 </s> twice: 日本語"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [text] * 3,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    lengths = token_byte_lengths(tmp_path / "tokenizer.json")
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text).ids
    assert lengths.size == tokenizer.get_vocab_size()
    assert lengths[:3].tolist() == [0, 0, 0]
    assert lengths[ids].sum() == len(text.encode())
    assert len(ids) < len(text.encode())
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
