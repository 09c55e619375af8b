"""The installed command: exit codes, speed, and what it does not import."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("nano-pretrain")
FULL = "the disk is full; free space or write somewhere else"


def run(*arguments: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """The command, and the processor time it took: the wall clock of a busy machine says little."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([COMMAND, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_help_is_quick(tmp_path: Path) -> None:
    done, seconds = run("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert seconds < 1.0


@pytest.mark.parametrize(
    "arguments", [["train", "recipe=tinny"], ["launch", "model.pattern=M-X"], ["train", "data.path=nowhere"]]
)
def test_recipe_error_is_quick_and_one_line(tmp_path: Path, arguments: list[str]) -> None:
    done, seconds = run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert seconds < 1.0
    assert list(tmp_path.iterdir()) == []


def test_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    line = f"{COMMAND} train --help | head -1"
    done = subprocess.run(["/bin/sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith("The fields of the chosen recipe")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_to_a_full_disk_is_one_line(tmp_path: Path, unbuffered: str) -> None:
    line = f"PYTHONUNBUFFERED={unbuffered} {COMMAND} train --help > /dev/full"
    done = subprocess.run(["/bin/sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"nano-pretrain: stdout: {FULL}\n")


def test_another_file_on_a_full_disk_is_not_called_stdout(tmp_path: Path) -> None:
    code = """
import errno, sys
from nano_pretrain import cli
def run(arguments):
    print("said")
    raise OSError(errno.ENOSPC, "No space left on device")
cli._run = run
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "said\n", f"nano-pretrain: a file: {FULL}\n")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["train", "--cfg", "job"], ["launch", "recipe=x"], ["train", "data.path=x"]],
    ids=" ".join,
)
def test_answers_without_torch(tmp_path: Path, arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["nano-pretrain", *{arguments!r}]
from nano_pretrain.cli import main
try:
    main()
except SystemExit:
    pass
heavy = {{"torch", "megatron", "transformers", "wandb", "tensorboard", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
