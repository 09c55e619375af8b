"""Small programs that the launcher's tests run as ranks."""

import sys
from pathlib import Path

_PROLOGUE = """
import os, signal, sys, time
rank, launcher = int(os.environ["RANK"]), int(os.environ["NANO_PRETRAIN_LAUNCHER_PID"])

def wait_for(path, seconds=30):
    end = time.monotonic() + seconds
    while not os.path.exists(path):
        assert time.monotonic() < end, path
        time.sleep(0.01)

def touch(path):
    open(path, "w").close()
"""

STOPS_ON_REQUEST = """
received = []
for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda number, frame: received.append(signal.Signals(number).name))
touch(f"ready-{rank}")
while not received:
    time.sleep(0.01)
time.sleep(0.3)
with open(f"received-{rank}", "w") as file:
    file.write(" ".join(received))
sys.exit(75)
"""
"""Ends with 75 after a signal; the files ready-N and received-N (the signals' names) say so."""


def program(body: str) -> list[str]:
    """A rank's command: `body` with `rank`, `launcher` (its process id), `wait_for(path)` and `touch(path)`."""
    return [sys.executable, "-S", "-c", _PROLOGUE + body]


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
