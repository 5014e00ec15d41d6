"""GPTQ is optimal brain quantization in fixed order; damping grows only where it must."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from quantkit.numbers.rounder import whole_numbers
from quantkit.numbers.uniform import dequantize, quantize
from quantkit.rounding.gptq import gptq_codes
from quantkit.rounding.moments import DAMPING, InverseFactor, inverse_factor, ordered_factor


def correlated_hessian(groups: int, size: int, seed: int, dead: tuple[int, ...] = ()) -> Tensor:
    """X^T X (groups, K, K), float64, of inputs that are mixtures of each other; ``dead`` inputs are always zero."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, size, size, generator=draw, dtype=torch.float64)
    x = torch.randn(groups, 3 * size, size, generator=draw, dtype=torch.float64) @ mixing
    x[..., list(dead)] = 0
    return x.mT @ x


def damped(hessian: Tensor, damping: float) -> Tensor:
    """The Hessian that is factored: a share of the mean live diagonal added, a unit diagonal for dead inputs."""
    result = hessian.clone()
    for matrix in result:
        live = matrix.diagonal() > 0
        mean = float(matrix.diagonal()[live].mean()) if live.any() else 0.0
        for j in range(len(matrix)):
            matrix[j, j] = matrix[j, j] + damping * mean if live[j] else 1.0
    return result


def obq_row(
    row: np.ndarray, hessian: np.ndarray, scale: np.ndarray, zero: np.ndarray, low: int, high: int
) -> tuple[np.ndarray, float]:
    """Round one weight after the other, each time compensating in all others and removing it from the inverse.

    Frantar & Alistarh (arXiv 2208.11580), in fixed order. Returns codes and e H e^T.
    """
    left, inverse, codes = row.copy(), np.linalg.inv(hessian), np.zeros_like(row)
    for j in range(len(row)):
        codes[j] = np.clip(np.rint(left[j] / scale[j]) + zero[j], low, high)
        error = left[j] - (codes[j] - zero[j]) * scale[j]
        left -= error / inverse[j, j] * inverse[j]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    final = row - (codes - zero) * scale
    return codes, float(final @ hessian @ final)


def obq(
    weight: Tensor, hessian: Tensor, damping: float, scale: Tensor, zero: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """``obq_row`` for every row of ``weight`` (groups, O, K); a dead input's weight is zero."""
    each = weight.shape[-1] // scale.shape[-1]
    scale, zero = (x.repeat_interleave(each, -1).expand_as(weight).numpy() for x in (scale, zero))
    codes, loss = torch.empty_like(weight), torch.empty_like(weight[..., 0])
    for g, matrix in enumerate(damped(hessian, damping)):
        alive = (hessian[g].diagonal() > 0).double()
        for o in range(weight.shape[1]):
            row = (weight[g, o] * alive).numpy()
            found, loss[g, o] = obq_row(row, matrix.numpy(), scale[g, o], zero[g, o], low, high)
            codes[g, o] = torch.from_numpy(found)
    return codes, loss


def random_layer(groups: int, outputs: int, size: int, scales: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (groups, O, K), signed scales and zero points (groups, O, scales) for about 3 bits."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, outputs, size, generator=draw, dtype=torch.float64)
    sign = torch.randint(0, 2, (groups, outputs, scales), generator=draw) * 2 - 1
    scale = (0.3 + torch.rand(groups, outputs, scales, generator=draw, dtype=torch.float64)) * sign
    return weight, scale, torch.randint(-2, 3, (groups, outputs, scales), generator=draw).double()


def factored(hessian: Tensor) -> InverseFactor:
    factor = inverse_factor(hessian)
    assert factor is not None
    return factor


@pytest.mark.parametrize("dead", [(), (0,), (3, 4, 11)], ids=["all alive", "first dead", "three dead"])
@pytest.mark.parametrize("scales", [1, 4])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_equals_fixed_order_obq(groups: int, scales: int, dead: tuple[int, ...], seed: int) -> None:
    hessian = correlated_hessian(groups, 12, seed, dead)
    weight, scale, zero = random_layer(groups, 5, 12, scales, seed)
    factor = factored(hessian)
    codes, loss = gptq_codes(weight, factor, scale, zero, whole_numbers(-4, 3))
    wanted_codes, wanted_loss = obq(weight, hessian, factor.damping, scale, zero, -4, 3)
    assert torch.equal(codes, wanted_codes)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-10, atol=1e-10)


def test_groups_differ_in_which_inputs_are_dead() -> None:
    hessian = correlated_hessian(2, 8, 0)
    hessian[1, 3, :] = hessian[1, :, 3] = 0
    weight, scale, zero = random_layer(2, 4, 8, 1, 0)
    factor = factored(hessian)
    assert factor.dead.nonzero().tolist() == [[1, 3]]
    codes, loss = gptq_codes(weight, factor, scale, zero, whole_numbers(-4, 3))
    wanted_codes, wanted_loss = obq(weight, hessian, factor.damping, scale, zero, -4, 3)
    assert torch.equal(codes, wanted_codes)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-10, atol=1e-10)
    assert torch.equal(codes[1, :, 3], zero[1, :, 0])  # the code of value zero


