"""A function on the CPU of a machine that has GPUs and their libraries: in a process that sees neither.

    python -m tests.gpu.on_a_cpu CALL ANSWER

Where megatron-core finds Transformer Engine it clips gradients by its CUDA kernels, also those of a CPU.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HIDDEN = ("transformer_engine", "mamba_ssm", "causal_conv1d", "apex")


def on_a_cpu(function: Callable[..., Any], *arguments: Any, timeout_seconds: float = 240) -> Any:
    """What `function(*arguments)` returns on one rank there.

    Args:
        function: function of a module, with picklable arguments and result.
        *arguments: its arguments.
        timeout_seconds: of the process.

    Raises:
        RuntimeError: the process failed; with the end of what it wrote to stderr.
        subprocess.TimeoutExpired: it did not end.
    """
    with tempfile.TemporaryDirectory() as directory:
        call, answer = Path(directory, "call"), Path(directory, "answer")
        call.write_bytes(pickle.dumps((function, arguments)))
        result = subprocess.run(
            [sys.executable, "-m", __name__, str(call), str(answer)],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
        if result.returncode:
            raise RuntimeError(f"{function.__name__} failed on the CPU:\n{result.stderr[-4000:]}")
        return pickle.loads(answer.read_bytes())


def main(call: Path, answer: Path) -> None:
    """Run the call."""
    for package in HIDDEN:
        sys.modules[package] = None  # type: ignore[assignment]
    function, arguments = pickle.loads(call.read_bytes())
    answer.write_bytes(pickle.dumps(function(*arguments)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
