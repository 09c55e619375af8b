"""What stands beside the weights: tokenizer, generation settings, recipe and model card."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer

from nano_pretrain.checkpoint.manifest import ORIGIN, Manifest
from nano_pretrain.compose import compose
from nano_pretrain.convert.beside import write_beside
from nano_pretrain.prepare.documents import Document
from nano_pretrain.prepare.tokenizer import train_bpe
from nano_pretrain.recipe.derived import stage_tokens, trained_length
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.schema import Recipe
from tests.report.synthetic_run import TOKENS, write_run

TEXTS = [path.read_text() for path in sorted(Path("docs").glob("*.md"))[:6]]
SPELLED = "<s>struck</s> <unk> a , b  don't\n\n\t 2026 naïve e\u0301 日本語 \U0001f600 x"
CARD = ["config.json", "generation_config.json", "recipe.yaml", "README.md"]
TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a prepared corpus has beside its shards."""
    path = tmp_path_factory.mktemp("corpus")
    tokenizer = train_bpe({"docs": [Document.of(text) for text in TEXTS]}, 600, 100_000)
    tokenizer.save(str(path / "tokenizer.json"))
    sources = {"documentation": {"licence": "MIT; pages | of manuals"}, "code": {}}
    (path / "manifest.json").write_text(json.dumps({"sources": sources}))
    return path


@pytest.fixture(scope="module")
def recipe(corpus: Path) -> Recipe:
    return compose(["recipe=tiny", "model.vocab_size=600", f"data.path={corpus}"]).recipe


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Path:
    """Of a run at its end."""
    path = tmp_path_factory.mktemp("exported")
    run_dir = write_run(tmp_path_factory.mktemp("runs") / "named")
    names = write_beside(path, recipe, run_dir, TOKENS, "bfloat16")
    there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert there == set(names) >= {*CARD, *TOKENIZER, "curves/loss.png", "curves/learning_rate.png"}
    return path


def card(path: Path) -> str:
    return (path / "README.md").read_text()


def test_transformers_encodes_as_the_corpus_was_encoded(exported: Path, corpus: Path) -> None:
    from transformers import AutoTokenizer

    ours = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    ours.encode_special_tokens = True  # as `prepare` does
    theirs = AutoTokenizer.from_pretrained(exported)
    for text in [*TEXTS, SPELLED, "", " ", "</s>"]:
        encoding = theirs(text)
        assert encoding["input_ids"] == ours.encode(text, add_special_tokens=False).ids
        assert not {0, 1, 2} & set(encoding["input_ids"])
        assert set(encoding) == {"input_ids", "attention_mask"}
        assert theirs.decode(encoding["input_ids"]) == text
    ids = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id)
    assert ids == (1, 2, 0, 0)
    assert len(theirs) == 600


def test_special_tokens_in_a_text_are_parsed_on_request(exported: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported, split_special_tokens=False)
    assert theirs("the end</s>")["input_ids"][-1] == 2


def test_generation_ends_at_the_end_of_a_document(exported: Path) -> None:
    from transformers import GenerationConfig

    settings = GenerationConfig.from_pretrained(exported)
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 0)


def test_the_longest_sample_is_that_of_the_stages_begun(recipe: Recipe) -> None:
    pretrain, extension = recipe.stages.values()
    assert pretrain.sequence_length < extension.sequence_length
    end = stage_tokens(pretrain)
    lengths = [trained_length(recipe, tokens) for tokens in (0, 1, end, end + 1, 2 * end)]
    assert lengths == [pretrain.sequence_length] * 3 + [extension.sequence_length] * 2


def test_the_recipe_and_configuration_are_those_of_the_run(exported: Path, recipe: Recipe) -> None:
    assert yaml.safe_load((exported / "recipe.yaml").read_text())["model"]["pattern"] == recipe.model.pattern
    config = json.loads((exported / "config.json").read_text())
    assert (config["vocab_size"], config["dtype"], config["torch_dtype"]) == (600, "bfloat16", "bfloat16")
    assert config["max_position_embeddings"] == trained_length(recipe, TOKENS)


def test_the_card_says_what_the_run_says(exported: Path) -> None:
    text = card(exported)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nemotron_h", "mamba2", "nano_pretrain"],
    }
    assert f"trained on {TOKENS:,} tokens" in body
    assert "| pretrain | 3.28M | 512 | 16 | wsd | 0.003 to 3e-05 | 164K | 819K |" in body
    assert "![Training loss](curves/loss.png)" in body
    assert "- documentation: MIT; pages | of manuals" in body
    assert "| blend |" in body  # held-out
    assert "What was read of each source, in all" in body
    for heading in ("Use", "Model", "Training", "What this checkpoint does not have", "Licence"):
        assert f"\n## {heading}\n" in body
    assert "{{" not in text
    assert "hosts" not in text


