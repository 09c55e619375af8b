"""Files of a run's directory: one trainer at a time, whole or absent, and nothing past the checkpoint."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_pretrain.checkpoint.files import append_line, write_whole
from nano_pretrain.parallel.groups import Ranks
from nano_pretrain.recipe.errors import RunError, UserError
from nano_pretrain.train.directory import (
    check_not_held,
    full_disk_is_the_users_to_mend,
    only_trainer,
    truncate_streams,
)
from nano_pretrain.train.exit_file import ExitFile

HOLDER = """
import sys, time
from pathlib import Path
from nano_pretrain.train.directory import only_trainer
with only_trainer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_directory_is_free_again_when_its_trainer_is_killed(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        held = rf"run\.name: another trainer \(process {holder.pid}\) is running"
        with pytest.raises(UserError, match=held):
            check_not_held(run)
        with pytest.raises(UserError, match=held):
            only_trainer(run).__enter__()
        holder.kill()
    check_not_held(run)
    with only_trainer(run):
        assert (run / ".lock").read_text() == str(os.getpid())


def test_directory_is_free_though_a_child_of_the_killed_trainer_lives_on(tmp_path: Path) -> None:
    forks = HOLDER.replace(
        "    time.sleep(600)",
        "    import os\n    if os.fork() == 0:\n        print(os.getpid(), flush=True)\n    time.sleep(600)",
    )
    with subprocess.Popen([sys.executable, "-c", forks, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            child = int(holder.stdout.readline())
        finally:
            holder.kill()
            holder.wait()
        try:
            check_not_held(tmp_path)
        finally:
            os.kill(child, signal.SIGKILL)


def test_asking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_not_held(tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run\.dir: cannot write .*file.*choose another run\.dir"):
        only_trainer(tmp_path / "file" / "x").__enter__()


def test_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@given(
    count=st.integers(0, 30),
    kept=st.integers(-1, 40),
    torn=st.text(st.characters(codec="ascii", exclude_characters="\r\n"), max_size=20),
)
def test_lines_past_the_checkpoint_and_a_torn_last_one_are_dropped(
    tmp_path_factory: pytest.TempPathFactory, count: int, kept: int, torn: str
) -> None:
    run = tmp_path_factory.mktemp("run")
    for name in ("metrics.jsonl", "validation.jsonl", "fp8.jsonl", "evaluation.jsonl", "harness.jsonl"):
        for tokens in range(count):
            append_line(run / name, {"tokens": tokens, "loss": 1 / 3})
        if count:
            with (run / name).open("a") as stream:
                stream.write('{"tokens": 0, "lo' + torn)
    truncate_streams(run, kept)
    truncate_streams(run, kept)
    for path in run.iterdir():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert lines == [{"tokens": tokens, "loss": 1 / 3} for tokens in range(min(count, kept + 1))]


def test_no_space_left_says_what_to_do() -> None:
    with (
        pytest.raises(UserError, match=r"the disk is full, metrics\.jsonl was not written"),
        full_disk_is_the_users_to_mend(),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
    with pytest.raises(PermissionError), full_disk_is_the_users_to_mend():
        raise PermissionError(errno.EACCES, "not yours")


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("bad"), 2), (RunError("nan"), 1), (KeyError("x"), 1), (KeyboardInterrupt(), 1)]
)
def test_exit_file_says_what_ended_the_process(tmp_path: Path, error: BaseException, code: int) -> None:
    with pytest.raises(type(error)), ExitFile(tmp_path, Ranks(0, 1, 0)):
        raise error
    content = json.loads((tmp_path / "exit.json").read_text())
    assert content["code"] == code
    assert content["reason"].startswith(type(error).__name__)


def test_exit_file_of_an_earlier_process_is_gone_while_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "exit.json").write_text("of an earlier process")
    with ExitFile(tmp_path, Ranks(0, 1, 0)) as ending:
        assert list(tmp_path.iterdir()) == []
        ending.set(75, "stopped by SIGTERM")
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 75


def test_only_the_first_rank_writes_the_exit_file(tmp_path: Path) -> None:
    with ExitFile(tmp_path, Ranks(1, 2, 1)) as ending:
        ending.set(0, "finished")
    assert list(tmp_path.iterdir()) == []


def test_exit_file_that_cannot_be_written_does_not_hide_what_ended_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the disk is full"), ExitFile(tmp_path / "gone", Ranks(0, 1, 0)):
        raise UserError("the disk is full")
