"""Codes and scales equal Transformer Engine's, bit for bit."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from torch import Tensor

from nano_pretrain.precision.quantize import E4M3, E5M2, Quantizer, Tile
from tests.precision.record_vectors import digest
from tests.precision.vectors import FILE, ORIGIN, Vector, read_vectors

pytestmark = pytest.mark.usefixtures("implementation")


@functools.cache
def vectors() -> dict[str, list[Vector]]:
    found: dict[str, list[Vector]] = {}
    for vector in read_vectors():
        found.setdefault(vector.name, []).append(vector)
    return found


def assert_equals_recorded(vector: Vector) -> None:
    found = vector.quantizer.quantize(vector.x)
    assert torch.equal(found.codes.view(torch.uint8), vector.codes), f"codes of {vector.name}: {vector.quantizer}"
    assert torch.equal(found.inverse_scales, vector.inverse_scales), f"scales of {vector.name}: {vector.quantizer}"


@pytest.mark.parametrize("name", vectors())
def test_recorded_vectors(name: str) -> None:
    for vector in vectors()[name]:
        assert_equals_recorded(vector)


def test_the_file_is_the_one_that_was_recorded() -> None:
    recorded = re.search(rf"^sha256 (\w+)  {FILE.name}$", ORIGIN.read_text(), re.MULTILINE)
    assert recorded
    assert recorded[1] == digest(FILE)


# What follows was not recorded: the Python reference treats infinities and NaN otherwise than the CUDA kernels. These
# follow from the kernels' source at the commit that vectors.txt names: `compute_scale_from_amax` in recipe_common.cuh
# (an infinite amax gives scale 1), fmaxf and __hmax in the sums of amax (NaN does not count), and conversions that
# saturate (__NV_SATFINITE of cuda_fp8.h: infinity becomes the maximum, NaN stays).
INF, NAN = float("inf"), float("nan")
NOT_FINITE: dict[str, tuple[torch.dtype, list[float], list[float], float]] = {
    "infinity, E4M3": (E4M3, [INF, -INF, 1000.0, 0.3, 2**-10], [448.0, -448.0, 448.0, 0.3125, 0.0], 1.0),
    "infinity, E5M2": (E5M2, [INF, -INF, 1e5, 0.3, 2**-17], [57344.0, -57344.0, 57344.0, 0.3125, 0.0], 1.0),
    "NaN, E4M3": (E4M3, [NAN, 3.5, -1.75, 0.0], [NAN, 448.0, -224.0, 0.0], 2**-7),
    "NaN, E5M2": (E5M2, [NAN, 3.5, -1.75, 0.0], [NAN, 57344.0, -28672.0, 0.0], 2**-14),
    "NaN and infinity": (E4M3, [NAN, INF, 1.0], [NAN, 448.0, 1.0], 1.0),
    "only NaN": (E4M3, [NAN, NAN], [NAN, NAN], 1.0),
}


def in_one_tile(values: list[float], tile: Tile) -> Tensor:
    row = torch.tensor([values]).float()
    return row.T.contiguous() if tile is Tile.COLUMN else row


@pytest.mark.parametrize("case", NOT_FINITE)
@pytest.mark.parametrize("tile", Tile)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite_as_the_cuda_kernels(case: str, tile: Tile, power_of_two: bool, dtype: torch.dtype) -> None:
    fmt, values, expected, inverse_scale = NOT_FINITE[case]
    found = Quantizer(tile, fmt, power_of_two).quantize(in_one_tile(values, tile).to(dtype))
    torch.testing.assert_close(found.codes.float(), in_one_tile(expected, tile), rtol=0, atol=0, equal_nan=True)
    assert found.inverse_scales.tolist() == [[inverse_scale]]


def test_other_tiles_do_not_see_what_is_not_finite() -> None:
    x = torch.ones(2, 256)
    x[0, 0] = INF
    found = Quantizer(Tile.ROW, E4M3, power_of_two=True).quantize(x)
    assert found.inverse_scales.tolist() == [[1.0, 2**-8], [2**-8, 2**-8]]
