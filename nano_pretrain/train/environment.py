"""What a run ran on: environment.json."""

from __future__ import annotations

import json
import os
import platform as python_platform
import socket
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nano_pretrain.parallel.groups import Ranks
from nano_pretrain.plan.params import count_parameters
from nano_pretrain.platform import Platform
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.train.session import Session

PACKAGES = (
    "nano-pretrain", "torch", "megatron-core", "transformer-engine", "mamba-ssm", "causal-conv1d", "triton",
    "tokenizers", "numpy", "hydra-core",
)  # fmt: skip


def environment(session: Session) -> dict[str, Any]:
    """Versions, commit, hosts, threads and layout; every rank must call it."""
    hosts: list[str] = [""] * session.ranks.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    installed = {d.metadata["Name"].lower(): d.version for d in distributions() if d.metadata["Name"]}
    return {
        "platform": session.platform.name,
        "python": python_platform.python_version(),
        "packages": {name: installed[name] for name in PACKAGES if name in installed},
        "commit": _commit(),
        "hosts": sorted(set(hosts)),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "kernels": session.platform.kernels(),
        # Some of Transformer Engine's decide how it rounds, for example NVTE_FP8_BLOCK_SCALING_FP32_SCALES.
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("NVTE_")},
        "layout": session.layout_summary(),
        "parameters": count_parameters(session.recipe.model).total,
        "command": sys.argv,
    }


def check_same_kernels(platform: Platform, ranks: Ranks) -> None:
    """Every rank must call it.

    Raises:
        UserError: the ranks do not compute with the same kernels, because some could not be compiled.
    """
    found: list[str] = [""] * ranks.world_size
    dist.all_gather_object(found, platform.kernels())
    other = next((rank for rank, kernels in enumerate(found) if not same_kernels(kernels, found[0])), None)
    if other is not None:
        raise UserError(
            f"cluster.cpu_kernels: rank 0 has {found[0]}, rank {other} has {found[other]}; mend it, or write "
            "cluster.cpu_kernels=plain"
        )


def same_kernels(one: str, other: str) -> bool:
    """Whether two answers of `Platform.kernels` name the same: the first word does, the reason after it may vary."""
    return one.split(" ", 1)[0] == other.split(" ", 1)[0]


def recorded_kernels(directory: Path) -> str | None:
    """What an earlier start of the run wrote into environment.json; None if there was none."""
    try:
        kernels = json.loads((directory / "environment.json").read_text())["kernels"]
    except (OSError, ValueError, KeyError):
        return None
    return str(kernels)


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    result = subprocess.run(
        ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
    )
    return result.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return python_platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), python_platform.machine()
    )
