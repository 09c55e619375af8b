"""Callbacks that show the run: progress bar, TensorBoard, wandb."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from nano_pretrain.recipe.errors import UserError
from nano_pretrain.train.session import Session, StepRecord

PLAIN_INTERVAL_SECONDS = 15.0
"""Time between two lines where the output is not a terminal."""


class _Summary(ProgressColumn):
    """Loss and speed of the last step, on one line however narrow the terminal is."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("summary", "")))


class ProgressBar:
    """A bar with phase, loss, tokens/s and time left; lines where the output is not a terminal.

    Args:
        total: tokens of the run.
        every: steps between two updates.
    """

    def __init__(self, total: int, every: int) -> None:
        self.total = total
        self.every = max(1, every)
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_line = 0.0
        self._began = (0, 0.0)

    def on_start(self, session: Session) -> None:
        """Show where the run stands."""
        self._began = (session.tokens, time.monotonic())
        where = f"step {session.step:,}, {session.tokens:,} of {self.total:,} tokens"
        print(f"{session.directory}: {'continuing at' if session.step else 'starting at'} {where}", flush=True)
        print(f"kernels: {session.platform.kernels()}", flush=True)
        if sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                _Summary(),
            )
            self._bar = Progress(*columns, expand=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, completed=session.tokens)

    def on_step(self, session: Session, record: StepRecord, stopping: bool) -> None:
        """Update the bar, or print a line from time to time."""
        if record.step % self.every and not stopping and not session.finished:
            return
        utilisation = "" if record.mfu is None else f"  MFU {record.mfu:.1%}"
        summary = f"loss {record.loss:.3f}  {record.tokens_per_second:,.0f} tokens/s{utilisation}"
        if self._bar is not None:
            description = f"{record.stage}/{record.phase}"
            self._bar.update(self._task, completed=record.tokens, description=description, summary=summary)
        elif stopping or session.finished or time.monotonic() - self._last_line >= PLAIN_INTERVAL_SECONDS:
            self._last_line = time.monotonic()
            print(
                f"{record.stage}/{record.phase}  {record.tokens / self.total:4.0%}  step {record.step}  {summary}  "
                f"{self._left(record)}",
                flush=True,
            )

    def on_end(self, session: Session) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.stop()

    def _left(self, record: StepRecord) -> str:
        tokens, began = self._began
        rate = (record.tokens - tokens) / max(time.monotonic() - began, 1e-9)
        return f"{timedelta(seconds=round((self.total - record.tokens) / rate))} left"


class TensorBoard:
    """Scalars in logs/; what an interrupted process wrote past its checkpoint is purged."""

    def __init__(self, every: int) -> None:
        self.every = max(1, every)
        self._writer: Any = None

    def on_start(self, session: Session) -> None:
        """Open the event file."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(session.directory / "logs"), purge_step=session.step + 1)

    def on_step(self, session: Session, record: StepRecord, stopping: bool) -> None:
        """Write the step's numbers."""
        if record.step % self.every == 0 or session.finished:
            for name, value in _scalars(record).items():
                self._writer.add_scalar(f"train/{name}", value, record.step)
        for name, value in session.quantisation.items():
            self._writer.add_scalar(f"fp8/{name}", value, record.step)

    def on_end(self, session: Session) -> None:
        """Close the event file."""
        self._writer.close()


class Wandb:
    """The same numbers in a wandb run of the run's name; offline unless asked, and never a login prompt."""

    def __init__(self, mode: str, project: str, every: int) -> None:
        self.mode = mode
        self.project = project
        self.every = max(1, every)
        self._run: Any = None

    def on_start(self, session: Session) -> None:
        """Begin or continue the run.

        Raises:
            UserError: wandb refuses, for example the API key.
        """
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        (session.directory / "logs").mkdir(exist_ok=True)
        name = str(session.recipe.run.name)
        try:
            self._run = wandb.init(
                project=self.project,
                name=name,
                id=name.replace(",", "_"),  # the one letter of a run's name that wandb does not take
                dir=str(session.directory / "logs"),
                mode="offline" if self.mode == "offline" else "online",
                resume="allow",
            )
        except wandb.Error as error:
            raise UserError(f"log.wandb: {error}; mend it or write log.wandb=offline") from error

    def on_step(self, session: Session, record: StepRecord, stopping: bool) -> None:
        """Log the step's numbers."""
        if record.step % self.every == 0 or session.finished:
            self._run.log(_scalars(record), step=record.step)
        if session.quantisation:
            self._run.log({f"fp8/{name}": value for name, value in session.quantisation.items()}, step=record.step)

    def on_end(self, session: Session) -> None:
        """Finish the run."""
        self._run.finish()


def _scalars(record: StepRecord) -> dict[str, float]:
    return {name: value for name, value in asdict(record).items() if isinstance(value, (int, float)) and name != "step"}
