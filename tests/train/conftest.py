"""One corpus and one directory of runs for all tests of training; runs that nobody disturbs, to compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.corpora import write_corpus
from tests.train.small_run import Finished, SmallRuns


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRuns:
    """A small corpus and an empty directory for runs."""
    root = tmp_path_factory.mktemp("train")
    return SmallRuns(write_corpus(root / "corpus"), root / "runs")


@pytest.fixture(scope="session")
def undisturbed(small: SmallRuns) -> tuple[Path, Finished]:
    """A run of 20 steps on two ranks, with everything that a run reports to."""
    reports = ["log.wandb=offline", "log.tensorboard=true", "validation.baselines=true", "validation.prompts=[ab, '']"]
    done = small.run("launch", "undisturbed", *reports, "generate.max_new_tokens=5")
    assert done.code == 0, done.text
    return small.path("undisturbed"), done
