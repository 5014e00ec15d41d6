"""Inputs in blocks: X^T X of every block, and GPTQ as a plain one does it block by block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from quantkit.formats import Scheme, WeightFormat
from quantkit.program.layers import LayerWeight
from quantkit.program.record import record
from quantkit.ranges.statistics import layer_hessians
from quantkit.ranges.weights import group_ranges
from quantkit.rounding.blocks import Blocks, blocks_of, hessian_limit
from quantkit.rounding.by_layers import round_by_layers
from quantkit.rounding.gptq import STRETCH
from quantkit.rounding.in_sequence import round_in_sequence
from quantkit.rounding.moments import DAMPING, PER_OCTAVE, Moments
from quantkit.rounding.request import RoundingRequest
from quantkit.rounding.weights import quantize_weight, rounding_note
from quantkit.simulation.model import SimulatedModel
from quantkit.simulation.playback import SimulatedProgram
from quantkit.stages.recording import program_of_sizes
from quantkit.targets import Target
from quantkit.transforms.prepare import prepare
from tests.rounding.test_gptq import correlated_hessian


def plain_codes(row: np.ndarray, hessian: np.ndarray, scale: np.ndarray, limits: tuple[int, int]) -> tuple:
    """GPTQ of one row in plain steps, most active input first; its codes, and e H e^T under the damped Hessian."""
    activity = np.floor(PER_OCTAVE * np.log2(np.diag(hessian)))
    order = np.argsort(-activity, kind="stable")
    damped = hessian + DAMPING * np.diag(hessian).mean() * np.eye(len(row))
    inverse = np.linalg.inv(damped[np.ix_(order, order)])
    left, codes = row[order].copy(), np.zeros(len(row))
    for j, k in enumerate(order):
        codes[j] = np.clip(np.rint(left[j] / scale[k]), *limits)
        error = left[j] - codes[j] * scale[k]
        left[j:] -= error / inverse[j, j] * inverse[j, j:]
        inverse[j:, j:] -= np.outer(inverse[j:, j], inverse[j, j:]) / inverse[j, j]
    found = np.empty_like(codes)
    found[order] = codes
    error = row - found * scale
    return found, float(error @ damped @ error)


def plain_rows(weight: Tensor, blocks: list[np.ndarray], scales: np.ndarray, limits: tuple[int, int]) -> tuple:
    """Every row of ``weight`` (O, K) with the scale factor whose losses, summed over the blocks, are least."""
    codes, chosen = [], []
    for row, base in zip(weight.numpy(), scales, strict=True):
        tried = []
        for factor in STRETCH.double().numpy():
            start, parts, loss = 0, [], 0.0
            for block in blocks:
                here = slice(start, start + len(block))
                found, added = plain_codes(row[here], block, base[here] * factor, limits)
                parts.append(found)
                start, loss = here.stop, loss + added
            tried.append((loss, factor, np.concatenate(parts)))
        best = min(tried, key=lambda one: one[0])
        codes.append(best[2])
        chosen.append(best[1])
    return np.stack(codes), np.array(chosen)


def padded(blocks: list[Tensor]) -> Tensor:
    """Blocks of (k, k), the last of them maybe smaller, as (blocks, width, width)."""
    every = torch.zeros(len(blocks), *blocks[0].shape, dtype=torch.float64)
    for room, block in zip(every, blocks, strict=True):
        room[: len(block), : len(block)] = block
    return every


@pytest.mark.parametrize("text", ["w3", "w2", "w4g6sf32"])
@pytest.mark.parametrize("widths", [(12, 12), (10, 10, 4)], ids=str)
def test_gptq_in_blocks_is_that_of_each_block_with_the_scales_of_all(widths: tuple[int, ...], text: str) -> None:
    format = Scheme.parse(text).weight
    blocks = [correlated_hessian(1, width, seed=i)[0] for i, width in enumerate(widths)]
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = quantize_weight(weight, [format], Moments(padded(blocks), count=len(blocks))).weights[format]

    squares = torch.cat([block.diagonal() for block in blocks])
    base, _ = group_ranges(weight, format, squares)
    each = base.repeat_interleave(24 // base.shape[-1], -1).numpy()
    codes, factors = plain_rows(weight, [block.numpy() for block in blocks], each, format.code_range)
    np.testing.assert_array_equal(found.codes.numpy(), codes)
    np.testing.assert_allclose(found.scale.numpy(), base.numpy() * factors[:, None], rtol=1e-6)


@pytest.mark.parametrize("rounding", ["gptq", "gptaq", "adaround", "signround"])
def test_one_block_for_each_group_is_a_layer_in_groups(rounding: str) -> None:
    """Rows of two blocks that only differ in which block is not zero."""
    format = Scheme.parse("w3").weight
    hessian, cross = correlated_hessian(2, 8, 0), correlated_hessian(2, 8, 1)
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    apart = torch.zeros(4, 2, 8, dtype=torch.float64)
    apart[:2, 0], apart[2:, 1] = weight[:2], weight[2:]
    grouped = quantize_weight(weight, [format], Moments(hessian, cross), 2, rounding).weights[format]
    moments = Moments(hessian, cross, count=2)
    blocks = quantize_weight(apart.reshape(4, 16), [format], moments, 1, rounding).weights[format]
    ours = blocks.dequantize().reshape(4, 2, 8)
    torch.testing.assert_close(torch.cat([ours[:2, 0], ours[2:, 1]]), grouped.dequantize())


def test_the_note_says_how_many_blocks_there_are() -> None:
    moments = Moments(correlated_hessian(3, 4, 0), count=3)
    found = quantize_weight(torch.randn(2, 12), [Scheme.parse("w3").weight], moments)
    assert rounding_note("fc", found, "auto") == "gptq, damping 0.01, in 3 blocks of inputs"


LAYERS: list[tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = [
    (lambda: nn.Linear(10, 3), (7, 10), 8 * 3 * 16, 4),
    (lambda: nn.Conv1d(8, 2, 5, padding=2), (3, 8, 9), 8 * 3 * 15 * 15, 15),
    (lambda: nn.Conv2d(8, 4, 3, groups=2, stride=2), (3, 8, 9, 8), 8 * 2 * 36 * 20, 18),
    (lambda: nn.Conv1d(1, 2, 16), (3, 1, 30), 8 * 3 * 36, 6),
]


@pytest.mark.parametrize(("build", "shape", "most", "width"), LAYERS, ids=["linear", "conv", "groups", "long kernel"])
def test_sums_of_blocks_are_the_diagonal_blocks_of_the_whole_sum(
    build: Callable[[], nn.Module], shape: tuple[int, ...], most: int, width: int
) -> None:
    model, x = nn.Sequential(build()).eval(), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    program, simulated = record(model, ((x,), {})), SimulatedModel(model, (), {}, {})
    whole = layer_hessians(simulated, program, ["0"], [((x,), {})])["0"]
    cut = layer_hessians(simulated, program, ["0"], [((x,), {})], most)["0"]
    assert whole.count == 1 and cut.blocks.width == width
    groups, inputs = whole.hessian.shape[:2]
    assert len(cut.hessian) == groups * cut.count and cut.hessian.numel() * 8 <= most
    for g in range(groups):
        for b, span in enumerate(cut.blocks.spans(inputs)):
            found, size = cut.hessian[g * cut.count + b], span.stop - span.start
            torch.testing.assert_close(found[:size, :size], whole.hessian[g, span, span], rtol=1e-5, atol=1e-5)
            assert not found[size:].any() and not found[:, size:].any()


@given(channels=st.integers(1, 40), kernel=st.integers(1, 9), groups=st.integers(1, 3), share=st.floats(0.001, 2))
def test_blocks_cover_all_inputs_and_fit(channels: int, kernel: int, groups: int, share: float) -> None:
    inputs = channels * kernel
    most = max(8 * groups * inputs, int(share * 8 * groups * inputs**2))
    blocks = blocks_of(LayerWeight("conv1d", (groups, channels, kernel), "w", groups=groups), most)
    assert (blocks.count - 1) * blocks.width < inputs <= blocks.count * blocks.width
    assert 8 * groups * blocks.count * blocks.width**2 <= most
    assert blocks.width % kernel == 0 or kernel * 8 * groups * inputs > most
    assert (blocks.count == 1) == (8 * groups * inputs**2 <= most)


@pytest.mark.parametrize(("bits", "inputs", "widths"), [(8, 1024, 1024), (8, 2500, 500), (4, 2500, 2500)])
def test_codes_of_eight_bits_make_up_for_errors_in_blocks(bits: int, inputs: int, widths: int) -> None:
    weight = LayerWeight("linear", (2, inputs), "w")
    assert blocks_of(weight, hessian_limit(weight, bits)).width == widths


@pytest.mark.parametrize("in_one_replay", [True, False], ids=["replay", "whole forwards"])
def test_layers_that_read_one_tensor_are_rounded_by_their_own_bits(in_one_replay: bool) -> None:
    batch = ((torch.randn(4, 1100, generator=torch.Generator().manual_seed(0)),), {})
    ready = prepare(Two().eval(), [batch], Target.load("onnxruntime-cpu"))
    program, simulated = program_of_sizes(ready, [batch]), SimulatedModel(ready.model, (), {}, {})
    assert program is not None
    request = RoundingRequest({"one": WeightFormat("8"), "other": WeightFormat("4")}, progress=False)
    if in_one_replay:
        inputs = [program.entering(ready.model, batch)]
        how = round_by_layers(SimulatedProgram(simulated, program), inputs, request)
    else:
        how = round_in_sequence(simulated, program, [batch], request)
    assert how["one"].endswith(", in 3 blocks of inputs")
    assert "blocks" not in how["other"]


class Two(nn.Module):
    """Two linear layers of as many inputs as make three blocks at 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(1100, 2), nn.Linear(1100, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x)


def test_what_was_cut_is_joined_again() -> None:
    blocks, x = Blocks(3, 4), torch.randn(2, 3, 5, 10)
    cut = blocks.cut(x)
    assert cut.shape == (2, 9, 5, 4)
    assert torch.equal(cut[:, 4], x[:, 1, :, 4:8])
    assert torch.equal(blocks.joined(cut, 10), x)
