"""The command line in this process: quick enough for a hundred wrong inputs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from nano_pretrain.cli import main
from tests.corpora import write_corpus


@dataclass(frozen=True)
class Answer:
    """Exit code, and what was written to stdout and stderr."""

    code: int
    out: str
    err: str


Cli = Callable[..., Answer]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared corpus; the sources alpha, beta, gamma."""
    return write_corpus(tmp_path_factory.mktemp("cli") / "corpus")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Call `nano-pretrain` with these arguments, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))

    def call(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["nano-pretrain", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ending:
            main()
        out, err = capsys.readouterr()
        assert isinstance(ending.value.code, int)
        return Answer(ending.value.code, out, err)

    return call
