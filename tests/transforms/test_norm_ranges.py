"""Channel-wise ranges behind a LayerNorm become one range: the same codes, the same outputs, everywhere or nowhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantkit.numbers.uniform import quantize
from quantkit.program.layers import Weights
from quantkit.ranges.channels import ChannelRanges, clipped_ranges, mse_ranges, output_error
from quantkit.targets import Target
from quantkit.transforms.norm_ranges import Norm, Rewrite, rewritable_norms, rewrite
from quantkit.transforms.prepare import Prepared, prepare

WIDTH = 12


class Block(nn.Module):
    """A norm read by three layers, one of them behind a choice of a token; ``way`` adds readers that cannot follow."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.way = way
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8, bias=way != "no bias")
        self.head = nn.Linear(WIDTH, 5)
        with torch.no_grad():
            self.norm.weight.copy_(torch.rand(WIDTH) * 4 + 0.1)
            self.norm.bias.copy_(torch.randn(WIDTH) * 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = (self.q(y) * self.k(y)).sum(-1, keepdim=True)
        first = y[:, 0, torch.arange(WIDTH).flip(0)] if self.way == "shuffled" else y[:, 0]
        out = self.head(first) + z[:, 0]
        if self.way == "residual":
            return out + y.mean((1, 2), keepdim=False)[:, None]
        return (out, y) if self.way == "returned" else out


def prepared(model: nn.Module) -> Prepared:
    return prepare(model, [((torch.randn(4, 3, WIDTH),), {})], Target.load("onnxruntime-cpu"))


def slow_codes(x: Tensor, ranges: ChannelRanges) -> Tensor:
    """Channel by channel."""
    columns = [torch.round(x[..., d] / ranges.scale[d]) + ranges.zero_point[d] for d in range(x.shape[-1])]
    return torch.stack(columns, -1).clamp(0, ranges.high)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_codes_and_outputs_are_the_same_before_and_after(bits: int) -> None:
    model = Block().double().eval()
    x = torch.randn(64, 3, WIDTH, dtype=torch.float64)
    before, wanted = model.norm(x), model(x)
    ranges, _ = mse_ranges(before.detach().flatten(0, 1), bits)
    codes = slow_codes(before, ranges)
    change = Rewrite.of(Norm("norm", "norm", ("q", "k", "head")), ranges)
    layered = [F.linear(ranges.fake_quantize(before), layer.weight, layer.bias) for layer in (model.q, model.k)]
    rewrite(Weights.of_modules(model), change)
    scale, zero = torch.tensor(change.found.scale).double(), torch.tensor(change.found.zero_point).double()
    after = quantize(model.norm(x), scale, zero, 0, change.found.high)
    assert torch.equal(after, codes)
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-10)
    dequantized = (after - zero) * scale
    for layer, before_layer in zip((model.q, model.k), layered, strict=True):
        torch.testing.assert_close(layer(dequantized), before_layer, rtol=0, atol=1e-10)
    assert 0 <= change.found.zero_point <= change.found.high
    assert len(after.unique()) <= 2**bits


def test_consumers_are_found_by_the_trace() -> None:
    norms, reasons = rewritable_norms(prepared(Block().eval()))
    assert norms == [Norm("norm", "norm", ("q", "k", "head"))]
    assert reasons == {}


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("residual", "/mean reads it, which is no quantized linear layer"),
        ("returned", "the model returns it"),
        ("no bias", "k has no bias to take up the shift"),
        ("shuffled", "/getitem reads it, which is no quantized linear layer"),
    ],
)
def test_what_cannot_be_rewritten_says_why(way: str, why: str) -> None:
    norms, reasons = rewritable_norms(prepared(Block(way).eval()))
    assert norms == []
    assert reasons == {"norm": why}


def uneven_rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(4000, WIDTH, generator=generator) * torch.logspace(-1, 1, WIDTH)
    rows = torch.where(torch.rand(rows.shape, generator=generator) < 0.02, 3 * rows, rows)  # tails
    return rows + torch.linspace(-3, 3, WIDTH), torch.randn(20, WIDTH, generator=generator)


def test_one_range_for_each_channel_beats_one_for_all() -> None:
    rows, _ = uneven_rows()
    each, share = mse_ranges(rows, 4)
    one, _ = mse_ranges(rows.reshape(-1, 1), 4)
    assert ((share > 0) & (share <= 1)).all()
    assert (each.fake_quantize(rows) - rows).square().mean() < (one.fake_quantize(rows) - rows).square().mean() / 2


def test_learned_clipping_lowers_the_error_behind_the_layers_on_other_rows() -> None:
    """Where channels grow large together, what is clipped adds up behind a layer, and the range of least squared error
    for each channel alone clips too much.
    """
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(4000, 1, generator=generator) ** 3
    rows = common + torch.randn(4000, WIDTH, generator=generator)
    weight = torch.rand(20, WIDTH, generator=generator)
    seen, unseen = rows[:3000], rows[3000:]
    start, _ = mse_ranges(seen, 4)
    learned = clipped_ranges(seen, weight, 4, torch.Generator().manual_seed(0))
    again = clipped_ranges(seen, weight, 4, torch.Generator().manual_seed(0))
    assert torch.equal(learned.scale, again.scale)

    def error(found: ChannelRanges) -> float:
        return float((found.fake_quantize(unseen) @ weight.T - unseen @ weight.T).square().mean())

    assert error(learned) < error(start)


def test_output_error_is_that_of_the_products() -> None:
    rows, weight = uneven_rows()
    error = torch.randn_like(rows) * 0.1
    wanted = ((rows + error) @ weight.T - rows @ weight.T).square().sum(1).mean()
    torch.testing.assert_close(output_error(error, weight.T @ weight), wanted, rtol=1e-4, atol=0)


def test_least_squared_error_is_found_channel_by_channel() -> None:
    rows, _ = uneven_rows()
    together, _ = mse_ranges(rows, 4)
    for channel in (0, 5, 11):
        alone, _ = mse_ranges(rows[:, channel : channel + 1], 4)
        assert alone.scale == together.scale[channel]
        assert alone.zero_point == together.zero_point[channel]


def test_constant_channels_keep_their_value() -> None:
    rows = torch.tensor([[0.0, 2.5, -7.0]]).repeat(10, 1)
    found, _ = mse_ranges(rows, 4)
    torch.testing.assert_close(found.fake_quantize(rows), rows)
