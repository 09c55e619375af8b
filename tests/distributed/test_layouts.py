"""Every layout trains the same model: initial weights, losses, gradients, moments and checkpoints equal one rank's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from nano_pretrain.recipe.schema import ParallelConfig, Recipe
from tests.corpora import write_corpus
from tests.distributed import training
from tests.distributed.ranks import run_ranks
from tests.distributed.training import Change, Steps
from tests.model.recipes import small_recipe

ROUNDING = 1e-5
"""Sums in another order: fp32 rounding (6e-8) over six steps; in one tensor, where gradients cancel, up to 3e-6.

A mistake in a layout changes losses and norms by 1e-4 and more; bf16 would hide that.
"""

LAYOUTS = {
    "one rank": (1, ParallelConfig()),
    "DP2": (2, ParallelConfig()),
    "DP2, replicated optimizer": (2, ParallelConfig(distributed_optimizer=False)),
    "TP2": (2, ParallelConfig(tensor=2)),
    "TP2 with sequence parallelism": (2, ParallelConfig(tensor=2, sequence=True)),
    "PP2": (2, ParallelConfig(pipeline=2)),
    "TP2 x PP2": (4, ParallelConfig(tensor=2, pipeline=2)),
}
OTHERS = [name for name in LAYOUTS if name != "one rank"]


@dataclass(frozen=True)
class Trained:
    """Six steps in each layout, saved at the start and after three; with document resets and a padded vocabulary."""

    recipe: Recipe
    directory: Path
    first: dict[str, Steps]
    second: dict[str, Steps]

    def differences(self, step: int) -> dict[str, dict[str, float]]:
        """See `training.differences`."""
        others = {name: self.directory / name for name in OTHERS}
        result: dict[str, dict[str, float]] = run_ranks(
            training.differences, 1, self.directory / "one rank", others, step
        )[0]
        return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory = tmp_path_factory.mktemp("layouts")
    recipe = small_recipe(corpus=write_corpus(directory / "corpus"))
    first, second = {}, {}
    for name, (ranks, layout) in LAYOUTS.items():
        results = run_ranks(training.train_and_save, ranks, recipe, layout, directory / name)
        assert all(result == results[0] for result in results), "every rank reports the same"
        first[name], second[name] = results[0]
    return Trained(recipe, directory, first, second)


@pytest.fixture(scope="module")
def initial_differences(trained: Trained) -> dict[str, dict[str, float]]:
    return trained.differences(0)


@pytest.fixture(scope="module")
def trained_differences(trained: Trained) -> dict[str, dict[str, float]]:
    return trained.differences(3)


def same(actual: Steps, expected: Steps) -> bool:
    pairs = zip([*actual.losses, *actual.grad_norms], [*expected.losses, *expected.grad_norms], strict=True)
    return all(a == pytest.approx(b, rel=ROUNDING) for a, b in pairs)


@pytest.mark.parametrize("layout", OTHERS)
def test_initial_weights_are_equal_bit_for_bit(layout: str, initial_differences: dict[str, dict[str, float]]) -> None:
    assert initial_differences[layout] == dict.fromkeys(initial_differences[layout], 0.0)
    assert len(initial_differences[layout]) > 40


@pytest.mark.parametrize("layout", OTHERS)
def test_losses_and_gradient_norms_are_equal(layout: str, trained: Trained) -> None:
    assert same(trained.first[layout], trained.first["one rank"])
    assert same(trained.second[layout], trained.second["one rank"])


@pytest.mark.parametrize("layout", OTHERS)
def test_every_weight_and_moment_is_equal(layout: str, trained_differences: dict[str, dict[str, float]]) -> None:
    # Losses hide a wrong gradient of one tensor, and Adam hides its scale; the first moment is linear in it.
    found = trained_differences[layout]
    worst = max(found, key=lambda name: found[name])
    assert found[worst] < ROUNDING, worst
    assert any(".exp_avg." in name for name in found)


def test_the_gradient_is_clipped(trained: Trained) -> None:
    # Otherwise a wrong norm would not change the training that is compared here.
    assert min(trained.first["one rank"].grad_norms) > trained.recipe.optimizer.clip_grad


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("DP2", "DP2"),
        ("DP2", "one rank"),
        ("DP2", "TP2"),
        ("TP2 x PP2", "DP2"),
        ("DP2, replicated optimizer", "DP2, replicated optimizer"),
    ],
)
def test_a_checkpoint_continues_in_another_layout(source: str, target: str, trained: Trained, tmp_path: Path) -> None:
    ranks, layout = LAYOUTS[target]
    arguments = (trained.recipe, layout, trained.directory / source, tmp_path)
    continued = run_ranks(training.load_and_train, ranks, *arguments)[0]
    if source == target:
        assert continued == trained.second[source]
    # Three steps: wrong moments show only from the second on.
    assert same(continued, trained.second[source])
    copied = run_ranks(training.differences, 1, trained.directory / source, {"copy": tmp_path}, 3)[0]["copy"]
    assert copied == dict.fromkeys(copied, 0.0)


def test_a_bf16_checkpoint_continues_in_another_layout(trained: Trained, tmp_path: Path) -> None:
    recipe = small_recipe("bf16", corpus=Path(trained.recipe.data.path))
    _, uninterrupted = run_ranks(training.train_and_save, 2, recipe, ParallelConfig(), tmp_path / "DP2")[0]
    same_layout = (recipe, ParallelConfig(), tmp_path / "DP2", tmp_path / "copy")
    assert run_ranks(training.load_and_train, 2, *same_layout)[0] == uninterrupted
    other_layout = (recipe, ParallelConfig(tensor=2), tmp_path / "DP2", tmp_path / "TP2")
    continued = run_ranks(training.load_and_train, 2, *other_layout)[0]
    # Activations are rounded to 8 bits (4e-3) in another place, over thousands of tokens.
    assert continued.losses == pytest.approx(uninterrupted.losses, rel=1e-3)
    others = {name: tmp_path / name for name in ("copy", "TP2")}
    for copied in run_ranks(training.differences, 1, tmp_path / "DP2", others, 3)[0].values():
        assert copied == dict.fromkeys(copied, 0.0)


@pytest.mark.parametrize(
    ("mistake", "layout"),
    [
        (training.unmark_sharded_weights, "TP2"),
        (training.unmark_norms, "TP2 with sequence parallelism"),
        (training.build_with_rank_seed, "DP2"),
    ],
)
def test_a_mistake_is_seen(mistake: Change, layout: str, trained: Trained) -> None:
    ranks, config = LAYOUTS[layout]
    wrong = run_ranks(training.train_changed, ranks, trained.recipe, config, mistake)[0]
    assert not same(wrong, trained.first["one rank"])