def test_loss_is_the_squared_error_under_the_damped_hessian() -> None:
    hessian = correlated_hessian(2, 20, 1)
    weight, scale, zero = random_layer(2, 6, 20, 5, 1)
    factor = factored(hessian)
    codes, loss = gptq_codes(weight, factor, scale, zero, whole_numbers(-4, 3))
    error = weight - dequantize(codes, scale.repeat_interleave(4, -1), zero.repeat_interleave(4, -1))
    wanted = torch.einsum("goi,gij,goj->go", error, damped(hessian, factor.damping), error)
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 13, 33])
def test_equals_it_for_any_number_of_inputs(size: int) -> None:
    """Errors are moved in spans of powers of two."""
    hessian = correlated_hessian(2, size, size)
    weight, scale, zero = random_layer(2, 4, size, 1, size)
    factor = factored(hessian)
    codes, loss = gptq_codes(weight, factor, scale, zero, whole_numbers(-4, 3))
    wanted_codes, wanted_loss = obq(weight, hessian, factor.damping, scale, zero, -4, 3)
    assert torch.equal(codes, wanted_codes)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("groups", [1, 2])
def test_leading_dimensions_try_several_scales_at_once(groups: int, outputs: int) -> None:
    factor = factored(correlated_hessian(groups, 10, 3))
    weight, scale, zero = random_layer(groups, outputs, 10, 2, 3)
    before = weight.clone()
    stretch = torch.tensor([0.7, 1.0, 1.4], dtype=torch.float64)
    together, losses = gptq_codes(weight, factor, scale * stretch.reshape(3, 1, 1, 1), zero, whole_numbers(-4, 3))
    for i, factor_of_scale in enumerate(stretch):
        codes, loss = gptq_codes(weight, factor, scale * factor_of_scale, zero, whole_numbers(-4, 3))
        assert torch.equal(together[i], codes)
        torch.testing.assert_close(losses[i], loss, rtol=1e-12, atol=1e-12)
    assert torch.equal(weight, before)


