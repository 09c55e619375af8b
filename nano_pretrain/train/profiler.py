"""A callback that records what the machine does in some steps."""

from __future__ import annotations

from torch.profiler import profile, supported_activities

from nano_pretrain.train.session import Session, StepRecord


class Profiler:
    """Profiles steps with torch's profiler and writes one trace a rank to `logs/`, for chrome://tracing or Perfetto.

    A run that ends in between writes what there is, and a resumed one the rest to a file of its own.

    Args:
        first: number of the first step to profile, from 1.
        last: number of the last.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first = first
        self.last = last
        self._profile: profile | None = None
        self._begun = first

    def on_start(self, session: Session) -> None:
        """Begin, if the next step is the first one or a later one of them."""
        self._begin_before(session.step + 1)

    def on_step(self, session: Session, record: StepRecord, stopping: bool) -> None:
        """End after the last step, begin before the first."""
        if record.step == self.last:
            self._write(session)
        self._begin_before(record.step + 1)

    def on_end(self, session: Session) -> None:
        """Write what is not written yet."""
        self._write(session)

    def _begin_before(self, step: int) -> None:
        if self._profile is None and self.first <= step <= self.last:
            self._profile = profile(activities=supported_activities(), record_shapes=True, profile_memory=True)
            self._profile.start()
            self._begun = step

    def _write(self, session: Session) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        directory = session.directory / "logs"
        directory.mkdir(exist_ok=True)
        name = f"trace-rank-{session.ranks.rank}-from-step-{self._begun}.json"
        self._profile.export_chrome_trace(str(directory / name))
        self._profile = None
