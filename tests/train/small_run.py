"""Runs of a tiny model on a small corpus, in processes of their own: 20 steps in two seconds after a start of four."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.corpora import BLEND, VOCAB_SIZE

STEPS = 20
TOKENS_PER_STEP = 8 * 128
TOKENS = STEPS * TOKENS_PER_STEP
LEARNED = ("step", "tokens", "loss", "lr", "grad_norm", "stage", "phase", "sequence_length", "global_batch_size")
"""Columns of metrics.jsonl that a resumed run repeats bit for bit."""

SMALL = [
    "precision=bf16", "extension=none", "evaluate.lengths=[]", "data.max_epochs=100", "data.quota_window=16",
    f"model.vocab_size={VOCAB_SIZE}", "model.pattern=M-M*-", "model.hidden_size=64", "model.ffn_hidden_size=128",
    "model.num_attention_heads=4", "model.num_query_groups=2", "model.head_dim=16", "model.mamba_num_heads=4",
    "model.mamba_head_dim=32", "model.mamba_num_groups=2", "model.mamba_state_dim=16",
    f"stages.pretrain.tokens={TOKENS}", "stages.pretrain.sequence_length=128", "stages.pretrain.micro_batch_size=2",
    "stages.pretrain.global_batch_size=8", "stages.pretrain.schedule.warmup_tokens=2048",
    "stages.pretrain.schedule.decay_tokens=4096",
    *(f"stages.pretrain.phases.{phase}.blend={BLEND}" for phase in ("p1", "p2", "p3")),
    "validation.every=8", "validation.tokens_per_source=1024", "validation.prompts=[]", "validation.baselines=false",
    "checkpoint.every=5",
]  # fmt: skip
"""Overrides of `tiny`; `data.path` is left to say."""

QUICK = ["log.wandb=disabled", "log.tensorboard=false", "cluster.peak_tflops=0.1", "cluster.threads_per_rank=1"]
"""Leaves out what takes time and is tested elsewhere."""


@dataclass(frozen=True)
class SmallRuns:
    """A corpus and a directory of runs.

    Attributes:
        corpus: directory of the prepared corpus.
        directory: `run.dir`.
    """

    corpus: Path
    directory: Path

    def path(self, name: str) -> Path:
        """Directory of a run."""
        return self.directory / name

    def command(self, verb: str, name: str, *more: str) -> list[str]:
        """The arguments of `nano-pretrain`; later overrides win."""
        place = [f"data.path={self.corpus}", f"run.dir={self.directory}", f"run.name={name}"]
        return [verb, *SMALL, *QUICK, *place, *more]

    def start(self, verb: str, name: str, *more: str) -> subprocess.Popen[str]:
        """A process in a session of its own, its stdout and stderr on one pipe."""
        return start(self.command(verb, name, *more))

    def run(self, verb: str, name: str, *more: str, timeout: float = 120) -> Finished:
        """Run to the end."""
        return finish(self.start(verb, name, *more), timeout)


@dataclass(frozen=True)
class Finished:
    """How a process ended and all that it wrote."""

    code: int
    text: str

    @property
    def last_line(self) -> str:
        """What stands at the end of the output."""
        return self.text.strip().rpartition("\n")[2]


def start(arguments: list[str], program: tuple[str, ...] = ("-m", "nano_pretrain")) -> subprocess.Popen[str]:
    """Start `nano-pretrain` from a directory that is not the checkout's."""
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        cwd=tempfile.gettempdir(),
        env={name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "OMP_NUM"))},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout: float = 120) -> Finished:
    """Wait for the end; a process that hangs is killed, and the test fails with what it wrote."""
    try:
        text, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        raise AssertionError(f"hangs after {timeout} s; it wrote:\n{text}") from None
    return Finished(process.returncode, text)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 90) -> None:
    """Poll tightly while the process lives; one for which it does not come true is killed, and the test fails."""
    end = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"never came true; the process wrote:\n{finish(process).text}")
        time.sleep(0.002)


def newer(directory: Path, pattern: str, since: float) -> bool:
    """Whether a file that matches was written after a moment of `time.time()`; one may vanish while it is looked at."""
    with suppress(FileNotFoundError):
        return any(path.stat().st_mtime > since for path in directory.glob(pattern))
    return False


def lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, without a torn last one; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def steps(run: Path) -> int:
    """Steps in metrics.jsonl."""
    return len(lines(run / "metrics.jsonl"))


def learned(run: Path) -> list[tuple[Any, ...]]:
    """What each step computed, without what depends on the wall clock."""
    return [tuple(line[name] for name in LEARNED) for line in lines(run / "metrics.jsonl")]


def exit_json(run: Path) -> dict[str, Any]:
    """How the run's last process ended."""
    content: dict[str, Any] = json.loads((run / "exit.json").read_text())
    return content


def checkpoints(run: Path) -> list[str]:
    """Names under checkpoints/, in order of their tokens."""
    return sorted((path.name for path in (run / "checkpoints").glob("*")), key=lambda name: (len(name), name))
