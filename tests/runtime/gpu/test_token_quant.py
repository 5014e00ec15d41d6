"""FP8 codes are torch's, from every number a float32 can be rounded at, alone and after an RMSNorm."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import InvalidRequest
from quantkit.runtime.token_quant.fp8 import E4M3
from quantkit.runtime.token_quant.kernel import quantize_rows_fp8
from quantkit.runtime.triton_rounding import to_e4m3
from tests.runtime.gpu.twins import quantize_rows_fp8_reference, rms_norm


@triton.jit
def cast(x, out, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, to_e4m3(tl.load(x + place, mask=place < count, other=0.0)), mask=place < count)


def test_rounding_is_that_of_torch(device: str) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    numbers = numbers[~numbers.isnan()].sort().values
    ties = (numbers[1:] + numbers[:-1]) / 2
    random = torch.randn(20000) * torch.exp2(torch.randint(-14, 11, (20000,)).float())
    beyond = torch.tensor([448.0, 463.9, 464.0, 480.0, 1e30, -1e30, 2.0**-10, 2.0**-11, 0.0, -0.0])
    near = [ties.nextafter(torch.tensor(side)) for side in (500.0, -500.0)]
    x = torch.cat([numbers, ties, *near, random, beyond])
    out = torch.empty(len(x), dtype=E4M3, device=device)
    cast[(triton.cdiv(len(x), 4096),)](x.to(device), out, len(x), 4096)
    assert torch.equal(out.cpu().view(torch.uint8), x.clamp(-448, 448).to(E4M3).view(torch.uint8))


@pytest.mark.slow
def test_rows_are_quantized_as_in_the_reference(device: str, pytestconfig: pytest.Config) -> None:
    @settings(deadline=None, max_examples=pytestconfig.getoption("kernel_examples"))
    @given(
        rows=st.integers(0, 6),
        count=st.integers(1, 300),
        exponent=st.integers(-20, 12),
        dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        turned=st.booleans(),
        seed=st.integers(0, 10**6),
    )
    def check(rows: int, count: int, exponent: int, dtype: torch.dtype, turned: bool, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn((count, rows) if turned else (rows, count), generator=draw) * 2.0**exponent
        x = (x.t() if turned else x).to(dtype)
        codes, scale = quantize_rows_fp8(x.to(device))
        wanted, wanted_scale = quantize_rows_fp8_reference(x)
        assert torch.equal(scale.cpu(), wanted_scale)
        assert torch.equal(codes.cpu().view(torch.uint8), wanted.view(torch.uint8))

    check()


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 4), count=st.integers(2, 200), seed=st.integers(0, 10**6))
def test_rows_are_normalized_first(rows: int, count: int, seed: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator().manual_seed(seed)
    x, gain = torch.randn(rows, count, generator=draw) * 3, torch.rand(count, generator=draw) + 0.5
    codes, scale = quantize_rows_fp8(x.to(device), gain.to(device), 1e-5)
    values = codes.cpu().float() * scale.cpu().unsqueeze(1)
    wanted = rms_norm(x, gain, 1e-5)
    torch.testing.assert_close(scale.cpu(), wanted.abs().amax(1) / 448, rtol=1e-6, atol=0)
    step = 2.0**-3 * wanted.abs() / 2 + wanted.abs().amax(1, keepdim=True) / 448 * 2.0**-10
    assert ((values - wanted).abs() <= step * (1 + 1e-4)).all()


def test_leading_dimensions_and_empty_batches(device: str) -> None:
    codes, scale = quantize_rows_fp8(torch.randn(2, 3, 5).to(device))
    assert codes.shape == (2, 3, 5) and scale.shape == (2, 3)
    codes, scale = quantize_rows_fp8(torch.randn(0, 5).to(device))
    assert codes.shape == (0, 5) and scale.shape == (0,)


def test_rows_too_long_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"rows of at most 65536 values, not torch.float32 of shape \(1, 65537\)"):
        quantize_rows_fp8(torch.zeros(1, 65537))
