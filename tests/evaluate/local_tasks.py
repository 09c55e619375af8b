"""A directory of lm-evaluation-harness tasks made of this project's own docs: one of each kind."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

KINDS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "num_fewshot": 1,
        "fewshot_split": "test",
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[right]}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    "whole": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[right]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}
"""Name of a task, and what distinguishes it."""


def write_tasks(directory: Path, examples: int = 24) -> Path:
    """The tasks of `KINDS` over sentences of the docs, whose last word is to be guessed."""
    directory.mkdir(parents=True)
    lines = "".join(f"{json.dumps(example)}\n" for example in _examples()[:examples])
    (directory / "sentences.jsonl").write_text(lines)
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(directory / "sentences.jsonl")},
            "cache_dir": str(directory / "cache"),
        },
        "test_split": "test",
    }
    for name, kind in KINDS.items():
        # JSON is YAML.
        (directory / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **kind}, indent=2))
    return directory


def _examples() -> list[dict[str, Any]]:
    rng = random.Random(0)
    text = " ".join(path.read_text() for path in sorted(Path("docs").glob("*.md")))
    sentences = re.findall(r"[A-Z][^.|`#]{40,160}\.", re.sub(r"\s+", " ", text))
    pairs = [sentence.rsplit(" ", 1) for sentence in sentences]
    words = sorted({word for _, word in pairs})
    examples = []
    for text, word in pairs:
        choices = [word, *rng.sample([other for other in words if other != word], 3)]
        rng.shuffle(choices)
        examples.append({"text": text, "choices": choices, "right": choices.index(word)})
    return examples
