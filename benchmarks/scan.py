"""The scan alone, forward and backward, against the two that mamba-ssm has in plain PyTorch, in one run.

    python -m benchmarks.scan [--kernels auto|native|plain] [--repeats 7] [--threads 2]
    python -m benchmarks.scan --lengths [...]

16 heads of 64 channels, 4 groups, state 128. `ssd_minimal` is the paper's listing (it takes B and C by head and x and A
times dt, which is counted), `reference` is `ssd_chunk_scan_combined_ref`, whose gradients of dt and A are NaN: its time
only. All run with denormals flushed; a figure is the median of the repeats, in turn. Of each peer the better of the
chunks 64 and 128 counts, and in FP32 the better of torch's own matrix products and those that this project's platform
chooses.

Memory is that of a fresh process: bytes that autograd keeps from the forward to the backward pass without the inputs,
and the growth of the resident set over both passes.

With --lengths: the kernels of a whole Mamba-2 layer (convolution, scan, gate, norm) from 1,024 to 65,536 tokens.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.process import in_fresh_process, resident
from benchmarks.step import measure, torch_products, with_default_products
from nano_pretrain.kernels.mamba import mamba_split_conv1d_scan_combined
from nano_pretrain.kernels.native.library import choose_kernels
from nano_pretrain.kernels.norm import gated_rms_norm
from nano_pretrain.kernels.ssd import chunk_scan
from nano_pretrain.platform.cpu import keep_freed_memory
from nano_pretrain.platform.products import use_onednn_for_fp32

HEADS, CHANNELS, GROUPS, STATE, WIDTH = 16, 64, 4, 128, 4
INNER = HEADS * CHANNELS
CONVOLVED = INNER + 2 * GROUPS * STATE
LENGTHS = (2048, 8192)
LAYER_LENGTHS = tuple(1024 * 2**i for i in range(7))
PEER_CHUNKS = (64, 128)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""x, dt after softplus, A, B, C -> y, with the shapes of `chunk_scan`."""


@dataclass(frozen=True)
class Setting:
    """What all processes set first."""

    kernels: str
    threads: int
    repeats: int

    def prepare(self) -> str:
        """As the CPU platform does, without megatron-core; says which kernels are in use."""
        torch.set_flush_denormal(True)
        torch.set_num_threads(self.threads)
        keep_freed_memory()
        use_onednn_for_fp32()
        return choose_kernels(self.kernels)


def our_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return chunk_scan(x, dt, a, b, c)[0]


@functools.cache
def load_peers() -> tuple[Any, Any]:
    """`ssd_minimal_discrete` and `ssd_chunk_scan_combined_ref`; no kernel is interpreted, both are plain PyTorch."""
    from tests.peers.mamba_ssm import archive, install, unpack

    with tempfile.TemporaryDirectory() as directory:
        unpack(archive(), Path(directory))
        install(Path(directory))
        from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
        from mamba_ssm.ops.triton.ssd_combined import ssd_chunk_scan_combined_ref
    return ssd_minimal_discrete, ssd_chunk_scan_combined_ref


