"""The jobs of a sweep, as small programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nano_pretrain.launch.sweep import run_in_turn


def job(body: str) -> list[str]:
    return [sys.executable, "-S", "-c", f"import os, signal, sys, time\n{body}"]


@pytest.mark.parametrize(("codes", "expected"), [([0, 0], 0), ([0, 2, 0], 2), ([1, 2], 2), ([1, 0], 1), ([], 0)])
def test_largest_code_counts_and_a_failure_does_not_end_the_sweep(
    tmp_path: Path, codes: list[int], expected: int
) -> None:
    jobs = [job(f"open({str(tmp_path / str(n))!r}, 'w'); sys.exit({code})") for n, code in enumerate(codes)]
    assert run_in_turn(jobs) == expected
    assert len(list(tmp_path.iterdir())) == len(codes)


def test_killed_job_is_a_failure() -> None:
    assert run_in_turn([job("os.kill(os.getpid(), signal.SIGKILL)"), job("")]) == 1


def test_job_that_was_stopped_ends_the_sweep(tmp_path: Path) -> None:
    assert run_in_turn([job("sys.exit(75)"), job(f"open({str(tmp_path / 'second')!r}, 'w')")]) == 75
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("then", ["sys.exit(0)", "time.sleep(600)"])
def test_request_ends_the_sweep_even_if_the_job_does_not_heed_it(tmp_path: Path, then: str) -> None:
    asks = job(f"os.kill(os.getppid(), signal.SIGTERM); {then}")
    assert run_in_turn([asks, job(f"open({str(tmp_path / 'second')!r}, 'w')")]) == 75
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_request_to_stop_reaches_the_job_once(tmp_path: Path, name: str) -> None:
    seen = tmp_path / "seen"
    body = f"""
def stop(number, frame):
    open({str(seen)!r}, "a").write(signal.Signals(number).name)
    time.sleep(0.2)
    sys.exit(75)
signal.signal(signal.{name}, stop)
print("ready", flush=True)
time.sleep(600)
"""
    code = f"import sys; from nano_pretrain.launch.sweep import run_in_turn; sys.exit(run_in_turn([{job(body)!r}] * 2))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as sweep:
        assert sweep.stdout is not None
        assert sweep.stdout.readline() == "ready\n"
        # As Ctrl-C in a terminal: to the whole foreground group.
        os.killpg(sweep.pid, signal.Signals[name])
        assert sweep.wait(timeout=20) == 75
    assert seen.read_text() == name
