"""What is being learned starts as what was rounded, and gradients are those of the papers."""

from __future__ import annotations

import pytest
import torch

from quantkit.formats import Scheme
from quantkit.numbers.uniform import SiteRange
from quantkit.reconstruction.learned import LearnedRange, LearnedWeight
from quantkit.rounding.weights import quantize_weight


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("text", ["w2", "w4", "w3z", "w4g6", "w4g3z"])
def test_a_learned_weight_starts_as_the_rounded_one(text: str) -> None:
    weight, bias, unit = draw(6, 2, 3, 3), draw(6, seed=1), torch.arange(6.0)
    start = quantize_weight(weight, [Scheme.parse(text).weight]).weights[Scheme.parse(text).weight]
    learned = LearnedWeight(weight, start, bias, unit)
    torch.testing.assert_close(learned.value(), start.dequantize())
    assert torch.equal(learned.bias(), bias)
    assert torch.equal(learned.found().codes, start.codes) and torch.equal(learned.found().scale, start.scale)


def test_what_ships_is_what_was_computed_with_while_learning() -> None:
    weight, unit = draw(6, 2, 3, 3), torch.arange(6.0)
    fmt = Scheme.parse("w3g6").weight
    learned = LearnedWeight(weight, quantize_weight(weight, [fmt]).weights[fmt], torch.zeros(6), unit)
    with torch.no_grad():
        learned.code += 3 * draw(*learned.code.shape, seed=1)
        learned.log_factor += 0.2 * draw(*learned.log_factor.shape, seed=2)
        learned.bias_shift += 1
    low, high = fmt.code_range
    found = learned.found()
    torch.testing.assert_close(found.dequantize(), learned.value())
    assert low <= int(found.codes.min()) and int(found.codes.max()) <= high
    assert torch.equal(learned.bias(), unit)


def test_gradients_of_codes_pass_rounding_and_stop_at_the_ends() -> None:
    weight, fmt = draw(2, 6), Scheme.parse("w2").weight
    learned = LearnedWeight(weight, quantize_weight(weight, [fmt]).weights[fmt], None, torch.ones(2))
    with torch.no_grad():
        learned.code.copy_(torch.tensor([-3.0, -2.2, -0.6, 0.4, 1.2, 1.6]).reshape(1, 1, 6).expand(2, 1, 6))
    learned.value().sum().backward()
    scale = learned.start.scale.reshape(2, 1, 1)
    inside = torch.tensor([0.0, 1, 1, 1, 1, 0]).expand(2, 1, 6)
    torch.testing.assert_close(learned.code.grad, inside * scale)
    codes = torch.tensor([-2.0, -2, -1, 0, 1, 1]).sum()
    torch.testing.assert_close(learned.log_factor.grad, codes * learned.start.scale)


@pytest.mark.parametrize("zero_point", [0, 5])
def test_the_gradient_of_a_step_is_that_of_lsq(zero_point: int) -> None:
    """(code - x / step) inside the range, the clipping code outside (Esser et al., equation 3), times the step."""
    learned = LearnedRange(SiteRange(0.25, zero_point, 4))
    x, weight = 3 * draw(500), draw(500, seed=1)
    x.requires_grad_()
    y = learned.fake_quantize(x)
    assert torch.equal(y.detach(), learned.start.fake_quantize(x).detach())
    (weight * y).sum().backward()
    code = x.detach() / 0.25 + zero_point
    inside = (code > -0.5) & (code < 15.5)
    per_element = torch.where(inside, code.round() - code, code.round().clamp(0, 15) - zero_point)
    torch.testing.assert_close(x.grad, weight * inside)
    torch.testing.assert_close(learned.log_factor.grad, 0.25 * (weight * per_element).sum(), rtol=1e-4, atol=1e-4)


def test_a_learned_step_ships_as_it_was_learned() -> None:
    learned = LearnedRange(SiteRange(0.3, 2, 4))
    with torch.no_grad():
        learned.log_factor += 0.37
    x = 3 * draw(500)
    torch.testing.assert_close(learned.found().fake_quantize(x), learned.fake_quantize(x))
