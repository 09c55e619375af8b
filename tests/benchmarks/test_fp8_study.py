"""The FP8 study: its statistics, and how it stops, with small commands in the place of training."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import fp8_study
from benchmarks.fp8_study import ARMS, Compared, Study, results, table, two_sided_p
from benchmarks.jobs import Job
from nano_pretrain.compose import compose
from nano_pretrain.recipe.load import to_yaml
from tests.launch.rank_programs import alive

# Two-sided 5 and 1 percent points of Student's t, from any table, to as many digits as it prints.
POINTS = [
    (1, 12.706, 0.05), (2, 4.303, 0.05), (3, 3.182, 0.05), (4, 2.776, 0.05), (5, 2.571, 0.05), (10, 2.228, 0.05),
    (30, 2.042, 0.05), (1, 63.657, 0.01), (2, 9.925, 0.01), (3, 5.841, 0.01), (4, 4.604, 0.01), (7, 3.499, 0.01),
]  # fmt: skip

STUDY = """
import sys
from benchmarks import fp8_study
from benchmarks.jobs import Job
fp8_study.prepare = lambda: None
fp8_study.Study.job = lambda self, arm, seed: Job(
    self.name(arm, seed), (sys.executable, "-c", PROGRAM, self.name(arm, seed)), self.directory / "logs" / f"{arm}.log")
