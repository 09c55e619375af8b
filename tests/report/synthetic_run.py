"""A run directory with curves as a real run leaves them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from nano_pretrain.recipe.load import to_yaml
from nano_pretrain.recipe.schema import PhaseConfig, Recipe, RunConfig, ScheduleConfig, StageConfig
from tests.model.recipes import small_recipe

SOURCES = ("documentation", "python", "c", "encyclopedia", "papers", "law", "fiction", "questions")
MANY_SOURCES = (*SOURCES, "news", "maths", "web_high", "web_medium", "multilingual", "commits", "subtitles")
TOKENS, SEQUENCE, BATCH = 3_276_800, 512, 16


def write_run(run_dir: Path, sources: tuple[str, ...] = SOURCES, fraction: float = 1.0, seed: int = 0) -> Path:
    """Write every file of a run that consumed `fraction` of its tokens; returns `run_dir`."""
    run_dir.mkdir(parents=True)
    random = np.random.default_rng(seed)
    consumed = round(fraction * TOKENS / (SEQUENCE * BATCH)) * SEQUENCE * BATCH
    blends = {f"p{i}": _blend(sources, random) for i in (1, 2, 3)}
    (run_dir / "recipe.yaml").write_text(to_yaml(_recipe(blends)))
    write_lines(run_dir / "metrics.jsonl", _metrics(consumed, random))
    write_lines(run_dir / "validation.jsonl", _validation(sources, consumed, random))
    write_lines(run_dir / "samples.jsonl", _samples(consumed))
    for name, content in _documents(sources, blends, consumed).items():
        (run_dir / name).write_text(json.dumps(content))
    return run_dir


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _blend(sources: tuple[str, ...], random: np.random.Generator) -> dict[str, float]:
    weights = random.dirichlet(np.full(len(sources), 3.0))
    return {name: round(float(weight), 4) for name, weight in zip(sources, weights, strict=True)}


def _recipe(blends: dict[str, dict[str, float]]) -> Recipe:
    shares = {"p1": 0.6, "p2": 0.3, "p3": 0.1}
    pretrain = StageConfig(
        tokens=TOKENS * 9 // 10,
        sequence_length=SEQUENCE,
        global_batch_size=BATCH,
        schedule=ScheduleConfig(lr=3e-3, min_lr=3e-5, warmup_tokens=163_840, decay_tokens=819_200),
        phases={name: PhaseConfig(share=shares[name], blend=blend) for name, blend in blends.items()},
    )
    extension = StageConfig(
        tokens=TOKENS // 10,
        sequence_length=4 * SEQUENCE,
        global_batch_size=BATCH // 4,
        schedule=ScheduleConfig(kind="constant", lr=3e-5),
        phases={"long": PhaseConfig(tokens=TOKENS // 10, blend=blends["p3"])},
    )
    recipe = small_recipe()
    recipe.data.corpus = "pypi"
    recipe.stages = {"pretrain": pretrain, "long_context": extension}
    recipe.run = RunConfig(name="tiny")
    return recipe


def _metrics(consumed: int, random: np.random.Generator) -> list[dict[str, Any]]:
    lines = []
    for step, tokens in enumerate(range(SEQUENCE * BATCH, consumed + 1, SEQUENCE * BATCH), start=1):
        done = tokens / TOKENS
        phase = "long" if done > 0.9 else "p3" if done > 0.81 else "p2" if done > 0.54 else "p1"
        speed = 6_200 * (0.4 if step == 1 else 1) * (1 + 0.03 * random.standard_normal())
        lines.append(
            {
                "step": step,
                "tokens": tokens,
                "loss": 3.4 + 5.6 * math.exp(-14 * done) - 0.25 * done + 0.09 * random.standard_normal(),
                "lr": 3e-3 * min(1, 20 * done, max(0.01, 1 - math.sqrt(max(0, (done - 0.65) / 0.25)))),
                "grad_norm": (0.4 + 4 * math.exp(-20 * done)) * math.exp(0.2 * random.standard_normal()),
                "tokens_per_second": speed,
                "mfu": speed / 6_200 * 0.31,
                "stage": "long_context" if phase == "long" else "pretrain",
                "phase": phase,
                "sequence_length": SEQUENCE,
                "global_batch_size": BATCH,
                "something_new": [1, 2],
            }
        )
    return lines


def _validation(sources: tuple[str, ...], consumed: int, random: np.random.Generator) -> list[dict[str, Any]]:
    floors = {name: 1.2 + 1.5 * random.random() for name in sources}
    lines = []
    for tokens in np.linspace(0, consumed, 9):
        bits = {name: floor + 3.5 * math.exp(-5 * tokens / TOKENS) for name, floor in floors.items()}
        lines.append(
            {
                "step": round(tokens / (SEQUENCE * BATCH)),
                "tokens": int(tokens),
                "sources": {
                    name: {"loss": 1.7 * value, "bits_per_byte": value, "tokens": 16_384, "bytes": 52_000}
                    for name, value in bits.items()
                },
                "blend": {"loss": 4.0, "bits_per_byte": sum(bits.values()) / len(bits)},
            }
        )
    return lines


def _samples(consumed: int) -> list[dict[str, Any]]:
    text = "The function returns the number of bytes\n    that were written to the stream.\n" * 4
    return [
        {"tokens": consumed * (i + 1) // 3, "prompt": "The", "text": text, "temperature": 0.8, "top_p": 0.95}
        for i in range(3)
    ]


def _documents(sources: tuple[str, ...], blends: dict[str, dict[str, float]], consumed: int) -> dict[str, Any]:
    shares = {"p1": 0.54, "p2": 0.27, "p3": 0.09}
    read = {
        phase: {name: round(shares[phase] * consumed * weight) for name, weight in blend.items()}
        for phase, blend in blends.items()
    }
    totals = {name: sum(phase[name] for phase in read.values()) for name in sources}
    bits = {name: 2.6 + 0.1 * i for i, name in enumerate(sources)}
    return {
        "ledger.json": {
            "tokens": consumed,
            "stages": {"pretrain": read},
            "sources": {name: {"tokens": total, "epochs": total / 400_000} for name, total in totals.items()},
        },
        "baselines.json": {
            "train_tokens": consumed,
            "bigram": {"sources": bits, "blend": 2.95},
            "trigram": {"sources": {name: value - 0.4 for name, value in bits.items()}, "blend": 2.55},
            "note": "Interpolated n-grams on the same tokens.",
        },
        "environment.json": {
            "parameters": 5_437_952,
            "versions": {"python": "3.11.9", "torch": "2.13.0", "megatron_core": "0.16.1"},
            "commit": "0123abcd",
            "hosts": ["node-1", "node-2"],
            "layout": {"tensor": 1, "pipeline": 1, "context": 1, "data": 2},
        },
        "exit.json": {"code": 0, "reason": "all tokens consumed", "step": 400, "tokens": consumed, "time": 1.76e9},
    }
