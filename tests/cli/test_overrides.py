"""What overrides, `--cfg job`, `--help`, `--resolve` and `--multirun` do with a recipe."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from nano_pretrain.checkpoint.manifest import ORIGIN
from nano_pretrain.compose import check_imported, compose, compose_sweep
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.load import to_yaml
from nano_pretrain.recipe.schema import Recipe
from tests.cli.conftest import Cli


def names(overrides: list[str]) -> list[str | None]:
    return [job.recipe.run.name for job in compose_sweep(overrides)]


def test_readme_example() -> None:
    recipe = compose(["recipe=tiny", "model.pattern=M-M*-M-", "run.seed=7", "run.name=x"]).recipe
    assert (recipe.model.pattern, recipe.run.seed, recipe.run.name) == ("M-M*-M-", 7, "x")
    assert recipe.model.hidden_size == 256


def test_nested_phases_and_blends() -> None:
    recipe = compose(
        [
            "stages.pretrain.phases.p1.share=0.5",
            "stages.pretrain.phases.p2.share=0.4",
            "stages.pretrain.phases.p2.blend=tiny_p3",
            "stages.pretrain.phases.p3.blend={a: 1, b: 0.5}",
        ]
    ).recipe
    phases = recipe.stages["pretrain"].phases
    assert [phase.share for phase in phases.values()] == [0.5, 0.4, 0.1]
    assert phases["p3"].blend == {"a": 1.0, "b": 0.5}
    assert phases["p2"].blend == compose([]).recipe.stages["pretrain"].phases["p3"].blend


def test_reference_to_another_field() -> None:
    recipe = compose(["data.seed=${run.seed}", "run.seed=5"]).recipe
    assert recipe.data.seed == 5


@pytest.mark.parametrize(
    "text", ["def add(a, b):", "a=b", "it's (so)", "(", "{x", "a\nb(", "100% (sure)", 'say "hi" (now)', "x(\\", "q(\\'"]
)
def test_text_that_the_grammar_cannot_read_is_text(text: str) -> None:
    job = compose([f"generate.prompt={text}", "run.seed=3"])
    assert (job.recipe.generate.prompt, job.recipe.run.seed) == (text, 3)
    assert compose(job.command("train")[4:]).recipe == job.recipe
    swept = compose_sweep([f"generate.prompt={text}", "run.seed=3,4"])
    assert [each.recipe.generate.prompt for each in swept] == [text, text]


def test_run_is_named_after_its_recipe() -> None:
    assert compose(["recipe=nano_12b_v2_thin"]).recipe.run.name == "nano_12b_v2_thin"


def test_cfg_job_prints_what_composes_and_stops(cli: Cli) -> None:
    answer = cli("train", "--cfg", "job", "recipe=nano_12b_v2", "run.seed=9")
    assert (answer.code, answer.err) == (0, "")
    shown = yaml.safe_load(answer.out)
    assert shown["run"]["seed"] == 9
    assert shown["stages"]["pretrain"]["tokens"] == 20_000_000_000_000
    assert set(shown) == {item.name for item in fields(Recipe)}


def test_cfg_job_can_resolve_references(cli: Cli) -> None:
    overrides = ["data.seed=${run.seed}", "run.seed=5"]
    assert yaml.safe_load(cli("train", *overrides, "--cfg=job").out)["data"]["seed"] == "${run.seed}"
    assert yaml.safe_load(cli("train", *overrides, "-c", "job", "--resolve").out)["data"]["seed"] == 5


def test_help_names_verbs_recipes_and_exit_codes(cli: Cli) -> None:
    answer = cli("--help")
    assert (answer.code, answer.err) == (0, "")
    for word in ("prepare", "train", "launch", "generate", "report", "nano_12b_v2_thin,", "nemotron_h_8b, tiny", "75"):
        assert word in answer.out
    assert max(map(len, answer.out.splitlines())) <= 120


def test_no_arguments_are_answered_with_help(cli: Cli) -> None:
    answer = cli()
    assert (answer.code, answer.err) == (2, "")
    assert "Exit codes" in answer.out


def documented(node: object, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted name and sentence of every field."""
    found = []
    for item in fields(node):  # type: ignore[arg-type]
        value, name = getattr(node, item.name), prefix + item.name
        if is_dataclass(value):
            found += documented(value, f"{name}.")
        elif isinstance(value, dict) and all(map(is_dataclass, value.values())):
            for key, part in value.items():
                found += documented(part, f"{name}.{key}.")
        else:
            found.append((name, item.metadata["doc"]))
    return found


@pytest.mark.parametrize("recipe", ["tiny", "nano_12b_v2"])
def test_help_of_a_verb_has_the_value_and_the_sentence_of_every_field(cli: Cli, recipe: str) -> None:
    answer = cli("train", "--help", f"recipe={recipe}", "run.seed=77")
    assert (answer.code, answer.err) == (0, "")
    assert "run.seed=77\n        Seed of the initial weights. [fixed]\n" in answer.out
    for name, sentence in documented(compose([f"recipe={recipe}"]).recipe):
        assert f"\n{name}=" in answer.out
        assert sentence in answer.out