fp8_study.main()
"""

TRAINER = """
import os, signal, sys, time
from pathlib import Path
from nano_pretrain.launch.parent import die_with_parent
die_with_parent()
name = sys.argv[1]
def on_request(number, frame):
    Path(f"{name}.asked").touch()
    time.sleep(0.3)
    Path(f"{name}.saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, on_request)
Path(f"{name}.new").write_text(str(os.getpid()))
Path(f"{name}.new").rename(f"{name}.pid")
while not (name.startswith("bf16-half") and Path("fail").exists()):
    time.sleep(0.02)
sys.exit("the disk is on fire")
"""
"""Runs until it is asked to stop, then takes a moment for a checkpoint; one arm fails once there is a file `fail`."""

FIRST, SECOND = "bf16-0", "bf16-half-micro-batches-0"


@contextmanager
def study(directory: Path, program: str = TRAINER) -> Iterator[subprocess.Popen[str]]:
    """A study of small commands, when its first two runs are under way; killed at the end."""
    code = f"PROGRAM = {program!r}\n{STUDY}"
    command = [sys.executable, "-c", code, "--directory", "study", "--seeds", "1"]
    with subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as one:
        try:
            wait(lambda: {FIRST, SECOND} <= set(pids(directory)), "two runs are under way")
            yield one
        finally:
            one.kill()


def wait(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def pids(directory: Path) -> dict[str, int]:
    return {path.stem: int(path.read_text()) for path in directory.glob("*.pid")}


def names(directory: Path, what: str) -> set[str]:
    return {path.stem for path in directory.glob(f"*.{what}")}


@pytest.mark.parametrize(("freedom", "t", "p"), POINTS)
def test_p_is_that_of_the_tables(freedom: int, t: float, p: float) -> None:
    # The tables' points are rounded to half a thousandth, which moves p by less than the tolerance.
    assert two_sided_p(t, freedom) == pytest.approx(p, rel=2e-3)
    assert two_sided_p(-t, freedom) == two_sided_p(t, freedom)


def test_p_of_differences() -> None:
    # By hand: t = 0.2 / 0.1 with one degree of freedom, where p is 1 - 2 / pi atan(t).
    assert Compared(1.0, [0.1, 0.3]).p == pytest.approx(1 - 2 / math.pi * math.atan(2))
    # Differences of docs/fp8_study.md; scipy 1.17.1's ttest_1samp gives these p.
    assert Compared(1.0, [0.0409688742, 0.0639961742, 0.0166712698]).p == pytest.approx(0.09727157, abs=1e-8)
    assert Compared(1.0, [0.1928077363, 0.1015192243, 0.0827747306]).p == pytest.approx(0.06595569, abs=1e-8)


@pytest.mark.parametrize("differences", [[0.1], [0.0, 0.0, 0.0]])
def test_no_p_without_a_spread(differences: list[float]) -> None:
    assert Compared(1.0, differences).p is None


def write_run(one: Study, arm: str, seed: int, loss: float, tokens: int) -> None:
    directory = one.directory / one.name(arm, seed)
    directory.mkdir(parents=True)
    (directory / "exit.json").write_text(json.dumps({"reason": "finished", "tokens": tokens}))
    (directory / "environment.json").write_text(json.dumps({"commit": "0123456789abcdef"}))
    (directory / "metrics.jsonl").write_text("".join(f'{{"loss": {loss}, "tokens": {step}}}\n' for step in range(80)))
    sources = {"a": {"loss": loss - 1, "tokens": 30}, "b": {"loss": loss + 3, "tokens": 10}}
    (directory / "validation.jsonl").write_text(json.dumps({"sources": sources}) + "\n")


def test_table_and_data_have_p_and_commit(tmp_path: Path) -> None:
    one = Study(tmp_path, tokens=80, seeds=3)
    for number, arm in enumerate(ARMS):
        for seed in range(3):
            write_run(one, arm, seed, 4 * (1 + 0.001 * number * (seed + 1)), tokens=80)
    fp8_study.write_results(one)
    data = json.loads((tmp_path / "study.json").read_text())
    # Differences 0.1, 0.2 and 0.3 percent: t = 2 x 3^0.5.
    expected = 1 - 12**0.5 / 14**0.5
    assert data["arms"]["BF16, half micro-batches"]["held-out"]["p"] == pytest.approx(expected)
    assert data["arms"]["BF16"]["held-out"]["p"] is None
    assert data["commits"] == ["0123456"]
    text = table(results(one, [0, 1, 2]), [0, 1, 2], ["0123456"])
    row = "| 4.0080 | +0.200 ± 0.058 | 0.074 | +0.10, +0.20, +0.30 | 4.0080 | +0.200 ± 0.058 | 0.074 |"
    assert f"| BF16, half micro-batches {row}\n" in text
    assert "| BF16 | 4.0000 |  |  |  | 4.0000 |  |  |\n" in text
    assert "commit 0123456;" in text


def test_run_of_another_length_has_not_finished(tmp_path: Path) -> None:
    # Its last step is the one that reaches 10,000 tokens.
    for tokens in (8_192, 12_288, 16_384):
        one = Study(tmp_path / str(tokens), tokens=10_000, seeds=1)
        write_run(one, "BF16", 0, 4.0, tokens)
        assert one.finished("BF16", 0) is (tokens == 12_288)


def run_main(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str]) -> int:
    """Exit code of a study that may not start anything."""

    def never(*_: object) -> Job:
        raise AssertionError("nothing may be started")

    monkeypatch.setattr(fp8_study, "prepare", never)
    monkeypatch.setattr(Study, "job", never)
    monkeypatch.setattr(sys, "argv", ["fp8_study", *arguments])
    with pytest.raises(SystemExit) as ended:
        fp8_study.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_run_that_another_process_trains_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = tmp_path / "fp8-blockwise-0"
    code = (
        "import sys; from pathlib import Path; from nano_pretrain.train.directory import only_trainer\n"
        f"with only_trainer(Path({str(held)!r})): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert run_main(monkeypatch, ["--directory", str(tmp_path)]) == 2
        other.communicate()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"(process {other.pid}) is running in {held}" in line


def test_directory_of_another_length_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = tmp_path / "bf16-0"
    begun.mkdir()
    recipe = compose(Study(tmp_path, tokens=40_960, seeds=1).overrides("BF16", 0)).recipe
    (begun / "recipe.yaml").write_text(to_yaml(recipe))
    assert run_main(monkeypatch, ["--directory", str(tmp_path), "--tokens", "81920"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"fp8_study: --tokens: {begun} was begun with 40960; write --tokens 40960 or choose another --directory"
    )


@pytest.mark.parametrize("option", ["--seeds", "--at-once", "--tokens"])
def test_numbers_are_above_zero(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_main(monkeypatch, [option, "0"]) == 2


def test_runs_end_with_a_killed_study(tmp_path: Path) -> None:
    with study(tmp_path) as one:
        one.kill()
        one.wait()
        under_way = pids(tmp_path)
        wait(lambda: not any(alive(pid) for pid in under_way.values()), "the runs are gone")
    assert set(under_way) == {FIRST, SECOND}


@pytest.mark.parametrize("request_", [signal.SIGTERM, signal.SIGINT])
def test_study_that_is_asked_to_stop_waits_for_its_runs(tmp_path: Path, request_: signal.Signals) -> None:
    with study(tmp_path) as one:
        os.kill(one.pid, request_)
        _, said = one.communicate(timeout=30)
    assert one.returncode == 75
    assert names(tmp_path, "saved") == set(pids(tmp_path)) == {FIRST, SECOND}
    assert said == f"waiting for {FIRST}, {SECOND} to stop\n"


def test_first_failure_is_said_at_once_and_ends_the_study(tmp_path: Path) -> None:
    # Asked to stop, the other run waits for a file: what the study says, it says before that.
    slow = TRAINER.replace("time.sleep(0.3)", "\n    while not Path('go').exists(): time.sleep(0.02)")
    with study(tmp_path, slow) as one:
        (tmp_path / "fail").touch()
        assert one.stderr is not None
        said = one.stderr.readline()
        wait(lambda: names(tmp_path, "asked") == {FIRST}, "the other run is asked to stop")
        (tmp_path / "go").touch()
        one.communicate(timeout=30)
    assert said == f"{SECOND} ended with code 1: the disk is on fire (study/logs/BF16, half micro-batches.log)\n"
    assert one.returncode == 1
    assert names(tmp_path, "saved") == {FIRST}
    assert set(pids(tmp_path)) == {FIRST, SECOND}, "no other run was started"
