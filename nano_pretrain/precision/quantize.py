"""Quantisation of matrices to 8-bit floats (Micikevicius et al. 2022), scaled by tile or by tensor.

Codes and scales are those of Transformer Engine: tiles as in its block scaling (DeepSeek-V3's recipe), one scale a
tensor as in its current scaling. A CPU has no FP8 products: what a product takes are the values that the codes stand
for.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_pretrain.kernels.native.layout import rows
from nano_pretrain.kernels.native.library import Library, active

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2

SIDE = 128

_SIGN_AND_EXPONENT = -(1 << 23)
"""The bits of an FP32 number that are not its mantissa."""

_BEYOND = {E4M3: 464.0, E5M2: 61440.0}
"""Half a step above the maximum: what is larger would be rounded to a number that the format does not have."""


class Tile(Enum):
    """What shares a scale; the values are the codes of kernels/native/quantize.cpp."""

    ROW = 0
    """1 x 128."""
    COLUMN = 1
    """128 x 1."""
    BLOCK = 2
    """128 x 128."""
    TENSOR = 3

    @property
    def transposed(self) -> Tile:
        """The tile of the transposed matrix."""
        return {Tile.ROW: Tile.COLUMN, Tile.COLUMN: Tile.ROW}.get(self, self)

    def shape(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of a tile of x; the last ones of x are smaller where its size is no multiple."""
        if self is Tile.TENSOR:
            return x.shape[0], x.shape[1]
        return 1 if self is Tile.ROW else SIDE, 1 if self is Tile.COLUMN else SIDE


@dataclass(frozen=True)
class Quantized:
    """Codes [rows, columns] in an 8-bit dtype, and inverse scales in FP32: a row and a column for each of the tiles."""

    codes: Tensor
    inverse_scales: Tensor


@dataclass(frozen=True)
class Operand:
    """What a product takes: the quantised matrix is `values * factor`."""

    values: Tensor
    factor: float

    def transposed(self) -> Operand:
        """The transposed matrix."""
        return Operand(self.values.T, self.factor)


@dataclass(frozen=True)
class Statistics:
    """What quantisation lost, as sums; those of several matrices, micro-batches and ranks can be added.

    Args:
        elements: of the matrix.
        nonzero: elements that are not zero.
        flushed: of these, the ones that became zero.
        saturated: elements that are, times their scale, more than half a step beyond the format's maximum. A scale made
            of the tile's largest magnitude leaves none; there are some where that is infinite.
        not_finite: elements that are infinite or NaN.
        squared_error: sum of the squares of the differences.
        squares: sum of the squares of the elements.
    """

    elements: float
    nonzero: float
    flushed: float
    saturated: float
    not_finite: float
    squared_error: float
    squares: float

    def __add__(self, other: Statistics) -> Statistics:
        """Both together."""
        return Statistics(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def flushed_share(self) -> float:
        """Of the elements that are not zero."""
        return self.flushed / self.nonzero if self.nonzero else 0.0

    @property
    def saturated_share(self) -> float:
        """Of all elements."""
        return self.saturated / self.elements

    @property
    def not_finite_share(self) -> float:
        """Of all elements."""
        return self.not_finite / self.elements

    @property
    def relative_error(self) -> float:
        """Norm of the difference over the norm of the matrix; NaN where an element is not finite."""
        return float((self.squared_error / self.squares) ** 0.5) if self.squares else 0.0


@dataclass(frozen=True)
class Quantizer:
    """How matrices are quantised: multiplied by their tiles' scales and rounded to nearest, ties to even.

    A tile's scale is the format's maximum divided by the tile's largest magnitude; 1 where that is zero or infinite,
    and the largest number of the matrix' dtype (per tensor, of FP32) where the quotient is infinite. What is beyond the
    maximum becomes the maximum. NaN stays NaN and has no influence on the scale.

    All methods take a matrix of FP32 or BF16 that is not empty, and raise TypeError or ValueError for another; operands
    are of these dtypes too.
    Denormals count as zero where the process flushes them, as a trainer on a CPU does.

    Args:
        tile: what shares a scale.
        format: E4M3 or E5M2.
        power_of_two: whether scales are rounded down to a power of two.
    """

    tile: Tile
    format: torch.dtype
    power_of_two: bool

    def quantize(self, x: Tensor) -> Quantized:
        """Codes and inverse scales."""
        # All numbers of either format are BF16 numbers.
        values, inverse_scales = _quantize(x, self, torch.bfloat16, scale_back=False)
        return Quantized(values.to(self.format), inverse_scales)

    def operand(self, x: Tensor, dtype: torch.dtype) -> Operand:
        """What a product takes for x.

        Args:
            x: [rows, columns].
            dtype: of the values, FP32 or BF16. Both are exact per tensor, where the values are the codes', and with
                scales that are powers of two, down to BF16's smallest number (largest magnitudes above 1e-32 are safe).
                With other scales FP32 rounds once, as dequantisation does, and BF16 is not exact.
        """
        per_tensor = self.tile is Tile.TENSOR
        values, inverse_scales = _quantize(x, self, dtype, scale_back=not per_tensor)
        return Operand(values, float(inverse_scales) if per_tensor else 1.0)

    def statistics(self, x: Tensor) -> Statistics:
        """What quantisation loses; takes up to four times as long as the quantisation."""
        library = _library(x)
        return _plain_statistics(x, self) if library is None else _native_statistics(library, x, self)


def _library(x: Tensor, result: torch.dtype = torch.float32) -> Library | None:
    for dtype in (x.dtype, result):
        if dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"FP8 quantisation takes and gives FP32 or BF16, not {dtype}")
    if x.dim() != 2 or not x.numel():
        raise ValueError(f"FP8 quantisation takes a matrix that is not empty, not {tuple(x.shape)}")
    return active(x)


