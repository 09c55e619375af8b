"""Record `vectors.npz` from Transformer Engine's Python references, which run on a CPU.

    python -m tests.precision.record_vectors CHECKOUT

CHECKOUT is a clone of https://github.com/NVIDIA/TransformerEngine. Its block quantiser and its per-tensor current
scaling (`tests/pytorch/references/`) are run as they are; of the package itself they need two names of types, which
stand in here, since it cannot be imported without CUDA.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nano_pretrain.precision.quantize import E4M3, E5M2, Quantizer, Tile
from tests.precision.vectors import FILE, ORIGIN, QUANTIZERS, stored

REFERENCES = "tests/pytorch/references"
SHAPES = ((2, 131), (131, 2))
"""A whole tile and a smaller one along either axis."""

Reference = Callable[[Tensor, Quantizer], tuple[Tensor, Tensor]]


def inputs() -> Iterator[tuple[str, Tensor]]:
    """Matrices by kind, shape and dtype."""
    for shape in SHAPES:
        for kind, values in kinds().items():
            for dtype in (torch.float32, torch.bfloat16):
                name = f"{kind}/{shape[0]}x{shape[1]}/{str(dtype).removeprefix('torch.')}"
                ordered = values if shape == SHAPES[0] else values.T
                yield name, ordered.to(dtype).contiguous()
    g = generator()
    yield "sparse/130x132/float32", torch.randn(130, 132, generator=g) * (torch.rand(130, 132, generator=g) < 0.02)


def kinds() -> dict[str, Tensor]:
    """FP32 matrices of SHAPES[0]."""
    g, shape = generator(), SHAPES[0]
    normal, exponent = torch.randn(shape, generator=g), torch.rand(shape, generator=g)
    return {
        "random": normal,
        "wide": normal * torch.exp2(60 * exponent - 30),
        # Around 448 / largest number of FP32, below which the scale would be infinite; and denormals.
        "tiny": normal * torch.exp2(-128 + 10 * exponent),
        "denormal": normal * 2.0**-140,
        "huge": (normal * 2.0**127).clamp(-3.3e38, 3.3e38),
        "constant": torch.full(shape, 0.1),
        "zero": torch.where(normal < 0, -0.0, 0.0),
        "zero row": normal * torch.tensor([[0.0], [1.0]]),
        "ties": ties(0),
        "below ties": ties(-1),
        "above ties": ties(1),
    }


def ties(towards: int) -> Tensor:
    """A row with the midpoints of neighbours in E4M3, one in E5M2; or the FP32 numbers next to them.

    The first of a row is the format's maximum, so that the scale is 1.
    """
    found = torch.zeros(SHAPES[0])
    for row, fmt in zip(found, (E4M3, E5M2), strict=True):
        numbers = torch.arange(1, 127, dtype=torch.uint8).view(fmt).float()
        numbers = numbers[numbers.isfinite()]
        middles = (numbers[:-1] + numbers[1:]) / 2
        middles = middles.nextafter(middles * (1 + towards))
        signs = torch.tensor([1.0, -1.0]).repeat(64)
        row[0], row[1 : middles.numel() + 1] = torch.finfo(fmt).max, middles * signs[: middles.numel()]
    return found


def generator() -> torch.Generator:
    """The same numbers each time."""
    return torch.Generator().manual_seed(0)


def block_reference() -> Reference:
    """`BlockwiseQuantizerReference.quantize` for tiles; columns are its transposed result."""
    module = importlib.import_module("references.blockwise_quantizer_reference")

    def quantize(x: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
        found = module.BlockwiseQuantizerReference().quantize(
            x,
            quantizer.format,
            return_transpose=True,
            pow_2_scales=quantizer.power_of_two,
            quant_tile_shape=(128, 128) if quantizer.tile is Tile.BLOCK else (1, 128),
            munge_scale_shapes=False,
        )
        if quantizer.tile is Tile.COLUMN:
            return found.data_t.T, found.scale_t.T
        return found.data, found.scale

    return quantize


def tensor_reference() -> Reference:
    """`ref_per_tensor_cs_cast`."""
    package: Any = ModuleType("transformer_engine.pytorch")
    package.DType = SimpleNamespace(kFloat8E4M3=E4M3)
    constants: Any = ModuleType("transformer_engine.pytorch.constants")
    constants.TE_DType_To_Torch = {E4M3: E4M3, E5M2: E5M2}
    sys.modules.update({module.__name__: module for module in (package, constants)})
    module = importlib.import_module("references.ref_per_tensor_cs")

    def quantize(x: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
        codes, inverse_scale, *_ = module.ref_per_tensor_cs_cast(
            x, quantizer.format, force_pow_2_scales=quantizer.power_of_two
        )
        return codes, inverse_scale

    return quantize


def record(checkout: Path) -> dict[str, np.ndarray]:
    """Name of an array in the file -> array."""
    sys.path.insert(0, str((checkout / REFERENCES).parent))
    blocks, tensors = block_reference(), tensor_reference()
    found: dict[str, np.ndarray] = {}
    for name, x in inputs():
        results = [(tensors if quantizer.tile is Tile.TENSOR else blocks)(x, quantizer) for quantizer in QUANTIZERS]
        found[f"{name}/x"] = stored(x)
        found[f"{name}/codes"] = torch.stack([codes.contiguous().view(torch.uint8) for codes, _ in results]).numpy()
        found[f"{name}/inverse_scales"] = torch.cat([inverse.flatten() for _, inverse in results]).numpy()
    return found


def origin(checkout: Path) -> str:
    """Where the vectors come from, and the hash of the file."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True)
    names = ("blockwise_quantizer_reference.py", "quantize_scale_calc.py", "ref_per_tensor_cs.py")
    hashes = [f"sha256 {digest(checkout / REFERENCES / name)}  {REFERENCES}/{name}" for name in names]
    lines = [
        "Recorded by tests/precision/record_vectors.py from https://github.com/NVIDIA/TransformerEngine",
        f"version {(checkout / 'build_tools' / 'VERSION.txt').read_text().strip()}, commit {commit.stdout.strip()},",
        f"on a CPU with torch {torch.__version__.partition('+')[0]}. Finite inputs only.",
        *hashes,
        f"sha256 {digest(FILE)}  {FILE.name}",
    ]
    return "\n".join(lines) + "\n"


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main() -> None:
    """Write the vectors and their origin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    checkout = parser.parse_args().checkout
    np.savez_compressed(FILE, **record(checkout))  # type: ignore[arg-type]
    ORIGIN.write_text(origin(checkout))
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
