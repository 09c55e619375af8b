"""lm-evaluation-harness on native models: what it asks, in every layout, and what is refused before a run starts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from nano_pretrain.evaluate.harness_tasks import check_at_stage_ends, load_tasks
from nano_pretrain.evaluate.requests import Continuation, Prompt
from nano_pretrain.platform import Platform, versions
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.load import recorded_recipe
from nano_pretrain.recipe.schema import EvaluateConfig, ParallelConfig, Recipe
from tests.corpora import EOD, VOCAB_SIZE, write_corpus
from tests.distributed.ranks import run_ranks
from tests.distributed.training import harness_answers, likeliest_tokens
from tests.evaluate.local_tasks import KINDS, write_tasks
from tests.evaluate.stand_ins import requests_of
from tests.model.building import build, logits
from tests.model.recipes import small_recipe
from tests.train.scenarios import SHORT
from tests.train.small_run import TOKENS_PER_STEP, SmallRuns, lines

LONGEST = 48
BARE = json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}})
"""A tokenizer that is never asked."""
FP32 = 1e-4
"""In nats, of sums over at most 60 tokens, each of which is off by an FP32 rounding of a logit (5e-7) in either."""


def questions(count: int = 12, longest: int = 70) -> list[Continuation]:
    """Of all lengths, some longer than LONGEST, and two continuations of each context."""
    generator = np.random.default_rng(0)
    found = []
    for number in range(count):
        size = 2 + (longest - 2) * number // (count - 1)
        ids = generator.integers(3, VOCAB_SIZE, size + 1).tolist()
        cut = int(generator.integers(1, size))
        found += [Continuation(ids[:cut], ids[cut:]), Continuation(ids[:cut], [ids[cut]])]
    return found


@pytest.fixture(scope="module")
def model(one_rank: Platform) -> Any:
    return build(one_rank, small_recipe())


def wanted_of(model: Any, asked: Continuation) -> tuple[float, bool]:
    """From all logits of the one text."""
    text = [*asked.context, *asked.tokens][-max(LONGEST, len(asked.tokens)) - 1 :]
    found = logits(model, torch.tensor([text[:-1]]))[0, -len(asked.tokens) :, :VOCAB_SIZE].double().log_softmax(-1)
    labels = torch.tensor(asked.tokens)
    return float(found.gather(1, labels[:, None]).sum()), bool((found.argmax(-1) == labels).all())


def test_likelihoods_are_those_of_the_logits(platform: Platform, model: Any) -> None:
    requests = requests_of(model, small_recipe(), Tokenizer.from_str(BARE), EOD, LONGEST)
    asked = questions()
    greedy = []
    for each in asked[::6]:
        ids = list(each.context[-30:])
        for _ in range(3):
            ids.append(int(logits(model, torch.tensor([ids]))[0, -1, :VOCAB_SIZE].argmax()))
        greedy += [Continuation(ids[:-3], ids[-3:]), Continuation(ids[:-3], [*ids[-3:-1], 3 + ids[-1] % 5])]
    answers = requests.likelihoods([*asked, *greedy])
    for each, (nats, likeliest) in zip([*asked, *greedy], answers, strict=True):
        wanted = wanted_of(model, each)
        assert nats == pytest.approx(wanted[0], abs=FP32)
        assert likeliest == wanted[1]
    assert [likeliest for _, likeliest in answers[len(asked) :]] == [True, False] * (len(greedy) // 2)
    assert "compute_language_model_loss" not in vars(model), "left as it was"


BARE = json.dumps(
    {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
)


def test_texts_end_at_a_stop_at_the_end_of_a_document_and_at_the_most_tokens(platform: Platform, model: Any) -> None:
    requests = requests_of(model, small_recipe(), Tokenizer.from_str(BARE), EOD, LONGEST)
    requests._decode = lambda ids: " ".join(map(str, ids))
    (whole,) = requests.texts([Prompt([5, 6, 7], 8, ())])
    words = whole.split(" ")
    assert len(words) == 8
    third = f" {words[2]}"
    expected_text = whole[: whole.index(third)]
    assert requests.texts([Prompt([5, 6, 7], 8, ("no", third)), Prompt([5, 6, 7], 3, ())]) == [
        expected_text, " ".join(words[:3]),
    ]  # fmt: skip
    requests.eod_id = int(words[4])
    assert requests.texts([Prompt([5, 6, 7], 8, ())]) == [" ".join(words[: words.index(words[4])])]


@pytest.fixture(scope="module")
def of_one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, list[Prompt], Any]:
    """A recipe, prompts, and what a model of one rank answers."""
    recipe = small_recipe(corpus=write_corpus(tmp_path_factory.mktemp("ranks") / "corpus"))
    prompts = [Prompt(each.context, 4, ()) for each in questions(5, 20)]
    return recipe, prompts, run_ranks(harness_answers, 1, recipe, ParallelConfig(), questions(), prompts, LONGEST)[0]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ParallelConfig(tensor=2, sequence=True)),
        pytest.param(2, ParallelConfig(), marks=pytest.mark.full),
        pytest.param(4, ParallelConfig(pipeline=2), marks=pytest.mark.full),
        pytest.param(4, ParallelConfig(context=2, tensor=2, sequence=True), marks=pytest.mark.full),
        pytest.param(4, ParallelConfig(context=2, pipeline=2), marks=pytest.mark.full),
    ],
)
def test_every_layout_answers_the_same(
    ranks: int, layout: ParallelConfig, of_one_rank: tuple[Recipe, list[Prompt], Any]
) -> None:
    recipe, prompts, (answers, texts) = of_one_rank
    whole = layout == ParallelConfig()
    found, *others = run_ranks(harness_answers, ranks, recipe, layout, questions(), prompts if whole else [], LONGEST)
    assert others == [None] * (ranks - 1)
    for (nats, likeliest), (wanted, was_likeliest) in zip(found[0], answers, strict=True):
        assert nats == pytest.approx(wanted, abs=FP32)
        assert likeliest == was_likeliest
    assert found[1] == (texts if whole else [])


def test_likeliest_token_of_a_divided_vocabulary_is_the_first_of_equal_ones() -> None:
    """On whichever rank it is; padding, which is the largest here, never."""
    logits = torch.randint(0, 20, (40, 3, 64), generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[..., 50:] = 100
    wanted = logits[..., :50].float().argmax(-1)
    assert (wanted < 32).any()
    assert (wanted >= 32).any()
    for found in run_ranks(likeliest_tokens, 2, logits, 50):
        assert torch.equal(found, wanted)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


def asked_of(tasks: Path, *names: str) -> EvaluateConfig:
    return EvaluateConfig(harness_tasks=list(names), harness_path=str(tasks))


def test_harness_that_is_not_installed_is_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_installed", lambda package: None)
    said = r"^evaluate\.harness_tasks: lm-eval: not installed; pip install 'lm-eval\S+', or .*nano-pretrain\[eval\]'$"
    with pytest.raises(UserError, match=said):
        load_tasks(EvaluateConfig(harness_tasks=["arc_easy"]))


def test_task_of_the_docs_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path("docs/evaluation.md").read_text()
    (written,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (example,) = re.findall(r"tasks/endings\.jsonl: (\{.*\})", written)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "endings.jsonl").write_text(example)
    cached = written.replace("data_files:", f"cache_dir: {tmp_path}, data_files:")
    (tmp_path / "tasks" / "endings.yaml").write_text(cached)
    task = load_tasks(asked_of(Path("tasks"), "endings"))["tasks"]["endings"]
    assert list(task.test_docs()) == [json.loads(example)]


class TestRefusals:
    """Before a run starts, each in one line."""

    def test_directory_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"^evaluate\.harness_path: no directory .*nowhere"):
            load_tasks(asked_of(tmp_path / "nowhere", "choice"))

    @pytest.mark.full
    def test_task_that_there_is_not(self, tasks: Path) -> None:
        """Looked for among thousands, for seconds."""
        with pytest.raises(UserError, match=r"^evaluate\.harness_tasks: no task 'chocie' in lm-eval or in "):
            load_tasks(asked_of(tasks, "chocie"))

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"dataset_kwargs": {"data_files": "nowhere.jsonl"}}, "cannot be loaded .FileNotFoundError"),
            ({"generation_kwargs": {"do_sample": True, "temperature": 0.5}}, "choice draws text at random"),
        ],
    )
    def test_task_that_cannot_be_run(self, tmp_path: Path, change: dict[str, Any], said: str) -> None:
        directory = write_tasks(tmp_path / "tasks", examples=2)
        written = json.loads((directory / "written.yaml").read_text())
        (directory / "choice.yaml").write_text(json.dumps({**written, "task": "choice", **change}))
        with pytest.raises(UserError, match=rf"^evaluate\.harness_tasks: {said}.*; (mend it|leave it out.*)$"):
            load_tasks(asked_of(directory, "choice"))

    @pytest.mark.parametrize("layout", [ParallelConfig(tensor=2), ParallelConfig(context=2)])
    def test_generation_by_ranks_that_hold_a_part(self, tasks: Path, layout: ParallelConfig) -> None:
        options = asked_of(tasks, "choice", "written")
        recipe = replace(small_recipe(), parallel=layout, evaluate=options)
        said = r"written generates text, .* stage pretrain has none; write evaluate\.at_stage_end=false"
        with pytest.raises(UserError, match=rf"^evaluate\.harness_tasks: {said}"):
            check_at_stage_ends(recipe)
        check_at_stage_ends(replace(recipe, evaluate=asked_of(tasks, "choice", "last_word", "whole")))
        check_at_stage_ends(replace(recipe, evaluate=replace(options, at_stage_end=False)))
        check_at_stage_ends(replace(recipe, parallel=ParallelConfig()))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRuns:
    path = tmp_path_factory.mktemp("harness-run")
    return SmallRuns(write_corpus(path / "corpus"), path / "runs")


@pytest.mark.full
class TestRun:
    """A small run whose stage ends with tasks, then the verb."""

    def test_stage_end_catches_up_and_the_verb_finds_the_same(self, small: SmallRuns, tasks: Path) -> None:
        names = [f"evaluate.harness_tasks=[{','.join(KINDS)}]", f"evaluate.harness_path={tasks}"]
        limit = "evaluate.harness_limit=5"
        done = small.run("train", "run", *SHORT, *names, limit)
        assert done.code == 0, done.text
        file = small.path("run") / "harness.jsonl"
        first = lines(file)
        assert [(line["tokens"], line["stage"], line["task"]) for line in first] == [
            (2 * TOKENS_PER_STEP, "pretrain", name) for name in KINDS
        ]
        for line, kind in zip(first, KINDS.values(), strict=True):
            assert (line["examples"], line["fewshot"], line["precision"]) == (5, kind.get("num_fewshot", 0), "bf16")
            assert set(line["metrics"]) == {metric["metric"] for metric in kind["metric_list"]}

        # As if it had been killed between its last checkpoint and the end of the evaluation.
        file.unlink()
        (small.path("run") / "exit.json").unlink()
        again = small.run("train", "run", *SHORT, *names, limit)
        assert again.code == 0, again.text
        assert lines(file) == first
        assert recorded_recipe(small.path("run")).evaluate.harness_tasks == list(KINDS)

        verb = small.run("evaluate", "run", *names, limit)
        assert verb.code == 0, verb.text
        assert lines(file) == [*first, *first]
        assert all(name in verb.text for name in KINDS)
        assert "bits_per_byte" in verb.text

    def test_run_is_refused_before_it_starts(self, small: SmallRuns, tasks: Path) -> None:
        (broken := tasks.parent / "broken").mkdir()
        task = json.loads((tasks / "choice.yaml").read_text())
        task["dataset_kwargs"]["data_files"] = {"test": "nowhere.jsonl"}
        (broken / "choice.yaml").write_text(json.dumps(task))
        names = ["evaluate.harness_tasks=[choice]", f"evaluate.harness_path={broken}"]
        done = small.run("launch", "other", *SHORT, *names)
        assert done.code == 2
        assert done.last_line.startswith("nano-pretrain: evaluate.harness_tasks: cannot be loaded (FileNotFoundError")
        assert not (small.path("other") / "recipe.yaml").exists()