@torch.no_grad()
def _quantize(x: Tensor, quantizer: Quantizer, dtype: torch.dtype, scale_back: bool) -> tuple[Tensor, Tensor]:
    """The codes' numbers, times the inverse scales with `scale_back`, in `dtype`; the inverse scales."""
    library = _library(x, dtype)
    if library is None:
        return _plain(x, quantizer, dtype, scale_back)
    return _native(library, x, quantizer, dtype, scale_back)


def _plain(x: Tensor, quantizer: Quantizer, dtype: torch.dtype, scale_back: bool) -> tuple[Tensor, Tensor]:
    tiles = _tiles(x, quantizer)
    scale = _scale(tiles, quantizer, x.dtype)
    values, inverse = _rounded(tiles * scale, quantizer), scale.reciprocal()
    whole = (values * inverse if scale_back else values).flatten(2).flatten(0, 1)
    return whole[: x.shape[0], : x.shape[1]].to(dtype), inverse[:, 0, :, 0]


def _tiles(x: Tensor, quantizer: Quantizer) -> Tensor:
    """FP32 tiles [down, rows of a tile, across, columns of a tile], zeros beyond the edges of x."""
    height, width = quantizer.tile.shape(x)
    padded = F.pad(x.float(), (0, -x.shape[1] % width, 0, -x.shape[0] % height))
    tiles: Tensor = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    return tiles


def _scale(tiles: Tensor, quantizer: Quantizer, dtype: torch.dtype) -> Tensor:
    """Scale of each tile; `dtype` is that of x."""
    magnitude = tiles.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax((1, 3), keepdim=True)
    # Not `maximum / magnitude`: torch multiplies a number by the reciprocal, which is off by a bit now and then.
    scale = torch.full_like(magnitude, torch.finfo(quantizer.format).max).div(magnitude)
    finite = torch.finfo(torch.float32 if quantizer.tile is Tile.TENSOR else dtype).max
    scale = torch.where(scale.isinf(), finite, scale)
    if quantizer.power_of_two:
        scale = (scale.view(torch.int32) & _SIGN_AND_EXPONENT).view(torch.float32)
    return torch.where((magnitude == 0) | magnitude.isinf(), 1.0, scale)


def _rounded(scaled: Tensor, quantizer: Quantizer) -> Tensor:
    maximum = torch.finfo(quantizer.format).max
    return scaled.clamp(-maximum, maximum).to(quantizer.format).float()


def _native(
    library: Library, x: Tensor, quantizer: Quantizer, dtype: torch.dtype, scale_back: bool
) -> tuple[Tensor, Tensor]:
    if _is_transposed(x):
        values, inverse = _native(library, x.T, _turned(quantizer), dtype, scale_back)
        return values.T, inverse.T
    height, width = quantizer.tile.shape(x)
    values = torch.empty(x.shape, dtype=dtype)
    inverse = torch.empty(-(-x.shape[0] // height), -(-x.shape[1] // width))
    inputs = (x.dtype, dtype, _code(quantizer), *rows(x, x))
    flags = (quantizer.tile.value, quantizer.power_of_two, scale_back)
    library.call("fp8_quantize", *inputs, values, inverse, *x.shape, *flags)
    return values, inverse


@torch.no_grad()
def _plain_statistics(x: Tensor, quantizer: Quantizer) -> Statistics:
    tiles = _tiles(x, quantizer)
    scale = _scale(tiles, quantizer, x.dtype)
    scaled = tiles * scale
    values = _rounded(scaled, quantizer).double()
    sums = (
        tiles.count_nonzero(),
        ((tiles != 0) & (values == 0)).sum(),
        (scaled.abs() > _BEYOND[quantizer.format]).sum(),
        (~tiles.isfinite()).sum(),
        (tiles - values * scale.reciprocal()).square().sum(),
        tiles.double().square().sum(),
    )
    return Statistics(x.numel(), *map(float, sums))


def _native_statistics(library: Library, x: Tensor, quantizer: Quantizer) -> Statistics:
    if _is_transposed(x):
        return _native_statistics(library, x.T, _turned(quantizer))
    sums = torch.empty(6, dtype=torch.float64)
    flags = (quantizer.tile.value, quantizer.power_of_two)
    library.call("fp8_statistics", x.dtype, _code(quantizer), *rows(x, x), sums, *x.shape, *flags)
    return Statistics(x.numel(), *sums.tolist())


def _is_transposed(x: Tensor) -> bool:
    return x.stride(1) != 1 and x.stride(0) == 1


def _turned(quantizer: Quantizer) -> Quantizer:
    return replace(quantizer, tile=quantizer.tile.transposed)


def _code(quantizer: Quantizer) -> int:
    return (E4M3, E5M2).index(quantizer.format)
