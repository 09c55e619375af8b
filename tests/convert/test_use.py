"""What people do with an export: generate, evaluate with lm-evaluation-harness, fine-tune with TRL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nano_pretrain.evaluate.generate import continuation
from nano_pretrain.evaluate.harness_tasks import load_tasks
from nano_pretrain.platform import Platform
from nano_pretrain.prepare.documents import Document
from nano_pretrain.prepare.tokenizer import EOD_ID, SPECIAL_TOKENS, train_bpe
from nano_pretrain.recipe.schema import EvaluateConfig, GenerateConfig, Recipe
from tests.convert.conversions import exported, saved, with_model
from tests.convert.test_model import peer_of, trained
from tests.evaluate.local_tasks import KINDS, write_tasks
from tests.evaluate.stand_ins import requests_of
from tests.model.recipes import small_recipe

TEXTS = [path.read_text() for path in sorted(Path("docs").glob("*.md"))[:6]]
VOCABULARY = 600
FIRST_OF_TEXT = len(SPECIAL_TOKENS)
NO_TOKEN = -1
"""Ends no text, so that both models write on."""


@dataclass(frozen=True)
class Used:
    """A model of ours with its tokenizer, and its export in fp32."""

    recipe: Recipe
    ours: Any
    hf: Path


@pytest.fixture(scope="module")
def used(one_rank: Platform, tmp_path_factory: pytest.TempPathFactory) -> Used:
    path = tmp_path_factory.mktemp("used")
    train_bpe({"docs": [Document.of(text) for text in TEXTS]}, VOCABULARY, 100_000).save(str(path / "tokenizer.json"))
    recipe = with_model(small_recipe(corpus=path), vocab_size=VOCABULARY, pattern="M-M*-M-")
    recipe.stages["pretrain"].sequence_length = 128
    ours = trained(one_rank, recipe, 128)
    return Used(recipe, ours, exported(recipe, saved(ours, path / "run"), path / "hf"))


def test_greedy_text_is_transformers(platform: Platform, used: Used) -> None:
    """64 tokens, of prompts that end within and at a chunk of the scan, and of one token."""
    theirs = peer_of(used.hf)
    generator = torch.Generator().manual_seed(0)
    for length in (1, 64, 130):
        # Without special tokens, as text is: transformers takes those that pad for no part of a prompt.
        prompt = torch.randint(FIRST_OF_TEXT, VOCABULARY, (length,), generator=generator).tolist()
        options = GenerateConfig(max_new_tokens=64, temperature=0.0)
        found = list(continuation(used.ours, prompt, options, NO_TOKEN, VOCABULARY))
        wanted = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=0
        )
        assert found == wanted[0, length:].tolist()
        assert len(found) == 64


LIKELIHOOD = 1e-3
"""Largest difference in nats, of at most 128 tokens, whose logits agree to some 1e-6 in fp32; 2e-5 was the largest.
Another prefix or a token more comes to whole nats."""


@pytest.mark.full
def test_harness_finds_the_same_on_the_native_model_as_on_its_export(
    platform: Platform, used: Used, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer to every request of every kind of task, by lm_eval's own model and ours, and so every score."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer

    from nano_pretrain.evaluate.harness import NativeModel

    tasks = EvaluateConfig(harness_tasks=list(KINDS), harness_path=str(write_tasks(tmp_path / "tasks")))
    tokenizer = Tokenizer.from_file(str(used.hf / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    requests = requests_of(used.ours, used.recipe, tokenizer, EOD_ID, 128)
    # Where lm_eval puts `<s>` before a text, which no training did, ours has the end of a document.
    theirs = HFLM(str(used.hf), dtype="float32", device="cpu", batch_size=4, prefix_token_id=EOD_ID)
    assert theirs.max_length == requests.longest == 128
    found = []
    for model in (NativeModel(requests, tokenizer), theirs):
        results = evaluate(model, load_tasks(tasks), bootstrap_iters=0)
        samples = {task: [sample["resps"] for sample in of_task] for task, of_task in results["samples"].items()}
        found.append((samples, results["results"]))
    (ours, our_scores), (others, their_scores) = found
    for task in KINDS:
        assert len(ours[task]) == 24
        for mine, wanted in zip(_flat(ours[task]), _flat(others[task]), strict=True):
            assert mine == (wanted if isinstance(wanted, (str, bool)) else pytest.approx(wanted, abs=LIKELIHOOD))
        for metric, score in their_scores[task].items():
            # A choice is the same; perplexity and bits follow from likelihoods within LIKELIHOOD.
            exact = metric.startswith(("acc", "exact")) or not isinstance(score, float)
            assert our_scores[task][metric] == (score if exact else pytest.approx(score, rel=LIKELIHOOD))


def _flat(values: Any) -> list[Any]:
    """What nested lists and tuples hold."""
    if not isinstance(values, (list, tuple)):
        return [values]
    return [leaf for value in values for leaf in _flat(value)]


@pytest.mark.full
def test_two_steps_of_supervised_fine_tuning(used: Used, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By TRL, in which each text ends with the token that ends a document."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = peer_of(used.hf)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    texts = [text[:150] for text in TEXTS[:4]]
    settings = SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, max_length=128, learning_rate=1e-3,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
        disable_tqdm=True,
    )  # fmt: skip
    # TRL writes "</s>" behind each text, which our tokenizer else takes for text.
    tokenizer = AutoTokenizer.from_pretrained(used.hf, split_special_tokens=False)
    trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer)
    assert {row["input_ids"][-1] for row in trainer.train_dataset} == {EOD_ID}
    trainer.train()
    first, second = (line["loss"] for line in trainer.state.log_history if "loss" in line)
    assert math.isfinite(first)
    assert second < first, "the same four texts again"
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert not torch.equal(parameter, before[name]), name
