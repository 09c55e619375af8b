"""What a run of two ranks leaves, and what the same command answers when the run is finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nano_pretrain.checkpoint.manifest import read_manifest, whole_checkpoints
from nano_pretrain.data.shards import open_corpus
from tests.corpora import write_corpus
from tests.train.small_run import (
    STEPS,
    TOKENS,
    TOKENS_PER_STEP,
    Finished,
    SmallRuns,
    checkpoints,
    exit_json,
    learned,
    lines,
)  # fmt: skip

Undisturbed = tuple[Path, Finished]


def test_every_step_has_every_column(undisturbed: Undisturbed) -> None:
    metrics = lines(undisturbed[0] / "metrics.jsonl")
    assert [(line["step"], line["tokens"]) for line in metrics] == [
        (step, step * TOKENS_PER_STEP) for step in range(1, STEPS + 1)
    ]
    assert list(metrics[0]) == [
        "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "stage", "phase", "sequence_length",
        "global_batch_size",
    ]  # fmt: skip
    assert [line["phase"] for line in metrics] == ["p1"] * 12 + ["p2"] * 6 + ["p3"] * 2
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5


def test_directory_holds_what_the_design_names(undisturbed: Undisturbed, small: SmallRuns) -> None:
    run = undisturbed[0]
    assert yaml.safe_load((run / "recipe.yaml").read_text())["run"]["name"] == "undisturbed"
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["megatron-core"].startswith("0.16.")
    assert environment["kernels"] == "native"
    assert environment["layout"]["world"] == environment["layout"]["data"] == 2
    assert exit_json(run) == {**exit_json(run), "code": 0, "reason": "finished", "step": STEPS, "tokens": TOKENS}
    assert (run / "report" / "index.html").stat().st_size > 10_000
    assert (run / "logs" / "rank-1.log").exists()
    assert not (small.directory / "recipe.yaml").exists()


def test_newest_checkpoints_are_kept_and_listed(undisturbed: Undisturbed, small: SmallRuns) -> None:
    run = undisturbed[0]
    assert checkpoints(run) == [str(TOKENS * 3 // 4), str(TOKENS)]
    manifest = read_manifest(whole_checkpoints(run)[0])
    assert manifest is not None
    assert (manifest.tokens, manifest.step, manifest.layout["data"]) == (TOKENS, STEPS, 2)
    assert manifest.corpus == open_corpus(small.corpus).fingerprint


def test_wandb_stays_offline_and_tensorboard_has_events(undisturbed: Undisturbed) -> None:
    run, done = undisturbed
    assert list((run / "logs" / "wandb").glob("offline-run-*/*.wandb"))
    assert list((run / "logs").glob("events.out.tfevents.*"))
    assert "login" not in done.text.lower()
    assert "wandb" not in done.text.lower()


def test_samples_and_baselines_are_written_at_the_end(undisturbed: Undisturbed) -> None:
    run, done = undisturbed
    assert [line["prompt"] for line in lines(run / "samples.jsonl")] == ["ab", ""]
    assert done.text.count("--- sample ---") == 2
    assert set(json.loads((run / "baselines.json").read_text())) >= {"bigram", "trigram", "train_tokens"}


def test_output_is_lines_a_person_reads(undisturbed: Undisturbed) -> None:
    run, done = undisturbed
    first, *_, last = done.text.splitlines()
    assert first == f"{run}: starting at step 0, 0 of {TOKENS:,} tokens"
    assert last == f"report: {run / 'report' / 'index.html'}"
    for noise in ("Warning", "Traceback", "\x1b", "[W", "[rank"):
        assert noise not in done.text


@pytest.mark.parametrize("verb", ["train", "launch"])
def test_finished_run_answers_at_once_without_torch(undisturbed: Undisturbed, small: SmallRuns, verb: str) -> None:
    run = undisturbed[0]
    page = run / "report" / "index.html"
    page.unlink()
    code = (
        "import sys\nfrom nano_pretrain.cli import main\ntry:\n    main()\nexcept SystemExit as ending:\n"
        "    assert 'torch' not in sys.modules\n    raise"
    )
    command = [sys.executable, "-c", code, *small.command(verb, "undisturbed")]
    # Without the rank's variables of a launch around this test.
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{run}: already finished at {TOKENS:,} tokens; report: {page}\n"
    assert page.stat().st_size > 10_000


@pytest.mark.parametrize("verb", ["train", "launch"])
def test_another_recipe_is_refused_and_nothing_is_lost(undisturbed: Undisturbed, small: SmallRuns, verb: str) -> None:
    before = learned(undisturbed[0])
    done = small.run(verb, "undisturbed", "optimizer.beta2=0.99")
    assert done.code == 2
    assert done.text.startswith("nano-pretrain: optimizer.beta2: 0.99 differs from 0.95 of the run in ")
    assert done.text.count("\n") == 1
    assert learned(undisturbed[0]) == before


def test_another_corpus_is_refused(undisturbed: Undisturbed, small: SmallRuns, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", seed=1)
    done = small.run("launch", "undisturbed", f"data.path={other}", "stages.pretrain.tokens=20480")
    assert done.code == 2
    assert done.text.count("\n") == 1
    assert (
        f"data.path: the shards in {other} are not those that the run in {undisturbed[0]} was trained on" in done.text
    )
    assert exit_json(undisturbed[0])["code"] == 0