def minimal_scan(chunk: int) -> Scan:
    minimal, _ = load_peers()

    def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        b, c = (t.repeat_interleave(HEADS // GROUPS, 2) for t in (b, c))
        xdt = x * dt.unsqueeze(-1).to(x.dtype)
        y: Tensor = minimal(xdt, (dt * a).to(x.dtype), b, c, chunk)[0]
        return y

    return scan


def reference_scan(chunk: int) -> Scan:
    _, reference = load_peers()
    return lambda x, dt, a, b, c: reference(x, dt, a, b, c, chunk)


PEERS = {"ssd_minimal": minimal_scan, "reference": reference_scan}


def scan_inputs(length: int, dtype: torch.dtype) -> list[Tensor]:
    """x, dt, A, B, C with the dt and A of a Mamba-2 layer's initialisation; all are differentiated."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, length, HEADS, CHANNELS, generator=generator, dtype=dtype)
    dt = 1e-3 * 100 ** torch.rand(1, length, HEADS, generator=generator)
    a = -1 - 15 * torch.rand(HEADS, generator=generator)
    b, c = (torch.randn(1, length, GROUPS, STATE, generator=generator, dtype=dtype) for _ in range(2))
    return [t.requires_grad_() for t in (x, dt, a, b, c)]


def both_passes(scan: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], None]:
    """Forward and backward; the gradients are dropped."""
    gradient = torch.ones_like(scan(*inputs))

    def step() -> None:
        torch.autograd.grad(scan(*inputs), inputs, gradient)

    return step


def contenders(inputs: list[Tensor], precision: str) -> dict[str, tuple[str, int, Callable[[], None]]]:
    """Peer, its chunk, and both passes, by a text that tells them apart."""
    found = {"ours": ("ours", 0, both_passes(our_scan, inputs))}
    for peer, make in PEERS.items():
        for chunk in PEER_CHUNKS:
            step = both_passes(make(chunk), inputs)
            found[f"{peer}, chunk {chunk}"] = (peer, chunk, with_default_products(step))
            if precision == "fp32" and torch_products().fp32_precision != "none":
                found[f"{peer}, chunk {chunk}, our products"] = (peer, chunk, step)
    return found


def compare_speeds(length: int, precision: str, repeats: int) -> dict[str, int]:
    """Print a line for each scan; the chunk at which each was the fastest."""
    found = contenders(scan_inputs(length, DTYPES[precision]), precision)
    medians = measure({name: step for name, (_, _, step) in found.items()}, repeats)
    best: dict[str, str] = {}
    for name in sorted(medians, key=medians.__getitem__):
        best.setdefault(found[name][0], name)
    for name in best.values():
        print(f"{precision} {length:6} tokens  {length / medians[name]:10,.0f} tokens/s  {name}")
    ratio = min(medians[best[peer]] for peer in PEERS) / medians["ours"]
    print(f"{precision} {length:6} tokens  {ratio:10.2f} times the better of the two", flush=True)
    return {peer: found[name][1] for peer, name in best.items()}


def bytes_kept(forward: Callable[[], Tensor], inputs: Iterable[Tensor]) -> int:
    """Bytes of all tensors that autograd keeps for the backward pass, without the inputs."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = forward()
    for t in (*inputs, output):
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def memory(scan: Callable[..., Tensor], short: list[Tensor], inputs: list[Tensor]) -> tuple[int, int]:
    """Bytes kept for the backward pass, and growth of the peak over both passes; once a process.

    Args:
        scan: what is measured.
        short: inputs that load every library before.
        inputs: the measured ones.
    """
    both_passes(scan, short)()
    before = resident("VmRSS")
    torch.autograd.grad(scan(*inputs).sum(), inputs)
    peak = resident("VmHWM")
    return bytes_kept(lambda: scan(*inputs), inputs), peak - before


def scan_memory(setting: Setting, peer: str, chunk: int, length: int, precision: str) -> tuple[int, int]:
    """`memory` of a scan, to be called in a process of its own."""
    setting.prepare()
    scan = our_scan if peer == "ours" else PEERS[peer](chunk)
    return memory(scan, *(scan_inputs(n, DTYPES[precision]) for n in (128, length)))


def layer(zxbcdt: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, a: Tensor, d: Tensor, norm: Tensor) -> Tensor:
    """Everything of a Mamba-2 layer between its two projections."""
    y = mamba_split_conv1d_scan_combined(
        zxbcdt, weight, bias, dt_bias, a, d, 128, headdim=CHANNELS, ngroups=GROUPS, norm_before_gate=False
    )
    return gated_rms_norm(y, None, norm, 1e-5, INNER // GROUPS)


def layer_inputs(length: int, dtype: torch.dtype) -> list[Tensor]:
    """Arguments of `layer`; all are differentiated."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, length, INNER + CONVOLVED + HEADS), (CONVOLVED, WIDTH), (CONVOLVED,))
    zxbcdt, weight, bias = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    a = -1 - 15 * torch.rand(HEADS, generator=generator)
    rest = (torch.full((HEADS,), -4.0), a, torch.ones(HEADS), torch.ones(INNER, dtype=dtype))
    return [t.requires_grad_() for t in (zxbcdt, weight, bias, *rest)]


def layer_cost(setting: Setting, length: int, precision: str) -> tuple[float, int, int]:
    """Median seconds, bytes kept, growth of the peak; to be called in a process of its own."""
    setting.prepare()
    dtype = DTYPES[precision]
    inputs = layer_inputs(length, dtype)
    kept, peak = memory(layer, layer_inputs(128, dtype), inputs)
    step = both_passes(layer, inputs)
    seconds = []
    for _ in range(setting.repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), kept, peak


def print_scans(setting: Setting) -> None:
    """Speed and memory of the three scans."""
    for precision in DTYPES:
        for length in LENGTHS:
            chunks = compare_speeds(length, precision, setting.repeats)
            for peer in ("ours", "ssd_minimal"):
                kept, peak = in_fresh_process(scan_memory, setting, peer, chunks[peer], length, precision)
                sizes = f"{kept / 2**20:6,.0f} MiB kept for backward, {peak / 2**20:,.0f} MiB at the peak"
                print(f"{precision} {length:6} tokens  {sizes}  {peer}", flush=True)


def print_lengths(setting: Setting) -> None:
    """Cost of a token in a layer, by the length of the sequence."""
    for precision in DTYPES:
        for length in LAYER_LENGTHS:
            seconds, kept, peak = in_fresh_process(layer_cost, setting, length, precision)
            start = f"{precision} {length:6} tokens  {1e6 * seconds / length:6.1f} us/token"
            memory = f"{kept / length / 1024:6.1f} KiB/token kept  {peak / length / 1024:6.1f} KiB/token at the peak"
            print(f"{start}  {memory}  ({peak / 2**20:,.0f} MiB)", flush=True)


def main() -> None:
    """Print the comparison, or the costs by length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", action="store_true", help="cost of a token by the length of the sequence")
    parser.add_argument("--kernels", choices=("auto", "native", "plain"), default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    setting = Setting(options.kernels, options.threads, options.repeats)
    print(f"kernels: {setting.prepare()}; CPU, {options.threads} threads")
    if options.lengths:
        print_lengths(setting)
    else:
        print_scans(setting)


if __name__ == "__main__":
    main()