def test_nothing_of_what_came_after_the_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    middle = metrics[len(metrics) // 2]["tokens"]
    last = [line["loss"] for line in metrics if line["tokens"] <= middle][-20:]
    write_beside(tmp_path, recipe, run_dir, middle, "float32")
    assert f"Training loss: {sum(last) / 20:.3f} nats per token, mean of the last 20 steps." in card(tmp_path)
    assert "by the end of the run, at 3.28M tokens" in card(tmp_path)


def test_an_imported_checkpoint_has_no_course(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = replace(recipe, data=replace(recipe.data, path=str(tmp_path / "nowhere")))
    names = write_beside(tmp_path, missing, tmp_path / "no run", 0, "bfloat16")
    assert names == CARD
    assert f"no {tmp_path / 'nowhere' / 'tokenizer.json'}, so no tokenizer is written" in capsys.readouterr().out
    text = card(tmp_path)
    assert "without a step of training" in text
    assert "There is no tokenizer here" in text
    assert "## Training" not in text


@pytest.mark.parametrize(("tokens", "said"), [(0, "without a step of training"), (98_304, "for 98,304 tokens, with")])
@pytest.mark.parametrize(
    ("origin", "name"), [('{"source": "/a/Nemotron-9B", "tokens": 0}', "Nemotron-9B"), ("{", "an")]
)
def test_the_card_names_what_was_imported(
    recipe: Recipe, tmp_path: Path, tokens: int, said: str, origin: str, name: str
) -> None:
    run_dir = write_run(tmp_path / "run")
    (run_dir / ORIGIN).write_text(origin)
    write_beside(tmp_path, recipe, run_dir, tokens, "bfloat16")
    first = card(tmp_path).partition("## Use")[0]
    assert f"weights imported from `{name}" in first
    assert said in first
    assert "trained on" not in first


def test_the_card_names_the_dtype_of_every_weight(recipe: Recipe, tmp_path: Path) -> None:
    layer = "backbone.layers.3.mixer."
    floats = {layer + name: torch.zeros(2) for name in ("dt_bias", "A_log")}
    save_file({**floats, layer + "norm.weight": torch.zeros(2).bfloat16()}, tmp_path / "model.safetensors")
    write_beside(tmp_path, recipe, tmp_path / "no run", 0, "bfloat16")
    assert "| weights | bfloat16; float32: `mixer.A_log`, `mixer.dt_bias` |" in card(tmp_path)


def test_the_tokenizer_of_another_model(recipe: Recipe, tmp_path: Path) -> None:
    other = replace(recipe, model=replace(recipe.model, vocab_size=601))
    with pytest.raises(UserError, match="has 600 entries, the model 601"):
        write_beside(tmp_path, other, tmp_path / "no run", 0, "bfloat16")


def test_a_tokenizer_that_is_damaged(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    damaged = replace(recipe, data=replace(recipe.data, path=str(tmp_path)))
    with pytest.raises(UserError, match=r"data\.path: .*tokenizer\.json is damaged or no tokenizer \(EOF"):
        write_beside(tmp_path, damaged, tmp_path / "no run", 0, "bfloat16")


def test_a_tokenizer_of_the_same_size_that_is_not_the_run_s(recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    right = sha256((corpus / "tokenizer.json").read_bytes()).hexdigest()
    manifest = Manifest(0, 0, {}, {}, "", {}, shards={"tokenizer": right, "sources": {}})
    assert TOKENIZER[0] in write_beside(tmp_path, recipe, tmp_path / "no run", 0, "bfloat16", manifest)
    other = replace(manifest, shards={"tokenizer": "0" * 64, "sources": {}})
    with pytest.raises(UserError, match=r"data\.path: .* is not the tokenizer that the checkpoint was trained with"):
        write_beside(tmp_path, recipe, tmp_path / "no run", 0, "bfloat16", other)


@pytest.mark.parametrize("content", ["{broken", None])
@pytest.mark.parametrize(
    "files", [("ledger.json", "environment.json", "recipe.yaml"), ("metrics.jsonl", "validation.jsonl", "ledger.json")]
)
def test_files_of_the_run_may_be_missing_or_broken(
    files: tuple[str, ...], content: str | None, recipe: Recipe, tmp_path: Path
) -> None:
    run_dir = write_run(tmp_path / "run")
    for name in files:
        (run_dir / name).unlink()
        if content:
            (run_dir / name).write_text(content)
    assert "README.md" in write_beside(tmp_path, recipe, run_dir, TOKENS, "bfloat16")
    assert "## Training" in card(tmp_path)


def test_twice_the_same(exported: Path, recipe: Recipe, tmp_path: Path) -> None:
    names = write_beside(tmp_path, recipe, write_run(tmp_path / "named"), TOKENS, "bfloat16")
    assert [(tmp_path / name).read_bytes() for name in names] == [(exported / name).read_bytes() for name in names]
