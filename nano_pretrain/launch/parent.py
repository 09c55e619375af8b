"""A rank does not outlive the launcher that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHER_PID = "NANO_PRETRAIN_LAUNCHER_PID"
"""Environment variable that holds the process id of the launcher, set for its ranks only."""

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Let the kernel kill this process when its launcher dies, even of SIGKILL.

    A trainer calls it first of all. It does nothing where no launcher of ours started the process (a single rank, bare
    torchrun, srun) and outside Linux. The variable is removed, so that children of the rank do not take themselves for
    ranks.

    Raises:
        OSError: the kernel refused the request.

    Source: prctl(2), PR_SET_PDEATHSIG. The signal is sent when the *thread* that started this process ends, hence
    `launch_local` must run in the launcher's main thread.
    """
    launcher = os.environ.pop(LAUNCHER_PID, None)
    if launcher is None or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The launcher may have died before the request was in place: then nobody will send the signal any more.
    if os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGKILL)
