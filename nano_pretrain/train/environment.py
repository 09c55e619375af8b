"""What a run ran on: environment.json."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nano_pretrain.plan.params import count_parameters
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
        "python": platform.python_version(),
        "packages": {name: installed[name] for name in PACKAGES if name in installed},
        "commit": _commit(),
        "hosts": sorted(set(hosts)),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "kernels": session.platform.kernels(),
        "layout": session.layout_summary(),
        "parameters": count_parameters(session.recipe.model).total,
        "command": sys.argv,
    }


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
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
