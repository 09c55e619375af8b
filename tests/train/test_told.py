"""What a command is answered before a rank starts, where it tells a run something in mid-run."""

from __future__ import annotations

import pytest

from nano_pretrain.checkpoint.manifest import Manifest
from nano_pretrain.compose import compose
from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.shards import open_corpus
from nano_pretrain.recipe.acts import HISTORY, written
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.load import to_yaml
from nano_pretrain.train.before import check_before
from tests.train.small_run import TOKENS_PER_STEP, SmallRuns

END = "stages.pretrain.schedule.extend_to"
AT = 10 * TOKENS_PER_STEP
"""In the stable part of the 20 steps, of which the last four decay; the first phase ends at 12 steps."""


class Run:
    """A run that has consumed `AT` tokens, as far as its files say."""

    def __init__(self, small: SmallRuns, name: str) -> None:
        self.overrides = small.command("train", name, "cluster.gpus=1")[1:]
        self.directory = small.path(name)
        self.corpus = open_corpus(small.corpus)
        self.directory.mkdir(parents=True)
        (self.directory / "recipe.yaml").write_text(to_yaml(compose(self.overrides).recipe))
        self.checkpoint(AT, acts=0)

    def checkpoint(self, tokens: int, acts: int) -> None:
        directory = self.directory / "checkpoints" / str(tokens)
        directory.mkdir(parents=True)
        corpus = self.corpus
        Manifest(tokens, tokens, {}, {}, corpus.fingerprint, {}, corpus.record, acts).write(directory)

    def command(self, *told: str) -> Curriculum:
        overrides = [*self.overrides, *told]
        return check_before(compose(overrides).recipe, overrides, self.directory, first_rank=True)

    def start(self, *told: str) -> Curriculum:
        """A start of it that is killed at once."""
        curriculum = self.command(*told)
        (self.directory / HISTORY).write_text(written(curriculum.acts))
        (self.directory / "recipe.yaml").write_text(to_yaml(curriculum.recipe))
        return curriculum


def phase_ends(curriculum: Curriculum) -> list[int]:
    return [phase.end_tokens // TOKENS_PER_STEP for phase in curriculum.stages[0].phases]


def test_an_end_that_is_taken_back_leaves_no_trace(small: SmallRuns) -> None:
    run = Run(small, "taken_back")
    assert phase_ends(run.start(f"{END}={14 * TOKENS_PER_STEP}")) == [10, 13, 14]
    assert phase_ends(run.start(f"{END}=null")) == [12, 18, 20]


@pytest.mark.parametrize("end", [3 * TOKENS_PER_STEP, 13 * TOKENS_PER_STEP])
def test_an_end_that_is_too_short_is_answered_with_one_that_is_taken(small: SmallRuns, end: int) -> None:
    run = Run(small, f"too_short_{end}")
    with pytest.raises(UserError, match=rf"^{END}: {end} is less than .* write at least {14 * TOKENS_PER_STEP}$"):
        run.command(f"{END}={end}")
    assert phase_ends(run.command(f"{END}={14 * TOKENS_PER_STEP}"))[-1] == 14


def test_a_run_whose_history_is_lost_does_not_go_on(small: SmallRuns) -> None:
    run = Run(small, "lost")
    longer = f"{END}={30 * TOKENS_PER_STEP}"
    run.start(longer)
    run.checkpoint(AT + TOKENS_PER_STEP, acts=1)
    assert phase_ends(run.command()) == [18, 27, 30]
    (run.directory / HISTORY).unlink()
    for told in ([], [longer]):
        with pytest.raises(UserError, match=rf"^{run.directory / HISTORY}: has 0 of the 1 changes"):
            run.command(*told)
