"""YAQA beside GPTQ of the whole weight under the Kronecker product of both factors."""

from __future__ import annotations

import pytest
import torch

from quantkit.formats import Scheme
from quantkit.numbers.uniform import dequantize, quantize
from quantkit.ranges.weights import per_input, whole_ranges
from quantkit.rounding.gptq import STRETCH, gptq_under
from quantkit.rounding.moments import Moments, damped
from quantkit.rounding.weights import quantize_weight
from quantkit.rounding.yaqa import INPUT_DAMPING, OUTPUT_DAMPING


def weight_format(text):
    return Scheme.parse(text).weight


def gram(rows, size, seed):
    """Second moments of correlated values, the most active first."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    scale = torch.linspace(3.0, 0.5, size, dtype=torch.float64)
    x = torch.randn(rows, size, generator=generator, dtype=torch.float64) @ mixing + 0.3
    x = x * scale / x.square().mean(0).sqrt()
    return (x.T @ x)[None]


@pytest.fixture
def layer():
    weight = torch.randn(35, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return weight, Moments(gram(200, 40, 1), output=gram(200, 35, 2))


def rounded_in_one_row(weight, format, moments):
    """GPTQ of all entries one by one, under the whole Hessian: the inverse factored anew."""
    inputs = damped(moments.hessian, INPUT_DAMPING)[0]
    outputs = damped(moments.output, OUTPUT_DAMPING)[0]
    upper = torch.linalg.cholesky(torch.linalg.inv(torch.kron(outputs, inputs)), upper=True)
    scale, zero = (per_input(x, weight.shape[1]).flatten() for x in whole_ranges(weight, format))
    left, values = weight.flatten().clone(), torch.empty(weight.numel(), dtype=weight.dtype)
    for j in range(len(left)):
        values[j] = dequantize(quantize(left[j], scale[j], zero[j], *format.code_range), scale[j], zero[j])
        left[j:] -= (left[j] - values[j]).clone() / upper[j, j] * upper[j, j:]
    return values.reshape(weight.shape)


@pytest.mark.parametrize("text", ["w2g8z", "w3g20z"])
def test_codes_are_those_of_gptq_under_the_kronecker_product(layer, text):
    weight, moments = layer
    found = quantize_weight(weight, [weight_format(text)], moments, rounding="yaqa")
    twin = rounded_in_one_row(weight, weight_format(text), moments)
    assert torch.allclose(found.weights[weight_format(text)].dequantize().double(), twin, atol=1e-5)


def loss(error, moments):
    return float(torch.einsum("oi,op,pj,ij->", error, moments.output[0], error, moments.hessian[0]))


def test_the_loss_under_both_factors_is_below_that_of_gptq(layer):
    weight, moments = layer
    format = weight_format("w3g8z")
    losses = {
        name: loss(
            weight - quantize_weight(weight, [format], moments, rounding=name).weights[format].dequantize(), moments
        )
        for name in ("yaqa", "gptq", "nearest")
    }
    assert losses["yaqa"] < 0.8 * losses["gptq"] < 0.8 * losses["nearest"]


def test_outputs_that_do_not_act_together_leave_gptq(layer):
    weight, moments = layer
    format = weight_format("w3g8z")
    alone = Moments(moments.hessian, output=torch.eye(35, dtype=torch.float64)[None])
    found = quantize_weight(weight, [format], alone, rounding="yaqa").weights[format]
    inputs = Moments(
        damped(moments.hessian, INPUT_DAMPING - 0.01)
    )  # GPTQ adds its own hundredth, nearly of the same mean
    codes, *_ = gptq_under(weight[None], format, inputs, whole_ranges(weight[None], format), STRETCH.new_ones(1))
    assert (found.codes == codes[0].to(torch.int8)).float().mean() > 0.98


def test_without_a_factor_of_the_outputs_it_is_gptq(layer):
    weight, moments = layer
    format, inputs = weight_format("w3g8z"), Moments(moments.hessian)
    one, other = (
        quantize_weight(weight, [format], inputs, rounding=name).weights[format] for name in ("yaqa", "gptq")
    )
    assert torch.equal(one.codes, other.codes)


def test_rows_of_a_table_are_rounded_under_the_moments_of_their_gradients(layer):
    weight, moments = layer
    format, table = weight_format("w3g8z"), Moments(moments.hessian, table=True)
    errors = {}
    for name in ("yaqa", "nearest"):
        error = weight - quantize_weight(weight, [format], table, rounding=name).weights[format].dequantize()
        errors[name] = float(((error @ moments.hessian[0]) * error).sum())
    assert errors["yaqa"] < 0.8 * errors["nearest"]
