"""The quantiser's two implementations are one function, for any shape, layout and number of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nano_pretrain.precision.quantize import E4M3, E5M2, Quantizer, Statistics, Tile
from tests.kernels.implementations import Results, assert_bits_do_not_depend_on_threads, using

QUANTIZERS = st.builds(Quantizer, st.sampled_from(Tile), st.sampled_from([E4M3, E5M2]), st.booleans())
SIZES = st.integers(1, 40) | st.sampled_from([127, 128, 129, 255, 300])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
EXPONENTS = st.sampled_from([0, 0, 20, -120, -135, 118])
LAYOUTS = st.sampled_from(["dense", "transposed", "rows of a wider one", "columns of a wider one", "one row for all"])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same matrix in another layout; of one row for all, the first row."""
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "rows of a wider one":
        return torch.cat([x, x], 1)[:, : x.shape[1]]
    if layout == "columns of a wider one":
        return torch.stack([x, -x], 2)[:, :, 0]
    return x[:1].expand(x.shape) if layout == "one row for all" else x


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """With magnitudes over fifty powers of two; some with infinities and NaN."""
    rows, columns, dtype = draw(SIZES), draw(SIZES), draw(DTYPES)
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    normal, exponent = torch.randn(rows, columns, generator=g), torch.randn(rows, columns, generator=g)
    x = (normal * torch.exp2(6 * exponent + draw(EXPONENTS))).clamp(-3e38, 3e38)
    if draw(st.booleans()):
        seldom = torch.rand(rows, columns, generator=g)
        x = x.masked_fill(seldom < 0.01, torch.inf).masked_fill(seldom > 0.99, torch.nan)
    return laid_out(x.to(dtype), draw(LAYOUTS))


