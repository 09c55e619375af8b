"""Real rank processes: how they end, what the launcher makes of it, where their output goes."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nano_pretrain.launch import supervise
from nano_pretrain.launch.local import launch_local
from nano_pretrain.recipe.errors import UserError
from tests.launch.rank_programs import STOPS_ON_REQUEST, alive, program

Launch = Callable[..., int]


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervise, "PEER_SECONDS", 0.5)

    def run(body: str, ranks: int = 2, grace_seconds: float = 20.0, threads: int | None = None) -> int:
        return launch_local(
            program(body),
            ranks,
            grace_seconds=grace_seconds,
            log_dir=tmp_path / "logs",
            threads_per_rank=threads,
            environment={"COLOUR": "blue", "RANK": "not this one"},
        )

    return run


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((0, 0), 0),
        ((75, 75), 75),
        ((75, 0), 75),
        ((2, 2), 2),
        ((1, 1), 1),
        ((3, 0), 1),
        ((75, 1), 1),
        ((1, 2), 2),
        ((2, 1), 2),
    ],
)
def test_exit_codes_of_ranks_become_the_code_of_the_launch(
    launch: Launch, codes: tuple[int, int], expected: int
) -> None:
    assert launch(f"sys.exit({codes}[rank])") == expected


def test_ranks_find_each_other_as_under_torchrun(launch: Launch, tmp_path: Path) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS COLOUR"
    code = launch(f"open(f'seen-{{rank}}', 'w').write(' '.join(os.environ[n] for n in '{names}'.split()))", threads=3)
    assert code == 0
    for rank in range(2):
        assert (tmp_path / f"seen-{rank}").read_text() == f"{rank} {rank} 2 2 127.0.0.1 3 blue"


def test_threads_are_shared_out_but_never_none(launch: Launch, tmp_path: Path) -> None:
    ranks = len(os.sched_getaffinity(0)) + 1
    assert launch("open(f'threads-{rank}', 'w').write(os.environ['OMP_NUM_THREADS'])", ranks=ranks) == 0
    assert {(tmp_path / f"threads-{rank}").read_text() for rank in range(ranks)} == {"1"}


def test_process_group_forms_on_the_launchers_store(launch: Launch) -> None:
    body = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(total)
dist.destroy_process_group()
sys.exit(0 if total.item() == 3 else 1)
"""
    # Without -S: torch is in the virtual environment.
    command = [argument for argument in program(body) if argument != "-S"]
    assert launch_local(command, 2, grace_seconds=5, log_dir=Path("logs"), threads_per_rank=None, environment={}) == 0


