"""What stands beside the weights of a Hugging Face checkpoint: configuration, tokenizer, recipe and model card."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nano_pretrain.checkpoint.manifest import Manifest
from nano_pretrain.convert.card import write_card
from nano_pretrain.convert.config import CONFIG_NAME, SPECIAL_IDS, hf_config
from nano_pretrain.convert.hf_files import read_tokenizer
from nano_pretrain.data.shards import TOKENIZER_NAME
from nano_pretrain.prepare.tokenizer import SPECIAL_TOKENS
from nano_pretrain.recipe.derived import trained_length
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.load import to_yaml
from nano_pretrain.recipe.schema import Recipe

_TOKENS = {name.removesuffix("_id"): SPECIAL_TOKENS[number] for name, number in SPECIAL_IDS.items()}


def write_beside(
    directory: Path, recipe: Recipe, run_dir: Path, tokens: int, torch_dtype: str, manifest: Manifest | None = None
) -> list[str]:
    """Write everything but the weights; without a prepared corpus no tokenizer, which a line on stdout says.

    Args:
        directory: of the weights.
        recipe: the run's recipe.
        run_dir: directory of the run, for the model card; any of its files may be missing.
        tokens: that the checkpoint has consumed.
        torch_dtype: of the weights, as torch names it.
        manifest: of the checkpoint, which may record the tokenizer that it was trained with.

    Returns:
        Names of the files.

    Raises:
        UserError: the corpus has a damaged tokenizer or that of another model.
    """
    length = trained_length(recipe, tokens)
    config = hf_config(recipe, max_position_embeddings=length, torch_dtype=torch_dtype)
    names = [
        _write_json(directory / CONFIG_NAME, config),
        _write_json(directory / "generation_config.json", SPECIAL_IDS),
        _write_text(directory / "recipe.yaml", to_yaml(recipe)),
        *_write_tokenizer(directory, recipe, length, manifest),
    ]
    return [*names, *write_card(directory, recipe, run_dir, tokens, torch_dtype, has_tokenizer=TOKENIZER_NAME in names)]


def _write_tokenizer(directory: Path, recipe: Recipe, length: int, manifest: Manifest | None) -> Iterator[str]:
    file = Path(recipe.data.path) / TOKENIZER_NAME
    if not file.is_file():
        print(f"data.path: no {file}, so no tokenizer is written; copy that of the run beside the weights")
        return
    _check_tokenizer(file, recipe.model.vocab_size, manifest)
    shutil.copyfile(file, directory / TOKENIZER_NAME)
    yield TOKENIZER_NAME
    yield _write_json(directory / "tokenizer_config.json", tokenizer_config(length))
    # Only transformers 4 reads it.
    yield _write_json(directory / "special_tokens_map.json", {**_TOKENS, "unk_token": SPECIAL_TOKENS[0]})


def _check_tokenizer(file: Path, vocab_size: int, manifest: Manifest | None) -> None:
    fix = "name the corpus of the run"
    recorded = manifest.shards["tokenizer"] if manifest is not None and manifest.shards is not None else None
    if recorded is not None and hashlib.sha256(file.read_bytes()).hexdigest() != recorded:
        raise UserError(f"data.path: {file} is not the tokenizer that the checkpoint was trained with; {fix}")
    entries = read_tokenizer(file, "data.path").get_vocab_size()
    if entries != vocab_size:
        raise UserError(f"data.path: {file} has {entries} entries, the model {vocab_size}; {fix}")


def tokenizer_config(length: int) -> dict[str, Any]:
    """How transformers is to use tokenizer.json: exactly as `prepare` did.

    Nothing is put before or behind a text, and text that spells a special token is text. Who wants "</s>" in a text to
    end it passes `split_special_tokens=False` to `AutoTokenizer.from_pretrained`.

    Args:
        length: tokens of the longest sample that the model was trained on.
    """
    return {
        # The one name for a tokenizer.json and nothing else that transformers 4 and 5 know.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **_TOKENS,
        "unk_token": SPECIAL_TOKENS[0],
        "split_special_tokens": True,
        # transformers 4 else decodes "a , b" to "a, b", and gives token_type_ids, which the model does not take.
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": length,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> str:
    return _write_text(path, json.dumps(content, indent=2) + "\n")


def _write_text(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return path.name
