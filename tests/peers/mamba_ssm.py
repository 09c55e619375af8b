"""mamba-ssm's own kernels on a CPU: its pinned sources, and how a process of its own imports them.

Triton's interpreter runs the kernels with NumPy, a program at a time. In it BF16 is silently wrong (arithmetic on the
bits), so that only FP32 proves something.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nano_pretrain.prepare.corpus_file import Package, load_package_file
from nano_pretrain.prepare.fetch import file_sha256
from nano_pretrain.recipe.errors import UserError
from tests.kernels.references import convolution_silu

PIN = Path(__file__).with_suffix(".yaml")
CACHE = Path(__file__).parents[2] / "data/packages"
WANTED = ("mamba_ssm/ops/triton/", "mamba_ssm/modules/ssd_minimal.py", "mamba_ssm/utils/")

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    # mamba-ssm's own way to one configuration of each kernel, where the autotuner would time them all on a GPU.
    "MAMBA_DETERMINISTIC": "1",
    # Which one: larger blocks are faster in the interpreter.
    "TRITON_AUTOTUNE_BLOCK_SIZE_N": "64",
}

BUILD_BACKEND = """
import sys
from pathlib import Path

__legacy__ = sys.modules[__name__]


def prepare_metadata_for_build_wheel(directory, settings=None):
    folder = Path(directory, "{stem}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return folder.name
"""
"""Stands in for setuptools: pip asks a source archive for its metadata, and this one's setup.py needs CUDA."""


def archive(cache: Path = CACHE) -> Path:
    """mamba-ssm's pinned source archive; see `source_archive`."""
    return source_archive(load_package_file(PIN), cache)


def source_archive(package: Package, cache: Path = CACHE) -> Path:
    """A pinned source archive, whole and checked; fetched through pip where the cache lacks it.

    Raises:
        UserError: it is neither in the cache nor to be had; one line.
    """
    target = cache / package.file
    if not target.is_file() or file_sha256(target) != package.sha256:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as scratch:
            _download(package, Path(scratch))
            Path(scratch, package.file).replace(target)
    return target


def _download(package: Package, scratch: Path) -> None:
    """Through pip as the user has configured it; pip compares the hash, and nothing in the archive is run."""
    backend = scratch / "backend/setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    stem = package.file.removesuffix(".tar.gz")
    (backend / "build_meta.py").write_text(BUILD_BACKEND.format(stem=stem, name=package.name, version=package.version))
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "--dest", str(scratch), "-r", str(requirements)]
    environment = {"PIP_RETRIES": "2"} | dict(os.environ) | {"PYTHONPATH": str(backend.parent)}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise UserError(
            f"{package.file} is not in {scratch.parent} and cannot be fetched ({reason}); run once with network "
            "access to a package registry, or put it there"
        )


def unpack(source: Path, directory: Path) -> None:
    """Write the wanted Python files of the archive below `directory`, as `mamba_ssm/...`."""
    with tarfile.open(source) as tar:
        for member in tar.getmembers():
            member.name = member.name.partition("/")[2]
            if member.name.startswith(WANTED) and member.name.endswith(".py"):
                tar.extract(member, directory, filter="data")


def install(directory: Path) -> None:
    """Make the unpacked `mamba_ssm.ops.triton` and `mamba_ssm.modules.ssd_minimal` importable, interpreted.

    Changes this process for good: call it in one that exists for nothing else.

    Raises:
        RuntimeError: triton was imported before, compiled.
    """
    if "triton" in sys.modules:
        raise RuntimeError("triton is imported already: it reads TRITON_INTERPRET when kernels are defined")
    os.environ |= ENVIRONMENT
    _replace_what_needs_cuda(directory)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Deterministic mode")
        import mamba_ssm.ops.triton.ssd_combined  # noqa: F401 - defines the kernels
    # The order of the sums stays that of training.
    sys.modules["mamba_ssm.utils.determinism"].set_deterministic_mode(False)
    # Checks of integer overflow take half of the time, and compiled kernels have none.
    builder = sys.modules["triton.runtime.interpreter"].interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _replace_what_needs_cuda(directory: Path) -> None:
    # The launchers select the tensor's CUDA device, and size some grids by its processors.
    torch.cuda.device = contextlib.nullcontext  # type: ignore[assignment, misc]
    torch.cuda.get_device_properties = _one_processor  # type: ignore[assignment]
    # The package's __init__ imports a CUDA extension and every model.
    sys.modules["mamba_ssm"] = _module("mamba_ssm", __path__=[str(directory / "mamba_ssm")])
    # The convolution is CUDA C++, which nothing interprets.
    sys.modules["causal_conv1d"] = _module("causal_conv1d", causal_conv1d_fn=None)
    sys.modules["causal_conv1d.cpp_functions"] = _module(
        "causal_conv1d.cpp_functions",
        causal_conv1d_fwd_function=causal_conv1d_fwd_function,
        causal_conv1d_bwd_function=causal_conv1d_bwd_function,
        causal_conv1d_update_function=None,
    )


def _one_processor(_: torch.device) -> SimpleNamespace:
    return SimpleNamespace(multi_processor_count=1)


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


def causal_conv1d_fwd_function(
    x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None, initial: None, final: None, silu: bool
) -> Tensor:
    """causal-conv1d's forward pass [batch, channels, length], by torch's convolution."""
    assert silu
    assert initial is final is None
    return convolution_silu(x.mT, weight, bias, seq_idx).mT


def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial: None,
    dfinal: None,
    dx: Tensor,
    _: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """causal-conv1d's backward pass, by autograd; `dx` is filled."""
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    with torch.enable_grad():
        out = causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial, dfinal, silu)
    gradient, dweight, dbias = torch.autograd.grad(out, [x, weight, bias], dout)
    return dx.copy_(gradient), dweight, dbias, None
