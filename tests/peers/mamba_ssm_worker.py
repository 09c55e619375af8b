"""mamba-ssm's kernels in Triton's interpreter, in a process of their own.

    python -m tests.peers.mamba_ssm_worker ARCHIVE CASES ANSWERS

ARCHIVE holds the sources of mamba-ssm, CASES the fields of each `Case` by its name; ANSWERS gets the results by the
same names.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from tests.kernels.compare import Kernel
from tests.peers.mamba_cases import Case, one_token
from tests.peers.mamba_ssm import archive, install, unpack

Answers = dict[str, dict[str, Tensor]]
"""Results of each case, by its name."""


def answers(cases: Mapping[str, Case], scratch: Path, timeout_seconds: float) -> Answers:
    """Results of mamba-ssm's own functions.

    Args:
        cases: by name.
        scratch: a directory for what passes between the processes.
        timeout_seconds: of the other process.

    Raises:
        UserError: mamba-ssm's sources are not to be had.
        RuntimeError: the process failed; with what it wrote to stderr.
        subprocess.TimeoutExpired: it did not end.
    """
    found, asked, answered = archive(), scratch / "cases.pt", scratch / "answers.pt"
    plain = {name: {field.name: getattr(case, field.name) for field in fields(case)} for name, case in cases.items()}
    torch.save(plain, asked)
    result = subprocess.run(
        [sys.executable, "-m", __name__, str(found), str(asked), str(answered)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"mamba-ssm in Triton's interpreter failed:\n{result.stderr}")
    loaded: Answers = torch.load(answered)
    return loaded


def _functions() -> dict[str, Kernel]:
    from mamba_ssm.ops.triton import layernorm_gated, selective_state_update, ssd_combined

    return {
        "mamba_chunk_scan_combined": ssd_combined.mamba_chunk_scan_combined,
        "mamba_split_conv1d_scan_combined": ssd_combined.mamba_split_conv1d_scan_combined,
        "rmsnorm_fn": layernorm_gated.rmsnorm_fn,
        "selective_state_update": one_token(selective_state_update.selective_state_update),
    }


def main(source: Path, asked: Path, answered: Path) -> None:
    """Answer every case."""
    with tempfile.TemporaryDirectory() as directory:
        unpack(source, Path(directory))
        install(Path(directory))
        functions = _functions()
        cases = {name: Case(**content) for name, content in torch.load(asked).items()}
        torch.save({name: case.results(functions) for name, case in cases.items()}, answered)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
