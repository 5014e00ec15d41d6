"""Every integer linear kernel equals the reference bit for bit, on any layout it takes, and refuses the others."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import InvalidRequest
from quantkit.runtime.int_linear import compiled
from quantkit.runtime.int_linear.panels import Panels, from_panels, misfit, to_panels
from quantkit.runtime.int_linear.reference import Rows, quantize_rows
from quantkit.runtime.int_linear.through_torch import float_mm, int_linear_torch, int_mm
from tests.runtime.twins import int_linear_reference

needs_kernels = pytest.mark.skipif(
    compiled.instruction_set() is None, reason="the compiled kernels are not installed, or the CPU has no AVX2"
)


def codes_of(shape: tuple[int, ...], bits: int, draw: torch.Generator) -> Tensor:
    """Signed codes that use their whole range."""
    return torch.randint(-(1 << bits - 1), 1 << bits - 1, shape, generator=draw, dtype=torch.int8)


@st.composite
def problems(draw: st.DrawFn, bits: int | None = None) -> dict[str, object]:
    """Operands that fill panels: rows, channels, groups of inputs, with and without offset and bias."""
    bits = bits or draw(st.sampled_from([4, 8]))
    group = draw(st.sampled_from([8, 16, 24, 32, 64, 128])) if draw(st.booleans()) else 0
    groups = draw(st.integers(1, 4)) if group else 1
    inputs = groups * (group or 8 * draw(st.integers(1, 80)))
    rows, channels = draw(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 9, 31, 121])), 16 * draw(st.integers(1, 4))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    extreme = draw(st.booleans())
    activations = codes_of((rows, inputs), 8, random)
    codes = codes_of((channels, inputs), bits, random)
    if extreme:
        activations, codes = torch.full_like(activations, -128), torch.full_like(codes, codes.min())
    offset = torch.randint(-(10**6), 10**6, (channels,), generator=random, dtype=torch.int32)
    return {
        "bits": bits,
        "rows": Rows(activations, torch.rand(rows, generator=random)),
        "codes": codes,
        "scale": torch.randn(channels, groups, generator=random),
        "offset": offset if groups == 1 and draw(st.booleans()) else None,
        "bias": torch.randn(channels, generator=random) if draw(st.booleans()) else None,
    }


def assert_panels_equal_reference(problem: dict, **options: object) -> None:
    bits, codes, scale = problem.pop("bits"), problem.pop("codes"), problem.pop("scale")
    given = problem.pop("rows")
    found = compiled.int_linear_compiled(given, to_panels(codes, scale, bits), **problem, **options)
    assert torch.equal(found, int_linear_reference(given, codes, scale, **problem))


@needs_kernels
@settings(deadline=None, max_examples=300)
@given(problem=problems())
def test_compiled_kernels_equal_the_reference(problem: dict) -> None:
    assert_panels_equal_reference(problem)


@pytest.mark.skipif(
    compiled.instruction_set() != compiled.VNNI, reason="the CPU has no AVX512-VNNI beside AVX2 to compare with"
)
@settings(deadline=None, max_examples=300)
@given(problem=problems())
def test_kernels_of_the_lesser_instruction_set_equal_the_reference(problem: dict) -> None:
    assert_panels_equal_reference(problem, through=compiled.AVX2)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 130])
def test_threads_do_not_change_a_bit(threads: int, rows: int) -> None:
    draw = torch.Generator().manual_seed(0)
    codes, scale = codes_of((80, 512), 4, draw), torch.rand(80, 4, generator=draw)
    given = Rows(codes_of((rows, 512), 8, draw), torch.rand(rows, generator=draw))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = compiled.int_linear_compiled(given, to_panels(codes, scale, 4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, int_linear_reference(given, codes, scale))


@settings(deadline=None, max_examples=300)
@given(problem=problems(), zeros=st.booleans())
def test_torch_operators_equal_the_reference(problem: dict, zeros: bool) -> None:
    bits = problem.pop("bits")
    if zeros:
        random = torch.Generator().manual_seed(1)
        problem["zero_point"] = codes_of(tuple(problem["scale"].shape), bits, random)
    assert torch.equal(int_linear_torch(**problem), int_linear_reference(**problem))


@pytest.mark.parametrize("multiply", [int_mm, float_mm])
def test_products_are_integers_where_floats_would_round(multiply) -> None:
    activations = torch.full((17, 4096), -128, dtype=torch.int8)
    codes = torch.full((16, 4096), -128, dtype=torch.int8)
    codes[:, 0] = -127  # 2^26 - 128 needs more than 24 bits
    assert multiply(activations, codes).unique().tolist() == [2**26 - 128]


@settings(deadline=None, max_examples=60)
@given(problem=problems(), channels=st.integers(1, 40), inputs=st.integers(1, 70))
def test_panels_come_back(problem: dict, channels: int, inputs: int) -> None:
    codes, scale, bits = problem["codes"], problem["scale"], problem["bits"]
    panels = to_panels(codes, scale, bits)
    assert panels.nbytes == codes.numel() * bits // 8 + 4 * scale.numel()
    assert all(torch.equal(*pair) for pair in zip(from_panels(panels), (codes, scale), strict=True))
    draw = torch.Generator().manual_seed(inputs)
    ragged, scales = codes_of((channels, inputs), bits, draw), torch.rand(channels, 1, generator=draw)
    padded = to_panels(ragged, scales, bits, pad=True)
    assert padded.padded_channels % 16 == 0 and padded.padded_inputs - inputs < 8
    assert all(torch.equal(*pair) for pair in zip(from_panels(padded), (ragged, scales), strict=True))


@needs_kernels
@settings(deadline=None, max_examples=300)
@given(
    rows=st.integers(1, 20), inputs=st.integers(1, 300), exponent=st.integers(-149, 126), seed=st.integers(0, 10**6)
)
def test_rows_are_quantized_as_in_the_reference(rows: int, inputs: int, exponent: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=draw) * 2.0**exponent
    x[0] = 0
    x[-1, :: 1 + seed % 7] *= 0
    codes, scale = compiled.quantize_rows_compiled(x)
    wanted_codes, wanted_scale = quantize_rows(x)
    assert torch.equal(scale, wanted_scale) and torch.equal(codes, wanted_codes)


def test_halves_are_rounded_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0]])
    assert quantize_rows(x)[0].tolist() == [[127, 0, 2, -2, -127]]
    if compiled.instruction_set() is not None:
        assert compiled.quantize_rows_compiled(x)[0].tolist() == [[127, 0, 2, -2, -127]]


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((15, 64, 1, 4), "15 output channels are no multiple of 16"),
        ((16, 60, 1, 4), "groups of 60 inputs are no multiple of 8"),
        ((16, 64, 3, 4), "groups of 21.3333 inputs"),
        ((16, 62, 1, 8), "groups of 62 inputs are no multiple of 4"),
        ((16, 64, 1, 3), "3-bit codes have no panels"),
    ],
)
def test_what_does_not_fill_panels_is_refused(sizes: tuple[int, int, int, int], reason: str) -> None:
    channels, inputs, groups, bits = sizes
    assert reason in str(misfit(channels, inputs, groups, bits))
    if bits != 3:
        with pytest.raises(InvalidRequest, match="does not fill panels"):
            to_panels(torch.zeros(channels, inputs, dtype=torch.int8), torch.ones(channels, groups), bits)


@needs_kernels
def test_other_operands_are_refused() -> None:
    panels = to_panels(torch.zeros(16, 64, dtype=torch.int8), torch.ones(16, 2), 8)
    with pytest.raises(InvalidRequest, match=r"takes int8 rows of that length, not torch.int8 of shape \(3, 60\)"):
        compiled.int_linear_compiled(Rows(torch.zeros(3, 60, dtype=torch.int8), torch.ones(3)), panels)
    with pytest.raises(InvalidRequest, match="needs weights with one scale per channel"):
        offset = torch.zeros(16, dtype=torch.int32)
        compiled.int_linear_compiled(Rows(torch.zeros(3, 64, dtype=torch.int8), torch.ones(3)), panels, offset)
    wide = Panels(torch.zeros(1, 17000, 16, 4, dtype=torch.uint8), torch.ones(1, 1, 16), 8, 16, 68000)
    with pytest.raises(InvalidRequest, match="68000 inputs can overflow 32-bit sums"):
        compiled.int_linear_compiled(Rows(torch.zeros(1, 68000, dtype=torch.int8), torch.ones(1)), wide)


@needs_kernels
def test_activations_may_lie_in_any_order() -> None:
    draw = torch.Generator().manual_seed(0)
    codes, scale = codes_of((16, 32), 8, draw), torch.rand(16, 1, generator=draw)
    given = Rows(codes_of((32, 9), 8, draw).t(), torch.ones(9))
    found = compiled.int_linear_compiled(given, to_panels(codes, scale, 8))
    assert torch.equal(found, int_linear_reference(given, codes, scale))


EMULATION = Path("/usr/include/simde/x86/avx512.h")


@pytest.mark.slow
@pytest.mark.skipif(
    not EMULATION.is_file() or shutil.which("g++") is None,
    reason="needs g++ and SIMDe (libsimde-dev), which emulates AVX512-VNNI",
)
def test_vnni_kernels_emulated_on_any_cpu(tmp_path: Path) -> None:
    sources = sorted(Path(compiled.__file__).parent.glob("*.cpp"))
    flags = ["-O1", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared", "-DQUANTKIT_EMULATE"]
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(tmp_path / "emulated.so")], check=True)
    emulated = compiled.open_library(tmp_path / "emulated.so")

    @settings(deadline=None, max_examples=60)
    @given(problem=problems())
    def check(problem: dict) -> None:
        assert_panels_equal_reference(problem, through=compiled.VNNI, built=emulated)

    check()
