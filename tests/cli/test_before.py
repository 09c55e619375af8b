"""What `plan`, `train` and `launch` say of the data before they start, and refuse before they load torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nano_pretrain.launch import parent
from tests.cli.conftest import Cli
from tests.cli.test_wrong_input import assert_one_line
from tests.corpora import BLEND
from tests.train.small_run import SMALL

REPEATS = "3 of 3 sources are read more than once, "
LONG = [
    "extension=tiny_4k", "stages.long_context.tokens=8192", "stages.long_context.sequence_length=256",
    "stages.long_context.global_batch_size=8", f"stages.long_context.phases.lc.blend={BLEND}",
]  # fmt: skip
RAMP = "stages.pretrain.batch_ramp={start: 4, increment: 4, ramp_tokens: 4096}"


FEW = ["stages.pretrain.tokens=10240", "stages.pretrain.schedule.decay_tokens=1024"]


def joined(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("verb", ["train", "launch"])
def test_what_repeats_is_said_before_the_start_in_the_words_of_plan(cli: Cli, corpus: Path, verb: str) -> None:
    arguments = [*SMALL, f"data.path={corpus}", "stages.pretrain.tokens=81920"]
    said = cli(verb, *arguments, "dry_run=true").out.splitlines()
    assert said[0].startswith(REPEATS)
    assert said[-1].startswith("would train")
    assert said[0] in joined(cli("plan", *arguments).out)
    few = cli(verb, *arguments, *FEW, "dry_run=true")
    assert few.out.startswith("would train"), "nothing is read twice"


def test_ranks_do_not_repeat_what_their_launcher_has_said(
    cli: Cli, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(parent.LAUNCHER_PID, "1")
    monkeypatch.setattr(parent, "die_with_parent", lambda: None)
    arguments = [*SMALL, f"data.path={corpus}", "stages.pretrain.tokens=81920", "dry_run=true"]
    assert REPEATS not in cli("train", *arguments).out


def with_lengths(corpus: Path, path: Path, long: int) -> Path:
    """The corpus, of whose training tokens so many are said to lie in documents of at least 1,024 tokens."""
    shutil.copytree(corpus, path)
    manifest = json.loads((path / "manifest.json").read_text())
    for source in manifest["sources"].values():
        source["train"]["tokens_by_length"] = {"1024": long, "4096": 0}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def extended(corpus: Path, before: int) -> list[str]:
    """A run of samples of 1,024 or 512 tokens that is extended to 2,048."""
    return [
        *SMALL, *LONG, f"stages.pretrain.sequence_length={before}", "stages.pretrain.tokens=65536",
        "stages.pretrain.global_batch_size=2", "stages.pretrain.micro_batch_size=1",
        "stages.long_context.tokens=65536", "stages.long_context.sequence_length=2048",
        "validation.tokens_per_source=2048", f"data.path={corpus}",
    ]  # fmt: skip


def test_an_extension_with_few_long_documents_is_named(cli: Cli, corpus: Path, tmp_path: Path) -> None:
    arguments = extended(with_lengths(corpus, tmp_path / "few", long=100), 1024)
    plan = cli("plan", *arguments)
    said = "stages.long_context.sequence_length: only "
    assert (plan.code, plan.out.count(said)) == (0, 1)
    line = next(line for line in cli("train", *arguments, "dry_run=true").out.splitlines() if line.startswith(said))
    assert "documents of at least 1,024 tokens, and samples of the stage before have 1,024; prepare long" in line
    assert line in joined(plan.out)
    found = json.loads(cli("plan", *arguments, "plan.format=json").out)["stages"]
    assert found["pretrain"]["long_text"] is None
    assert (found["long_context"]["long_text"]["least"], found["long_context"]["long_text"]["before"]) == (1024, 1024)
    assert 0 < found["long_context"]["long_text"]["share"] < 0.1
    enough = extended(with_lengths(corpus, tmp_path / "enough", long=4000), 1024)
    assert said not in cli("train", *enough, "dry_run=true").out
    assert "1,024 tokens" in cli("plan", *enough).out


@pytest.mark.parametrize("verb", ["plan", "train", "launch"])
def test_an_extension_that_teaches_nothing_is_refused(cli: Cli, corpus: Path, tmp_path: Path, verb: str) -> None:
    arguments = extended(with_lengths(corpus, tmp_path / "none", long=0), 1024)
    words = ["stages.long_context.sequence_length: no document of its blends has 1,024 tokens", "long_document_qa"]
    assert_one_line(cli(verb, *arguments), words)


@pytest.mark.parametrize("verb", ["train", "launch"])
def test_lengths_beyond_the_held_out_text_are_refused_before_torch_is_loaded(
    cli: Cli, corpus: Path, tmp_path: Path, verb: str
) -> None:
    arguments = [*SMALL, f"data.path={corpus}", "evaluate.lengths=[100000]", "evaluate.tasks=[niah_single]"]
    # A dry run goes no further than what is refused before the start.
    answer = cli(verb, *arguments, "dry_run=true")
    assert_one_line(answer, ["evaluate.lengths: no source has 100000 held-out tokens", "write at most "])
    assert cli(verb, *arguments, "evaluate.at_stage_end=false", "dry_run=true").code == 0


@pytest.mark.parametrize("verb", ["train", "launch"])
def test_ranks_that_do_not_divide_a_ramp_are_refused_before_they_start(cli: Cli, corpus: Path, verb: str) -> None:
    arguments = [*SMALL, f"data.path={corpus}", RAMP, "dry_run=true"]
    assert cli(verb, *arguments, "cluster.gpus=2").code == 0
    answer = cli(verb, *arguments, "cluster.gpus=4")
    assert_one_line(answer, ["stages.pretrain.batch_ramp: 4 is not divisible by 4", "write cluster.gpus=1 or 2, or"])
    assert answer == cli("plan", *arguments, "cluster.gpus=4")


@pytest.mark.parametrize("option", ["plan.search=true", "parallel.cuda_graphs=true"])
def test_a_sweep_is_refused_what_does_not_go_with_its_verb(cli: Cli, corpus: Path, tmp_path: Path, option: str) -> None:
    arguments = [*SMALL, f"data.path={corpus}", "precision=bf16", "evaluate.lengths=[512]", option]
    answer = cli("train", *arguments, "--multirun", "optimizer.beta2=0.95,0.99", "run.dir=runs")
    field = "plan.search" if option.startswith("plan") else "evaluate.at_stage_end"
    assert_one_line(answer, [f"{field}: "])
    assert list(tmp_path.iterdir()) == []
