"""Wrong input: one line on stderr that names the field and the fix, exit code 2, and nothing is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Answer, Cli
from tests.train.small_run import SMALL

P1 = "stages.pretrain.phases.p1"
SCHEDULE = "stages.pretrain.schedule"

# Override, words of the answer.
NAMES_AND_FORM = [
    ("recipe=tinny", ["recipe: no recipe 'tinny'", "tiny"]),
    ("recipe=", ["recipe: no recipe ''", "choose one of"]),
    ("recipe", ["recipe: cannot be read", "field=value"]),
    ("hello", ["hello: cannot be read", "field=value"]),
    ("=3", ["=3", "write for example recipe=tiny"]),
    ("", ["cannot be read", "field=value"]),
    ("model.pattern=[", ["model.pattern: unknown letter '['", "M (Mamba-2)"]),
    ("model.hidden_size=(", ["model.hidden_size: '(' is not a whole number", "write digits"]),
    ("generate.prompt='a' b", ["generate.prompt='a' b: cannot be read", "in quotes"]),
    ("model=large", ["model: no model 'large'", "tiny"]),
    ("model=null", ["model: is not the name of a file", "model=tiny"]),
    ("precision=fp9", ["precision: no precision 'fp9'", "bf16, fp32"]),
    ("launch=slurm", ["launch: no launch 'slurm'", "local"]),
    ("model.hiden_size=3", ["model.hiden_size: no such field", "model.hidden_size?"]),
    ("stages.pretrin.tokens=5", ["stages.pretrin: no such field", "stages.pretrain?"]),
    (f"{P1}.shre=1", [f"{P1}.shre: no such field", f"{P1}.share?"]),
    ("foo=1", ["foo: no such field", "choose from model, parallel"]),
    ("+foo=1", ["foo: no such field", "choose from model, parallel"]),
    ("++model.width=1", ["model.width: no such field", "choose from pattern"]),
    ("~model.pattern", ["model.pattern: cannot be left out", "write a value"]),
    ("optimizer=adam", ["optimizer: adam is not one value but a group", "write optimizer.NAME=VALUE"]),
    ("run.seed=1,2", ["run.seed: 1,2 is several values", "--multirun"]),
    ("model.hidden_size=???", ["model.hidden_size: has no value", "model.hidden_size=VALUE"]),
    ("data.seed=${nothing}", ["data.seed: Interpolation key 'nothing' not found", "write another value"]),
    ("+stages.second.tokens=5", ["stages.second.tokens: a stage cannot be added", "copy of the recipe"]),
    ("+stages.pretrain.phases.p4={share: 0.1}", ["phases.p4: a phase cannot be added", "copy of the recipe"]),
    ("stages.pretrain.parallel.tensor=2", ["stages.pretrain.parallel.tensor: the stage has no", "parallel.NAME"]),
    ("stages.pretrain.parallel={tensor: 2}", ["stages.pretrain.parallel: the stage has no", "parallel.NAME"]),
    ("--confg", ["--confg: no such option", "--cfg"]),
    ("--cfg=all", ["--cfg: shows one thing", "--cfg job"]),
]  # fmt: skip
TYPES = [
    ("model.hidden_size=abc", ["model.hidden_size: 'abc' is not a whole number", "write digits"]),
    ("stages.pretrain.tokens=1.5e0", ["stages.pretrain.tokens: '1.5' is not a whole number", "1000000"]),
    ("run.seed=1.5", ["run.seed: '1.5' is not a whole number", "write digits"]),
    (f"{SCHEDULE}.lr=fast", [f"{SCHEDULE}.lr: 'fast' is not a number", "3.0e-4"]),
    ("parallel.sequence=maybe", ["parallel.sequence: 'maybe' is neither true nor false", "write one of them"]),
    ("optimizer.eps=null", ["optimizer.eps: cannot be null", "write a value"]),
    ("run.name=[a]", ["run.name: is not text", "write one word"]),
    ("validation.prompts=hello", ["validation.prompts: is not a list", "[first, second]"]),
    (f"{P1}.blend=[1, 2]", [f"{P1}.blend: has another shape", "write a mapping"]),
    (f"{P1}.blend=5", [f"{P1}.blend: 5 is not a mapping", "source: weight"]),
    (f"{P1}.blend=null", [f"{P1}.blend: None is not a mapping", "source: weight"]),
]
NUMBERS = [
    ("model.hidden_size=0", ["model.hidden_size: 0 is not positive", "above 0"]),
    ("model.init_std=nan", ["model.init_std: nan is not a finite number", "write a number"]),
    ("optimizer.beta1=1", ["optimizer.beta1: 1.0 is outside [0, 1)", "0.9"]),
    ("optimizer.clip_grad=0", ["optimizer.clip_grad: 0.0 is not positive", "above 0"]),
    ("optimizer.weight_decay=-1", ["optimizer.weight_decay: -1.0 is negative", "0 or more"]),
    ("data.heldout_share=0.7", ["data.heldout_share: 0.7 is outside", "0.01"]),
    ("data.quota_window=0", ["data.quota_window: 0 is not positive", "above 0"]),
    ("data.max_epochs=0.01", ["data.max_epochs: source", "the limit is 0.01", "lower its weight"]),
    ("validation.tokens_per_source=16", ["validation.tokens_per_source: 16 is less", "at least 128"]),
    ("checkpoint.every=-2", ["checkpoint.every: -2 is negative", "0 or more"]),
    ("checkpoint.keep=0", ["checkpoint.keep: 0 is not positive", "above 0"]),
    ("cluster.gpus=0", ["cluster.gpus: 0 is not positive", "above 0"]),
    ("generate.top_p=0", ["generate.top_p: 0.0 is outside (0, 1]", "0.95"]),
    ("generate.checkpoint=-5", ["generate.checkpoint: -5 is not positive", "above 0"]),
    ("data.seed=-1", ["data.seed: -1 is negative", "0 or more"]),
    (f"checkpoint.keep=1{30 * '0'}", ["checkpoint.keep: 1000", "is too large", "at most 1000000"]),
    ("cluster.peak_tflops=1e30", ["cluster.peak_tflops: 1e+30 is too large", "at most 1000000"]),
    ("data.max_epochs=1e30", ["data.max_epochs: 1e+30 is too large", "at most 1000000"]),
    ("parallel.distributed_optimizer=-1", ["parallel.distributed_optimizer: '-1' is neither true nor false", "write"]),
    ("evaluate.examples=0", ["evaluate.examples: 0 is not positive", "above 0"]),
    ("evaluate.lengths=[512,0]", ["evaluate.lengths: 0 is no length", "write tokens"]),
    ("evaluate.lengths=[512,512]", ["evaluate.lengths: names one twice", "write each once"]),
    ("evaluate.lengths=[64]", ["evaluate.lengths: 64 tokens are too few for", "write at least"]),
    ("generate.temperature=-1", ["generate.temperature: -1.0 is negative", "0 or more"]),
]
CHOICES = [
    ("evaluate.tasks=[niah_single,qa]", ["evaluate.tasks: 'qa' is unknown", "niah_single, niah_multikey, vt, cwe"]),
    ("precision.name=fp9", ["precision.name: 'fp9' is unknown", "fp32, bf16"]),
    ("data.document_boundaries=keep", ["data.document_boundaries: 'keep' is unknown", "ignore, reset"]),
    ("data.tokenizer.kind=word", ["data.tokenizer.kind: 'word' is unknown", "bpe, tekken"]),
    ("log.wandb=on", ["log.wandb: 'on' is unknown", "offline, online, disabled"]),
    ("launch.kind=slurm", ["launch.kind: 'slurm' is unknown", "local"]),
    (f"{SCHEDULE}.kind=step", [f"{SCHEDULE}.kind: unknown value 'step'", "wsd, cosine, constant"]),
    (f"{SCHEDULE}.decay_shape=cubic", [f"{SCHEDULE}.decay_shape: unknown value 'cubic'", "minus_sqrt"]),
    ("run.name=a/b", ["run.name: 'a/b' is not a directory name", "use letters"]),
    ("run.name=..", ["run.name: '..' is not a directory name", "use letters"]),
    ("run.dir=", ["run.dir: is empty", "write a directory"]),
]
SHAPES = [
    ("model.pattern=M-X", ["model.pattern: unknown letter 'X' at position 3", "M (Mamba-2)"]),
    ("model.pattern=", ["model.pattern: is empty", "M (Mamba-2)"]),
    ("model.num_query_groups=3", ["model.num_attention_heads: 4 is not divisible", "write 3 or 6"]),
    ("model.mamba_num_groups=3", ["model.mamba_num_heads: 4 is not divisible", "write 3 or 6"]),
    ("model.vocab_size=300", ["model.vocab_size: 300 does not hold", "512 or more"]),
    ("data.tokenizer.kind=tekken", ["model.vocab_size: Tekken has 131072 entries", "model.vocab_size=131072"]),
    ("parallel.tensor=4", ["parallel.tensor: 4 does not divide model.num_query_groups = 2", "write 1 or 2"]),
    ("parallel.pipeline=6", ["parallel.pipeline: 6 is more than the 5 layers of model.pattern", "write 5 or less"]),
    *(
        (f"parallel.pipeline_layers={sizes}", [f"parallel.pipeline_layers: {sizes} does not divide 5", "or null"])
        for sizes in ("[4]", "[4, 1]", "[]")
    ),
    ("parallel.pipeline_layers=[x]", ["parallel.pipeline_layers"]),
    ("parallel.sequence=true", ["parallel.sequence: sequence parallelism needs", "parallel.sequence=false"]),
    ("stages.pretrain.gpus=3", ["stages.pretrain.global_batch_size: 8 is not divisible", "multiple of 6"]),
    ("stages.pretrain.micro_batch_size=3", ["global_batch_size: 8 is not divisible", "multiple of 6"]),
    ("precision=fp8_blockwise", ["model.mamba_num_heads: 324 rows of a Mamba-2 input", "precision.name=bf16"]),
    ("parallel.context=8", ["parallel.context: tensor x context = 8 does not divide", "write 1, 2 or 4"]),
]
CURRICULUM = [
    (f"{SCHEDULE}.min_lr=1", [f"{SCHEDULE}.min_lr: 1.0 is above the peak", "lower min_lr"]),
    (f"{SCHEDULE}.warmup_tokens=30000", [f"{SCHEDULE}.warmup_tokens: 30000 is more", "at most 20480"]),
    (f"{SCHEDULE}.decay_tokens=20000", [f"{SCHEDULE}.decay_tokens: 20000 and 2048", "at most 18432"]),
    (f"{P1}.share=0.7", ["stages.pretrain.phases: shares add up to 1.1", "make them add up to 1"]),
    (f"{P1}.share=-0.1", [f"{P1}.share: -0.1 is not positive", "above 0"]),
    (f"{P1}.share=null", [f"{P1}: has neither share nor tokens", "give one"]),
    (f"{P1}.tokens=5000", [f"{P1}: has both share and tokens", "give one"]),
    ("~stages.pretrain.phases.p3", ["stages.pretrain.phases: shares add up to 0.9", "add up to 1"]),
    ("~stages.pretrain", ["stages: the recipe has no stage", "choose a recipe"]),
    (f"{P1}.blend=nope", [f"{P1}.blend: no blend 'nope'", "tiny_p1"]),
    (f"{P1}.blend=tiny_p1", [f"{P1}.blend.aws_reference: unknown source", "alpha, beta, gamma"]),
    (f"{P1}.blend.alpha=-1", [f"{P1}.blend.alpha: weight is -1.0", "not negative"]),
    (f"{P1}.blend.alpha=heavy", [f"{P1}.blend.alpha: weight 'heavy' is not a number", "write a number"]),
    (f"{P1}.blend.alpha=inf", [f"{P1}.blend.alpha: weight is inf", "finite"]),
    (f"{P1}.blend.delta=1", [f"{P1}.blend.delta: the blend has no such source", "write +"]),
    (f"+{P1}.blend.delta=1", [f"{P1}.blend.delta: unknown source", "alpha, beta, gamma"]),
    (f"{P1}.blend={{alpha: 0, beta: 0, gamma: 0}}", [f"{P1}.blend: all weights are 0", "a positive weight"]),
    ("stages.pretrain.sequence_length=100000", ["validation.tokens_per_source: 1024 is less", "100000"]),
    ("data.path=/nowhere", ["data.path: /nowhere holds no prepared corpus", "nano-pretrain prepare"]),
    ("log.wandb=online", ["log.wandb: online needs an API key", "set WANDB_API_KEY"]),
]
WRONG = [*NAMES_AND_FORM, *TYPES, *NUMBERS, *CHOICES, *SHAPES, *CURRICULUM]


def files(directory: Path) -> list[tuple[str, int, int]]:
    """Everything below a directory, with size and time of change."""
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in directory.rglob("*"))


def assert_one_line(answer: Answer, words: list[str]) -> None:
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.startswith("nano-pretrain: ")
    assert answer.err.endswith("\n")
    assert answer.err.count("\n") == 1
    assert [word for word in words if word not in answer.err] == [], answer.err


@pytest.mark.parametrize(("override", "words"), WRONG, ids=[override for override, _ in WRONG])
def test_wrong_input_is_answered_in_one_line(
    cli: Cli, corpus: Path, tmp_path: Path, override: str, words: list[str]
) -> None:
    before = files(corpus)
    # dry_run: an input that is taken by mistake must not train here.
    answer = cli("train", *SMALL, f"data.path={corpus}", "dry_run=true", override)
    assert_one_line(answer, words)
    assert files(tmp_path) == []
    assert files(corpus) == before


@pytest.mark.parametrize("choice", ["extension=null", "extension=[1]", "model=true"])
def test_a_group_that_is_no_name_is_named_whatever_else_is_written(cli: Cli, choice: str) -> None:
    group = choice.partition("=")[0]
    assert_one_line(cli("train", choice, "dry_run=true"), [f"{group}: is not the name of a file", "model=tiny"])


@pytest.mark.parametrize("verb", ["prepare", "plan", "train", "launch"])
def test_a_number_for_a_truth_is_refused_by_all_that_depends_on_it(cli: Cli, tmp_path: Path, verb: str) -> None:
    assert_one_line(cli(verb, "dry_run=2"), ["dry_run: '2' is neither true nor false", "write one of them"])
    assert files(tmp_path) == []


@pytest.mark.parametrize("verb", ["prepare", "train", "launch", "generate", "evaluate", "report"])
def test_every_verb_refuses_a_wrong_field(cli: Cli, tmp_path: Path, verb: str) -> None:
    assert_one_line(cli(verb, "model.pattern=M-X"), ["model.pattern: unknown letter 'X'"])
    assert files(tmp_path) == []


@pytest.mark.parametrize("verb", ["generate", "evaluate", "report"])
def test_run_that_does_not_exist_is_named(cli: Cli, tmp_path: Path, verb: str) -> None:
    assert_one_line(cli(verb, "run.name=nope"), ["run.name: no run in runs/nope", "train it first"])
    assert files(tmp_path) == []


def test_unknown_verb_is_named(cli: Cli) -> None:
    verbs = "prepare, train, launch, generate, evaluate, export, import, report"
    assert_one_line(cli("trian"), ["trian: no such verb", verbs])


@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_unknown_corpus_is_named(cli: Cli, tmp_path: Path, dry_run: str) -> None:
    answer = cli("prepare", "data.corpus=nope", f"dry_run={dry_run}")
    assert_one_line(answer, ["data.corpus: there is no", "nope.yaml", "known corpora: pypi"])
    assert files(tmp_path) == []


@pytest.mark.parametrize("option", ["--cfg", "-c", "--cfg=yob"])
def test_option_without_its_value(cli: Cli, option: str) -> None:
    assert_one_line(cli("train", option), [f"{option.partition('=')[0]}: shows one thing only", "job"])


def test_sweep_is_refused_before_its_first_job_starts(cli: Cli, corpus: Path, tmp_path: Path) -> None:
    answer = cli("train", *SMALL, f"data.path={corpus}", "--multirun", "model.pattern=M-,M-X", "run.dir=runs")
    assert_one_line(answer, ["model.pattern: unknown letter 'X'"])
    assert files(tmp_path) == []


def test_sweep_over_equal_values_is_refused(cli: Cli, tmp_path: Path) -> None:
    assert_one_line(cli("train", "--multirun", "run.seed=1,1"), ["--multirun: two of the jobs are the same"])
    assert files(tmp_path) == []


def test_corpus_with_a_truncated_shard(cli: Cli, corpus: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(corpus, damaged)
    shard = damaged / "train" / "beta-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    before = files(tmp_path)
    assert_one_line(cli("train", *SMALL, f"data.path={damaged}"), ["beta-00000.bin"])
    assert files(tmp_path) == before


def test_corpus_with_more_words_than_the_model(cli: Cli, corpus: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "corpus" / "manifest.json"
    shutil.copytree(corpus, manifest.parent)
    manifest.write_text(manifest.read_text().replace('"vocab_size": 512', '"vocab_size": 5120'))
    answer = cli("train", *SMALL, f"data.path={manifest.parent}")
    assert_one_line(answer, ["model.vocab_size: 512 is smaller than the 5120", "model.vocab_size=5120"])


def test_run_directory_that_cannot_be_made(cli: Cli, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    answer = cli("launch", *SMALL, f"data.path={corpus}", "run.dir=file")
    assert_one_line(answer, ["file/tiny/logs: cannot be written", "choose another run.dir"])


def test_source_of_a_blend_that_is_a_file_says_how_to_write_a_blend(cli: Cli, tmp_path: Path) -> None:
    answer = cli("train", f"{P1}.blend.code=3")
    assert_one_line(
        answer, [f"{P1}.blend.code: the blend is the name of a file", f"write '{P1}.blend={{SOURCE: WEIGHT"]
    )
    assert files(tmp_path) == []
