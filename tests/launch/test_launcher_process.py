"""The launcher as a process of its own: under a terminal, and killed."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.rank_programs import STOPS_ON_REQUEST, alive, program

_DIES_WITH_PARENT = """
from nano_pretrain.launch.parent import die_with_parent
die_with_parent()
assert "NANO_PRETRAIN_LAUNCHER_PID" not in os.environ
touch(f"{rank}-{os.getpid()}")
time.sleep(600)
"""


def _launcher(command: list[str]) -> list[str]:
    code = (
        "import sys; from pathlib import Path; from nano_pretrain.launch.local import launch_local; "
        f"sys.exit(launch_local({command!r}, 2, grace_seconds=20, log_dir=Path('logs'), threads_per_rank=1, "
        "environment={}))"
    )
    return [sys.executable, "-c", code]


def _wait(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    # Without -S: the package is found through the virtual environment.
    command = [argument for argument in program(_DIES_WITH_PARENT) if argument != "-S"]
    launcher = subprocess.Popen(_launcher(command), cwd=tmp_path)
    try:
        _wait(lambda: len(list(tmp_path.glob("[01]-*"))) == 2, "both ranks run")
    finally:
        launcher.kill()
        launcher.wait()
    pids = [int(path.name.split("-")[1]) for path in tmp_path.glob("[01]-*")]
    _wait(lambda: not any(alive(pid) for pid in pids), "both ranks are gone")


def test_rank_whose_launcher_is_already_gone_ends_at_once(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    code = "from nano_pretrain.launch.parent import die_with_parent; die_with_parent(); print('alive')"
    environment = {**os.environ, "NANO_PRETRAIN_LAUNCHER_PID": str(gone.pid)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def test_nothing_happens_to_a_process_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANO_PRETRAIN_LAUNCHER_PID", raising=False)
    code = "from nano_pretrain.launch.parent import die_with_parent; die_with_parent(); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "alive\n"


def test_ctrl_c_in_a_terminal_reaches_each_rank_once(tmp_path: Path) -> None:
    body = "if rank == 0: print('tty', sys.stdout.isatty(), sys.stderr.isatty(), flush=True)\n" + STOPS_ON_REQUEST
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execv(sys.executable, _launcher(program(body)))
    try:
        _wait(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "both ranks run")
        os.write(terminal, b"\x03")
        _wait(lambda: not alive(pid), "the launcher ends")
        _, status = os.waitpid(pid, 0)
        screen = os.read(terminal, 65_536).decode()
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 75
    assert "tty True True" in screen
    assert [(tmp_path / f"received-{rank}").read_text() for rank in range(2)] == ["SIGINT", "SIGINT"]