def test_rank_0_writes_here_and_the_others_append_to_logs(
    launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = "print('out', rank, flush=True); print('err', rank, file=sys.stderr)"
    for _ in range(2):
        assert launch(body, ranks=3) == 0
    assert capfd.readouterr() == ("out 0\nout 0\n", "err 0\nerr 0\n")
    for rank in (1, 2):
        assert (tmp_path / f"logs/rank-{rank}.log").read_text() == f"out {rank}\nerr {rank}\n" * 2
    assert not (tmp_path / "logs/rank-0.log").exists()


def test_last_lines_of_the_rank_that_raised_are_shown_and_its_peers_are_ended(
    launch: Launch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch("if rank == 1: sys.exit('of an earlier launch')") == 1
    capfd.readouterr()
    body = "touch(f'pid-{os.getpid()}')\nif rank == 1: raise RuntimeError('the true reason')\ntime.sleep(600)"
    started = time.monotonic()
    assert launch(body, ranks=3) == 1
    assert time.monotonic() - started < 15
    stderr = capfd.readouterr().err
    assert "rank 1 failed with exit code 1; the end of " in stderr
    assert "RuntimeError: the true reason" in stderr
    assert "of an earlier launch" not in stderr
    assert "ended with it: rank 0, 2" in stderr
    pids = [int(path.name.removeprefix("pid-")) for path in Path().glob("pid-*")]
    assert len(pids) == 3
    assert not any(alive(pid) for pid in pids)


def test_killed_rank_is_to_blame_not_the_peer_that_lost_it(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
if rank == 1:
    print("last words")
    touch("dying")
    os.kill(os.getpid(), signal.SIGKILL)
wait_for("dying")
time.sleep(0.2)
sys.exit("connection closed by peer")
"""
    assert launch(body) == 1
    stderr = capfd.readouterr().err
    assert stderr.index("rank 1 was killed by signal 9") < stderr.index("rank 0 failed with exit code 1")
    assert "  last words\n" in stderr


def test_user_error_is_told_once(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("print('model.pattern: wrong; write M', file=sys.stderr); sys.exit(2)") == 2
    assert capfd.readouterr().err == "model.pattern: wrong; write M\n"


def test_user_error_of_another_rank_is_shown(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("if rank == 1: print('disk full'); sys.exit(2)\ntime.sleep(600)") == 2
    assert "  disk full\n" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals_reach_every_rank_once(launch: Launch, tmp_path: Path, name: str) -> None:
    handler = signal.getsignal(getattr(signal, name))
    # Rank 0 itself asks the launcher, which is this process, to stop, once both ranks listen.
    helper = f"""
if rank == 0 and os.fork() == 0:
    wait_for("ready-0"), wait_for("ready-1")
    os.kill(launcher, signal.{name})
    os._exit(0)
"""
    assert launch(helper + STOPS_ON_REQUEST) == 75
    assert [(tmp_path / f"received-{rank}").read_text() for rank in range(2)] == [name, name]
    assert signal.getsignal(getattr(signal, name)) == handler


@pytest.fixture
def terminal_may_be_lost() -> Iterator[None]:
    """The default of SIGHUP, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("terminal_may_be_lost")
def test_lost_terminal_is_a_request_to_stop(launch: Launch, tmp_path: Path) -> None:
    helper = (
        "if rank == 1 and os.fork() == 0:\n    wait_for('ready-1')\n    os.kill(launcher, signal.SIGHUP); os._exit(0)"
    )
    ready_0 = "\nif rank == 1: wait_for('ready-0')"
    assert launch(ready_0 + "\n" + helper + STOPS_ON_REQUEST) == 75
    assert (tmp_path / "received-0").read_text() == "SIGTERM"


def test_request_before_a_rank_listens_is_a_stop_on_request(launch: Launch) -> None:
    body = """
if rank == 0:
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    touch("ready-0")
else:
    wait_for("ready-0")
    os.kill(launcher, signal.SIGTERM)
time.sleep(600)
"""
    started = time.monotonic()
    assert launch(body, grace_seconds=60) == 75
    assert time.monotonic() - started < 15


def test_rank_that_does_not_stop_is_killed_after_the_grace_time(
    launch: Launch, capfd: pytest.CaptureFixture[str]
) -> None:
    body = """
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75) if rank == 0 else None)
touch(f"ready-{rank}")
if rank == 1:
    if os.fork() == 0:
        touch(f"pid-{os.getpid()}")
    else:  # One request only: a second could find rank 0 in its last moments, without its handler.
        wait_for("ready-0")
        os.kill(launcher, signal.SIGTERM)
while True:
    time.sleep(1)
"""
    started = time.monotonic()
    assert launch(body, grace_seconds=1.0) == 1
    assert 1.0 <= time.monotonic() - started < 15
    assert "rank 1 did not stop within launch.grace_seconds and was killed" in capfd.readouterr().err
    (child,) = (int(path.name.removeprefix("pid-")) for path in Path().glob("pid-*"))
    assert not alive(child)


def test_command_that_does_not_exist_fails(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = {"grace_seconds": 1, "log_dir": Path("logs"), "threads_per_rank": 1, "environment": {}}
    assert launch_local(["/nowhere/python"], 1, **arguments) == 1  # type: ignore[arg-type]
    assert "/nowhere/python" in capfd.readouterr().err


def test_unwritable_log_directory_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/logs: cannot be written"):
        launch_local(["true"], 2, grace_seconds=1, log_dir=tmp_path / "file/logs", threads_per_rank=1, environment={})


def test_importing_the_launcher_does_not_import_torch() -> None:
    code = "import sys, nano_pretrain.launch.local, nano_pretrain.launch.parent; sys.exit('torch' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