@pytest.mark.parametrize("option", ["--multirun", "-m"])
def test_option_may_stand_anywhere(cli: Cli, option: str) -> None:
    first, last = cli("train", option, "model.pattern=X"), cli("train", "model.pattern=X", option)
    assert first == last
    assert first.code == 2


def test_jobs_of_a_sweep_are_named_after_what_differs() -> None:
    assert names(["recipe=tiny", "run.seed=3", "optimizer.beta2=0.95,0.99"]) == [
        "tiny-optimizer.beta2=0.95",
        "tiny-optimizer.beta2=0.99",
    ]


def test_names_that_differ_already_are_kept() -> None:
    assert names(["run.name=a,b", "run.seed=3"]) == ["a", "b"]
    assert names(["recipe=tiny,nano_12b_v2_thin"]) == ["tiny", "nano_12b_v2_thin"]


def test_sweep_is_the_product_of_its_lists() -> None:
    jobs = compose_sweep(["precision=bf16", "run.name=x", "run.seed=1,2", "model.pattern=choice(M-,M*-)"])
    assert [(job.recipe.run.seed, job.recipe.model.pattern) for job in jobs] == [
        (1, "M-"), (1, "M*-"), (2, "M-"), (2, "M*-"),
    ]  # fmt: skip
    assert len({job.recipe.run.name for job in jobs}) == 4


def test_names_are_directory_names_and_differ_where_letters_must_be_replaced() -> None:
    found = names(["model.pattern=M-M*-,M-M--"])
    assert len(set(found)) == 2
    for name in found:
        assert name is not None
        assert "*" not in name
        compose([f"run.name='{name}'"])


def test_very_long_names_still_differ() -> None:
    blend = "{" + ", ".join(f"source_{number}: 1" for number in range(40)) + "}"
    found = names([f"stages.pretrain.phases.p1.blend={blend},tiny_p1", "run.seed=1,2"])
    assert len(set(found)) == 4
    assert all(name is not None and len(name) <= 120 for name in found)


def test_commands_of_a_sweep_compose_the_same_recipes() -> None:
    for job in compose_sweep(["precision=bf16", "optimizer.beta2=0.95,0.99", "model.pattern=M-,M*-", "run.name=x"]):
        command = job.command("train")
        assert command[2:4] == ["nano_pretrain", "train"]
        assert compose(command[4:]).recipe == job.recipe


def test_range_without_end_is_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.beta2: a range of real numbers"):
        compose_sweep(["optimizer.beta2=interval(0.9,0.99)"])


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The recipe.yaml of a run, in a directory whose name Hydra would not read."""
    path = tmp_path / "a (b) c" / "recipe.yaml"
    path.parent.mkdir()
    path.write_text(to_yaml(compose(["precision=bf16", "run.name=first", f"run.dir={tmp_path / 'runs'}"]).recipe))
    return path


@pytest.mark.parametrize("quote", ["", "'"])
def test_a_written_recipe_is_the_start_of_another(written: Path, quote: str) -> None:
    recipe = compose([f"recipe={quote}{written}{quote}", "run.seed=7"]).recipe
    assert (recipe.run.name, recipe.run.seed, recipe.precision.name) == ("first", 7, "bf16")


@pytest.mark.parametrize("override", ["precision=fp32", "+model=tiny", "~launch", "recipe=tiny"])
def test_groups_cannot_be_chosen_beside_a_written_recipe(written: Path, override: str) -> None:
    group = override.lstrip("+~").partition("=")[0]
    with pytest.raises(UserError, match=f"{group}: groups cannot be chosen beside a written recipe; name single"):
        compose([f"recipe={written}", override])


def test_a_directory_or_nothing_is_no_recipe(written: Path) -> None:
    for path in (written.parent, written.with_name("none.yaml"), "none.yaml"):
        with pytest.raises(UserError, match=r"is no recipe \(.*; write recipe=RUN/recipe\.yaml or a name"):
            compose([f"recipe={path}"])


def test_a_sweep_from_a_run_begins_with_its_imported_weights_or_not_at_all(written: Path, cli: Cli) -> None:
    sweep = [f"recipe={written}", "optimizer.beta2=0.95,0.99"]
    for job in compose_sweep(sweep):
        check_imported(job)
    (written.parent / ORIGIN).write_text("{}")
    answer = cli("launch", "--multirun", *sweep)
    assert answer.code == 2
    assert "first-optimizer.beta2=0.95 would begin without the weights" in answer.err
    (job, _) = compose_sweep(sweep)
    (Path(job.recipe.run.dir) / str(job.recipe.run.name) / "checkpoints" / "0").mkdir(parents=True)
    check_imported(job)


def test_sweep_goes_with_no_other_option(cli: Cli) -> None:
    assert "goes with no other option" in cli("train", "--multirun", "run.seed=1,2", "--cfg", "job").err
