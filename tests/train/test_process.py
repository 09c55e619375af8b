"""Processes that a rank forks end with it."""

import subprocess
import sys

import psutil

PARENT = """
import os, time
from nano_pretrain.platform.process import children_end_with_this_process
children_end_with_this_process()
children_end_with_this_process()
if os.fork() == 0:
    # A child of the child has a parent of its own.
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(600)
    os.wait()
print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_forked_children_do_not_outlive_a_killed_process() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        parent.stdout.readline()
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) == 2
        parent.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
