"""Recorded results of Transformer Engine's quantisers: what is in `vectors.npz` and how it is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nano_pretrain.precision.quantize import E4M3, E5M2, Quantizer, Tile

FILE = Path(__file__).with_name("vectors.npz")
ORIGIN = FILE.with_suffix(".txt")

QUANTIZERS = [Quantizer(tile, fmt, pow2) for tile in Tile for fmt in (E4M3, E5M2) for pow2 in (False, True)]
"""Order of the results of an input."""


@dataclass(frozen=True)
class Vector:
    """A matrix and what a quantiser makes of it: codes as uint8, an inverse scale for each tile."""

    name: str
    quantizer: Quantizer
    x: Tensor
    codes: Tensor
    inverse_scales: Tensor


def tiles(x: Tensor, tile: Tile) -> tuple[int, int]:
    """How many tiles x has, down and across."""
    height, width = {Tile.ROW: (1, 128), Tile.COLUMN: (128, 1), Tile.BLOCK: (128, 128)}.get(tile, tuple(x.shape))
    return math.ceil(x.shape[0] / height), math.ceil(x.shape[1] / width)


def stored(x: Tensor) -> np.ndarray:
    """BF16 as the uint16 of its bits, which numpy has no type for."""
    found: np.ndarray = x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()
    return found


def read_vectors() -> Iterator[Vector]:
    """All of them."""
    with np.load(FILE) as file:
        for name in sorted(key.removesuffix("/x") for key in file if key.endswith("/x")):
            bits = torch.from_numpy(file[f"{name}/x"])
            x = bits.view(torch.bfloat16) if bits.dtype == torch.uint16 else bits
            inverse_scales = torch.from_numpy(file[f"{name}/inverse_scales"])
            shapes = [tiles(x, quantizer.tile) for quantizer in QUANTIZERS]
            of_each = inverse_scales.split([math.prod(shape) for shape in shapes])
            results = zip(QUANTIZERS, torch.from_numpy(file[f"{name}/codes"]), of_each, shapes, strict=True)
            for quantizer, codes, inverse, shape in results:
                yield Vector(name, quantizer, x, codes, inverse.view(shape))