def everything(x: Tensor, quantizer: Quantizer) -> Results:
    quantized = quantizer.quantize(x)
    operands = {str(dtype): quantizer.operand(x, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return {
        "codes": quantized.codes.float(),
        "inverse scales": quantized.inverse_scales,
        **{f"operand in {dtype}": operand.values for dtype, operand in operands.items()},
        **{f"factor in {dtype}": torch.tensor(operand.factor) for dtype, operand in operands.items()},
    }


@pytest.mark.parametrize("flush", [False, True])
@given(x=matrices(), quantizer=QUANTIZERS)
def test_native_equals_plain(flush: bool, x: Tensor, quantizer: Quantizer) -> None:
    torch.set_flush_denormal(flush)
    try:
        with using("plain"):
            expected = everything(x, quantizer)
        with using("native"):
            found = everything(x, quantizer)
    finally:
        torch.set_flush_denormal(False)  # hypothesis draws no floats where they are flushed
    for name, of_plain in expected.items():
        torch.testing.assert_close(found[name], of_plain, rtol=0, atol=0, equal_nan=True, msg=name)
        # Zeros have their sign.
        assert torch.equal(found[name].signbit() & (of_plain == 0), of_plain.signbit() & (of_plain == 0))


@given(x=matrices(), quantizer=QUANTIZERS)
def test_statistics_agree(x: Tensor, quantizer: Quantizer) -> None:
    found: list[Statistics] = []
    for name in ("plain", "native"):
        with using(name):
            found.append(quantizer.statistics(x))
    for field in ("elements", "nonzero", "flushed", "saturated", "not_finite"):
        assert getattr(found[0], field) == getattr(found[1], field)
    # Sums of up to 90,000 squares in float64, in another order.
    assert found[0].squares == pytest.approx(found[1].squares, rel=1e-11, nan_ok=True)
    assert found[0].squared_error == pytest.approx(found[1].squared_error, rel=1e-11, nan_ok=True)


@pytest.mark.parametrize("tile", Tile)
def test_bits_do_not_depend_on_threads(tile: Tile) -> None:
    x = torch.randn(700, 1500, generator=torch.Generator().manual_seed(0))
    assert_bits_do_not_depend_on_threads(lambda: _with_statistics(x, Quantizer(tile, E4M3, power_of_two=False)))


def test_denormals_are_kept_where_the_caller_keeps_them_whatever_the_pool_does() -> None:
    x = torch.full((700, 1500), 1e-40)
    quantizer = Quantizer(Tile.BLOCK, E4M3, power_of_two=True)

    def work() -> Results:
        torch.set_flush_denormal(True)
        with using("native"):
            # The pool's threads are born here, or were told so.
            flushed = quantizer.quantize(x).codes.float()
        torch.set_flush_denormal(False)
        assert not flushed.any()
        return _with_statistics(x, quantizer)

    assert_bits_do_not_depend_on_threads(work)
    assert work()["codes"].all()


def _with_statistics(x: Tensor, quantizer: Quantizer) -> Results:
    found = quantizer.statistics(x)
    return {**everything(x, quantizer), "sums": torch.tensor([found.flushed, found.squared_error, found.squares])}


@pytest.mark.usefixtures("implementation")
class TestEither:
    """What holds for both."""

    @pytest.mark.parametrize("fmt", [E4M3, E5M2])
    @pytest.mark.parametrize(("tile", "power_of_two"), [(Tile.ROW, True), (Tile.BLOCK, True), (Tile.TENSOR, False)])
    def test_bf16_operands_are_exact(self, tile: Tile, power_of_two: bool, fmt: torch.dtype) -> None:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(200, 300, generator=g) * torch.exp2(20 * torch.randn(200, 300, generator=g))
        quantizer = Quantizer(tile, fmt, power_of_two)
        found, wider = (quantizer.operand(x, dtype) for dtype in (torch.bfloat16, torch.float32))
        assert torch.equal(found.values.float(), wider.values)
        assert found.factor == wider.factor

    def test_statistics_count_what_is_lost(self) -> None:
        x = torch.zeros(1, 128)
        # With scale 1, half of the smallest number, 2^-10, becomes zero, and 464 is the middle between 448 and none.
        x[0, :6] = torch.tensor([448.0, 2**-10, 2**-9, 17.0, -(2.0**-11), 1.0])
        found = Quantizer(Tile.ROW, E4M3, power_of_two=True).statistics(x)
        assert (found.elements, found.nonzero, found.flushed, found.saturated) == (128, 6, 2, 0)
        assert found.flushed_share == 1 / 3
        assert found.squared_error == 1 + 2**-20 + 2**-22
        assert found.relative_error == (found.squared_error / x.double().square().sum().item()) ** 0.5

    def test_a_tile_with_an_infinity_saturates(self) -> None:
        x = torch.tensor([[torch.inf, 464.0, 465.0, -1e3, 1.0]])
        found = Quantizer(Tile.ROW, E4M3, power_of_two=True).statistics(x)
        assert found.saturated == 3
        assert found.saturated_share == 0.6

    @pytest.mark.parametrize("tile", Tile)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_is_not_finite_is_counted(self, tile: Tile, dtype: torch.dtype) -> None:
        x = torch.ones(130, 300)
        largest = torch.finfo(dtype).max
        x[:2, 126:131] = torch.tensor([[torch.nan, -torch.inf, 0, largest, torch.nan], [1, torch.inf, 1, 1, -largest]])
        found = Quantizer(tile, E4M3, power_of_two=True).statistics(x.to(dtype))
        assert found.not_finite == 4
        assert found.not_finite_share == 4 / x.numel()
        assert found.relative_error != found.relative_error

    @given(x=matrices().filter(lambda x: bool(x.isfinite().all())), quantizer=QUANTIZERS)
    def test_finite_values_do_not_saturate(self, x: Tensor, quantizer: Quantizer) -> None:
        found = quantizer.statistics(x)
        assert (found.saturated, found.not_finite) == (0, 0)

    def test_statistics_of_parts_can_be_added(self) -> None:
        x = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
        quantizer = Quantizer(Tile.BLOCK, E4M3, power_of_two=True)
        whole, parts = quantizer.statistics(x), [quantizer.statistics(part) for part in x.split(128)]
        assert (parts[0] + parts[1]).relative_error == pytest.approx(whole.relative_error, rel=1e-12)

    def test_zeros_lose_nothing(self) -> None:
        found = Quantizer(Tile.ROW, E4M3, power_of_two=True).statistics(torch.zeros(2, 3))
        assert (found.flushed_share, found.saturated_share, found.relative_error) == (0, 0, 0)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_other_dtypes_are_refused(self, dtype: torch.dtype) -> None:
        quantizer = Quantizer(Tile.ROW, E4M3, power_of_two=True)
        for x, result in ((torch.ones(2, 2, dtype=dtype), torch.float32), (torch.ones(2, 2), dtype)):
            with pytest.raises(TypeError, match="takes and gives FP32 or BF16"):
                quantizer.operand(x, result)

    @pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (2, 2, 2)])
    def test_what_is_no_matrix_is_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="not empty"):
            Quantizer(Tile.ROW, E4M3, power_of_two=True).operand(torch.zeros(shape), torch.bfloat16)