def test_uncorrelated_inputs_round_to_nearest() -> None:
    hessian = torch.diag_embed(torch.rand(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1)
    weight, scale, zero = random_layer(1, 4, 16, 1, 0)
    codes, _ = gptq_codes(weight, factored(hessian), scale, zero, whole_numbers(-4, 3))
    assert torch.equal(codes, quantize(weight, scale, zero, -4, 3))


def test_lower_error_than_nearest_in_every_random_layer() -> None:
    """Statistical: rows summed, GPTQ wins in each of 30 layers (2 to 4 bits), and in more than 8 rows of 10."""
    wins = rows = 0
    for seed in range(30):
        bits = 2 + seed % 3
        low, high = -(1 << bits - 1), (1 << bits - 1) - 1
        hessian = correlated_hessian(1, 20, seed)
        weight, _, _ = random_layer(1, 16, 20, 1, seed)
        scale, zero = weight.abs().amax(-1, keepdim=True) / -low * 1.1, torch.zeros(1, 16, 1, dtype=torch.float64)
        codes, _ = gptq_codes(weight, factored(hessian), scale, zero, whole_numbers(low, high))
        errors = [weight - dequantize(c, scale, zero) for c in (codes, quantize(weight, scale, zero, low, high))]
        by_gptq, by_nearest = (torch.einsum("goi,gij,goj->go", e, hessian, e) for e in errors)
        assert by_gptq.sum() < by_nearest.sum(), seed
        wins += int((by_gptq < by_nearest).sum())
        rows += by_gptq.numel()
    assert wins > 0.8 * rows


def test_factor_is_that_of_the_inverse_damped_hessian() -> None:
    hessian = correlated_hessian(3, 9, 5, dead=(2,))
    factor = factored(hessian)
    assert factor.damping == DAMPING
    torch.testing.assert_close(factor.upper, factor.upper.triu())
    torch.testing.assert_close(factor.upper.mT @ factor.upper, torch.linalg.inv(damped(hessian, factor.damping)))


def test_fewer_samples_than_inputs_need_no_more_damping() -> None:
    x = torch.randn(1, 5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert factored(x.mT @ x).damping == DAMPING


@pytest.mark.parametrize(("coupling", "damping"), [(0.5, 0.01), (1.005, 0.01), (1.05, 0.1), (1.5, 1.0)])
def test_damping_grows_tenfold_until_the_factorization_succeeds(coupling: float, damping: float) -> None:
    hessian = torch.tensor([[[1.0, coupling], [coupling, 1.0]]], dtype=torch.float64)
    factor = factored(hessian)
    assert factor.damping == pytest.approx(damping)
    torch.testing.assert_close(factor.upper.mT @ factor.upper, torch.linalg.inv(damped(hessian, damping)))


def test_one_group_that_needs_damping_raises_it_for_all() -> None:
    hessian = torch.tensor([[[1.0, 0.5], [0.5, 1.0]], [[1.0, 1.05], [1.05, 1.0]]], dtype=torch.float64)
    assert factored(hessian).damping == pytest.approx(0.1)


def test_hessian_beyond_damping_has_no_factor() -> None:
    assert inverse_factor(torch.tensor([[[1.0, 3.0], [3.0, 1.0]]], dtype=torch.float64)) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hessian_that_is_not_finite_has_no_factor(value: float) -> None:
    hessian = correlated_hessian(2, 4, 0)
    hessian[1, 2, 3] = value
    assert inverse_factor(hessian) is None


def test_layer_that_saw_only_zeros_gets_the_codes_of_zero() -> None:
    factor = factored(torch.zeros(1, 6, 6, dtype=torch.float64))
    weight, scale, zero = random_layer(1, 3, 6, 1, 0)
    codes, loss = gptq_codes(weight, factor, scale, zero, whole_numbers(-4, 3))
    assert torch.equal(codes, zero.expand_as(codes))
    assert loss.count_nonzero() == 0


def uneven_hessian(groups: int, size: int, seed: int) -> Tensor:
    """Correlated inputs some of which are far more active than others, in no order."""
    draw = torch.Generator().manual_seed(seed)
    activity = torch.exp(1.5 * torch.randn(groups, size, generator=draw, dtype=torch.float64))
    return correlated_hessian(groups, size, seed) * activity.unsqueeze(-1) * activity.unsqueeze(-2)


def test_the_most_active_first_leaves_less_error() -> None:
    """Statistical: in at least 24 of 30 layers with uneven inputs, and in total by a tenth or more."""
    wins, totals = 0, np.zeros(2)
    for seed in range(30):
        hessian = uneven_hessian(1, 24, seed)
        weight, _, _ = random_layer(1, 16, 24, 1, seed)
        scale, zero = weight.abs().amax(-1, keepdim=True) / 4, torch.zeros(1, 16, 1, dtype=torch.float64)
        ordered = ordered_factor(hessian)
        assert ordered is not None
        by_order = ordered.restored(
            gptq_codes(ordered.sorted(weight), ordered.factor, scale, zero, whole_numbers(-4, 3))[0]
        )
        fixed = gptq_codes(weight, factored(hessian), scale, zero, whole_numbers(-4, 3))[0]
        errors = [weight - dequantize(codes, scale, zero) for codes in (by_order, fixed)]
        both = np.array([float(torch.einsum("goi,gij,goj->", e, hessian, e)) for e in errors])
        wins += int(both[0] < both[1])
        totals += both / both[1]
    assert wins >= 24 and totals[0] < 0.9 * totals[1]


def test_the_order_does_not_hang_on_the_last_bits_of_a_sum() -> None:
    draw = torch.Generator().manual_seed(0)
    noise = 1 + 1e-9 * torch.randn(1, 16, 16, generator=draw, dtype=torch.float64)
    hessian = torch.diag_embed(torch.full((1, 16), 3.0, dtype=torch.float64))
    one, other = ordered_factor(hessian), ordered_factor(hessian * noise)
    assert one is not None and other is not None
    assert one.order.tolist() == other.order.tolist() == [list(range(16))]


def test_order_is_undone() -> None:
    ordered = ordered_factor(uneven_hessian(2, 9, 0))
    x = torch.randn(3, 2, 4, 9, dtype=torch.float64)
    assert ordered is not None
    assert torch.equal(ordered.restored(ordered.sorted(x)), x)
    assert not torch.equal(ordered.sorted(x), x)
