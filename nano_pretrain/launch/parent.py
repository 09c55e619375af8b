"""A rank does not outlive the launcher that started it."""

from __future__ import annotations

import os
import signal
import sys

from nano_pretrain.platform.process import end_with_parent

LAUNCHER_PID = "NANO_PRETRAIN_LAUNCHER_PID"
"""Environment variable that holds the process id of the launcher, set for its ranks only."""


def die_with_parent() -> None:
    """Let the kernel kill this process when its launcher dies, even of SIGKILL.

    A trainer calls it first of all. It does nothing where no launcher of ours started the process (a single rank, bare
    torchrun, srun) and outside Linux. The variable is removed, so that children of the rank do not take themselves for
    ranks.

    Raises:
        OSError: the kernel refused the request.

    The signal is sent when the *thread* that started this process ends, hence `launch_local` must run in the launcher's
    main thread.
    """
    launcher = os.environ.pop(LAUNCHER_PID, None)
    if launcher is None or sys.platform != "linux":
        return
    end_with_parent()
    # The launcher may have died before the request was in place: then nobody will send the signal any more.
    if os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGKILL)
