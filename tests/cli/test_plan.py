"""The verb `plan`: tables, one JSON object, a picture, and the refusals of `train` in the same words."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli
from tests.cli.test_wrong_input import WRONG, assert_one_line
from tests.train.small_run import SMALL

PNG = b"\x89PNG\r\n"
ONLY_TRAIN = ("precision=fp8_blockwise", "parallel.context=2", "data.path=/nowhere", "log.wandb=online")
"""What can be planned though it cannot be run here."""


def planned(cli: Cli, *arguments: str) -> dict[str, Any]:
    """The JSON of a plan."""
    answer = cli("plan", "plan.format=json", *arguments)
    assert (answer.code, answer.err) == (0, "")
    document: dict[str, Any] = json.loads(answer.out)
    return document


def test_the_12b_as_tables(cli: Cli, tmp_path: Path) -> None:
    answer = cli("plan", "recipe=nano_12b_v2")
    assert (answer.code, answer.err) == (0, "")
    assert max(map(len, answer.out.splitlines())) <= 100
    for words in ("12,310,001,152", "7.189e+10", "8 x 1 x 16 x 12", "web_crawl", "days", "assumed:", "not calibrated"):
        assert words in answer.out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["plan-nano_12b_v2.png"], "no directory of a run"
    assert (tmp_path / "runs" / "plan-nano_12b_v2.png").read_bytes().startswith(PNG)


def test_the_12b_as_json(cli: Cli) -> None:
    found = planned(cli, "recipe=nano_12b_v2")
    assert found["format"] == 1
    assert found["parameters"]["total"] == 12_310_001_152
    pretrain, long_context = found["stages"]["pretrain"], found["stages"]["long_context"]
    assert pretrain["layout"].items() >= {
        "tensor": 8, "pipeline": 1, "context": 1, "sequence": True, "distributed_optimizer": True, "data": 736,
    }.items()  # fmt: skip
    assert (long_context["devices"], long_context["layout"]["context"], long_context["layout"]["data"]) == (
        1536,
        16,
        12,
    )
    assert pretrain["model_flops_per_token"]["training"] == pytest.approx(7.19e10, rel=1e-3)
    assert pretrain["parameters_per_rank"][0]["total"] == 1_539_032_384
    assert pretrain["fits"] is True
    assert pretrain["step_seconds"]["total"] == pytest.approx(
        sum(seconds for item, seconds in pretrain["step_seconds"].items() if item != "total")
    )
    assert pretrain["days"] * 24 * 5888 == pytest.approx(pretrain["device_hours"])
    assert found["total"]["tokens"] == pretrain["tokens"] + long_context["tokens"]


def test_the_structure_of_the_json_is_the_one_in_the_docs(cli: Cli) -> None:
    found = planned(cli, "recipe=tiny", "plan.hardware=cpu", "data.path=nowhere")
    text = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    described = set(re.findall(r"`([a-z0-9_]+)`", text.partition("## JSON")[2]))
    stage = found["stages"]["pretrain"]
    names = {
        *found,
        *stage,
        *stage["memory_per_rank"][0],
        *stage["checkpoint"],
        *found["total"],
        *found["sources"]["codeio"],
        *stage["step_seconds"],
    }
    assert names <= described, names - described


def test_a_reader_that_goes_away_ends_a_plan_as_any_program(tmp_path: Path) -> None:
    plan = f"{sys.executable} -m nano_pretrain plan recipe=nano_12b_v2"
    # The reader is gone before anything is written, so that an answer of any size meets that.
    for options in ("", "plan.format=json"):
        line = f'{{ sleep 0.2; {plan} {options}; echo "code $?" >&2; }} | true'
        done = subprocess.run(["/bin/bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == ("", f"code {128 + signal.SIGPIPE}\n"), options
    assert list((tmp_path / "runs").iterdir()) == [], "no empty picture stays"


def test_epochs_of_a_prepared_corpus(cli: Cli, corpus: Path) -> None:
    found = planned(cli, *SMALL, "plan.hardware=cpu", f"data.path={corpus}")
    assert set(found["sources"]) == {"alpha", "beta", "gamma"}
    assert all(source["epochs"] > 0 and source["available"] > 0 for source in found["sources"].values())


def test_a_layout_that_does_not_fit_is_refused_when_all_is_said(cli: Cli, tmp_path: Path) -> None:
    arguments = ("recipe=nemotron_h_56b", "precision=bf16", "plan.hardware=a100", "stages.pretrain.micro_batch_size=8",
                 "cluster.gpus=8", "plan.dir=.")  # fmt: skip
    answer = cli("plan", *arguments)
    assert answer.code == 2
    line = (
        r"stages\.pretrain: needs [\d.]+ GB on its largest rank, A100 SXM has 80\.0 GB; divide it over more devices .*"
    )
    assert re.fullmatch(f"nano-pretrain: {line}\n", answer.err)
    refusal = answer.err.partition(" ")[2].strip()
    assert f"DOES NOT FIT: {refusal}" in " ".join(answer.out.split())
    assert "not calibrated" in answer.out
    assert (tmp_path / "plan.png").read_bytes().startswith(PNG)
    as_json = cli("plan", "plan.format=json", *arguments)
    assert (as_json.code, as_json.err) == (2, answer.err)
    assert json.loads(as_json.out)["stages"]["pretrain"]["fits"] is False


@pytest.mark.parametrize("search", ["false", "true"])
def test_a_prepared_corpus_of_another_tokenizer_is_refused(cli: Cli, corpus: Path, tmp_path: Path, search: str) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["tokenizer"]["vocab_size"] = 600
    for part in corpus.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    arguments = (*SMALL, f"data.path={tmp_path}")
    answer = cli("plan", *arguments, f"plan.search={search}")
    assert_one_line(answer, ["model.vocab_size: 512 is smaller than the 600 entries", "write model.vocab_size=600"])
    assert answer == cli("train", *arguments, "dry_run=true")


def test_the_picture_goes_where_it_is_sent(cli: Cli, tmp_path: Path) -> None:
    found = planned(cli, "recipe=nano_12b_v2", "plan.dir=elsewhere")
    assert found["figure"] == "elsewhere/plan.png"
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    (tmp_path / "file").touch()
    assert_one_line(cli("plan", "plan.dir=file/x"), ["plan.dir: cannot write file/x/plan.png", "plan.dir=DIRECTORY"])


def test_search_as_tables_and_json(cli: Cli, tmp_path: Path) -> None:
    arguments = ("plan", "recipe=nano_12b_v2", "cluster.gpus=368", "extension=none", "plan.search=true")
    answer = cli(*arguments)
    assert (answer.code, answer.err) == (0, "")
    assert max(map(len, answer.out.splitlines())) <= 100
    for words in ("pretrain on 368 x H100 SXM", "Layouts that fit, fastest first", "Layouts that do not go"):
        assert words in answer.out
    found = json.loads(cli(*arguments, "plan.format=json").out)
    assert found["memory_compared"] is True
    stage = found["stages"]["pretrain"]
    own = stage["fitting"][stage["recipe"]]
    assert (own["tensor"], own["pipeline"], own["context"], own["data"]) == (8, 1, 1, 46)
    assert re.search(rf"^ {stage['recipe'] + 1} recipe's +8 +1 +1 +46 ", answer.out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == [], "a search draws nothing"


def test_the_structure_of_the_searchs_json_is_the_one_in_the_docs(cli: Cli) -> None:
    answer = cli(
        "plan", "recipe=tiny", "plan.search=true", "plan.format=json", "parallel.tensor=3", "data.path=nowhere"
    )
    found = json.loads(answer.out)
    stage = found["stages"]["pretrain"]
    text = (Path(__file__).parents[2] / "docs" / "plan.md").read_text().partition("## JSON")[2]
    names = {*found, *stage, *stage["fitting"][0], *stage["rejected"][0]}
    assert names <= set(re.findall(r"[a-z_]+", text)), names
    assert (found["memory_compared"], stage["recipe"]) == (False, None)
    assert stage["recipe_rejected"]["text"] == "parallel.tensor: 3 does not divide model.num_attention_heads = 8"


@pytest.mark.full
def test_a_search_that_finds_nothing_says_all_and_is_refused(cli: Cli) -> None:
    arguments = ("plan", "recipe=nano_12b_v2", "plan.search=true", "cluster.gpus=6145")
    answer = cli(*arguments)
    assert answer.code == 2
    assert answer.err == (
        "nano-pretrain: cluster.gpus: no layout of stage pretrain goes on 6145 x H100 SXM; "
        "write cluster.gpus=6144 or 6624, or change stages.pretrain.global_batch_size\n"
    )
    own = "own layout, TP8 PP1 CP1 micro-batch 1, does not go: parallel: tensor x pipeline x context = 8 does not"
    for words in ("no layout goes", own, "long_context on 1,536 x H100 SXM", "not calibrated"):
        assert words in " ".join(answer.out.split())
    as_json = cli(*arguments, "plan.format=json")
    assert (as_json.code, as_json.err) == (2, answer.err)
    assert set(json.loads(as_json.out)["stages"]) == {"pretrain", "long_context"}


@pytest.mark.parametrize("verb", ["prepare", "train", "launch", "generate", "report"])
def test_search_is_refused_to_what_would_run_an_unchecked_layout(cli: Cli, tmp_path: Path, verb: str) -> None:
    answer = cli(verb, "plan.search=true", "parallel.tensor=3")
    assert_one_line(answer, ["plan.search: goes with the verb plan", "leave it out"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("override", [override for override, _ in WRONG if override not in ONLY_TRAIN][::5])
def test_plan_train_and_launch_refuse_in_the_same_words(cli: Cli, corpus: Path, tmp_path: Path, override: str) -> None:
    # dry_run: an input that is taken by mistake must not train here.
    arguments = (*SMALL, f"data.path={corpus}", "dry_run=true", override)
    by_plan = cli("plan", *arguments)
    assert_one_line(by_plan, [])
    assert by_plan == cli("train", *arguments) == cli("launch", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["recipe=nano_12b_v2", "cluster.gpus=6144"],
            ["736 is not divisible by 768", "write cluster.gpus=2944 or 5888"],
        ),
        (["recipe=nano_12b_v2", "cluster.gpus=5000"], ["by 625 data-parallel", "write cluster.gpus=2944 or 5888"]),
        (["recipe=nano_12b_v2", "cluster.gpus=100"], ["does not divide the 100 ranks", "write cluster.gpus=64 or 128"]),
        (
            ["recipe=nano_12b_v2", "stages.long_context.gpus=1000"],
            ["does not divide the 1000 ranks (stages.long_context.gpus)", "write stages.long_context.gpus=512 or 768"],
        ),
        (
            ["recipe=nano_12b_v2", "model=nano_12b_v2_paper"],
            ["stages.long_context.parallel.context: tensor x context = 128 does not divide", "write 1, 2 or 4"],
        ),
        (["recipe=nano_12b_v2", "plan.hardware=a100"], ["plan.hardware: A100 SXM has no FP8 products"]),
        (["plan.hardware=x"], ["plan.hardware: no hardware 'x'", "choose one of a100"]),
        (["plan.metrics=x"], ["plan.metrics: x cannot be read", "metrics.jsonl of a run"]),
        (["plan.format=xml"], ["plan.format: 'xml' is unknown", "text, json"]),
        (["plan.storage_gigabytes_per_second=0"], ["plan.storage_gigabytes_per_second: 0.0 is not positive"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_plans(cli: Cli, tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    assert_one_line(cli("plan", *overrides), words)
    assert list(tmp_path.iterdir()) == []


def test_6144_ranks_are_accepted_for_the_56b(cli: Cli) -> None:
    assert planned(cli, "recipe=nemotron_h_56b", "cluster.gpus=6144")["stages"]["pretrain"]["layout"]["data"] == 768


def test_plan_needs_neither_torch_nor_megatron(tmp_path: Path) -> None:
    code = """
import sys
sys.argv = ["nano-pretrain", "plan", "recipe=nano_12b_v2"]
from nano_pretrain.cli import main
try:
    main()
except SystemExit as ending:
    assert not ending.code
heavy = {"torch", "megatron", "transformers", "wandb", "tensorboard"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
