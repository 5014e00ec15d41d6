"""What a subject puts in place is what it says, and its damage is the divergence from the float model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantkit.errors import InvalidRequest
from quantkit.sensitivity.damage import KLDamage, SquaredError
from quantkit.sensitivity.outputs import rows_of
from tests.sensitivity.networks import by_hand, classifier, inputs, outputs_of, perturbed, request_of, subject_of


def test_outputs_are_those_of_the_network_with_the_perturbations_in_place() -> None:
    batches = inputs()
    request = request_of(classifier(), batches)
    changes = perturbed(request)
    subject = subject_of(request, batches)
    x = torch.cat([args[0] for args, _ in batches])
    layers = {p.owner: p for p in changes}
    for chosen in ([], [changes[0]], [changes[-1]], list(layers.values())):
        expected = by_hand(request, x, chosen)
        assert torch.allclose(torch.cat(outputs_of(subject, chosen)), expected, atol=1e-5)


def test_weights_are_back_after_measuring_also_when_it_fails() -> None:
    batches = inputs()
    request = request_of(classifier(), batches)
    changes = perturbed(request)
    before = {name: tensor.clone() for name, tensor in request.ready.model.state_dict().items()}
    list(subject_of(request, batches).outputs(changes[:1]))
    broken = subject_of(request, [*batches, ((torch.ones(2, 5),), {})])
    with pytest.raises(InvalidRequest, match="rejected"):
        list(broken.outputs(changes[:1]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in request.ready.model.state_dict().items())


def test_outputs_not_asked_for_leave_nothing_behind() -> None:
    batches = inputs()
    request = request_of(classifier(), batches)
    weight = request.ready.model[0].weight.detach().clone()
    outputs = subject_of(request, batches).outputs(perturbed(request)[:1])
    next(outputs)
    assert torch.is_grad_enabled()
    assert torch.equal(request.ready.model[0].weight, weight)
    assert len(list(outputs)) == len(batches) - 1


def test_divergence_is_that_of_torch_and_never_negative() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 5, generator=draw) * 4, torch.randn(50, 5, generator=draw) * 4
    expected = nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert torch.allclose(KLDamage().rows(a, b), expected, atol=1e-6)
    assert (KLDamage().rows(a, a * (1 + 1e-7)) >= 0).all()


@pytest.mark.parametrize("share", [1e-4, 1e-3, 0.1, 30.0])
def test_divergence_of_nearly_equal_rows_is_not_lost_in_rounding(share: float) -> None:
    """Twin: the definition in float64."""
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(50, 5, generator=draw) * 4
    b = a + share * torch.randn(50, 5, generator=draw)
    log_p, log_q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert KLDamage().rows(a, b).double().mean() == pytest.approx(float(expected.mean()), rel=2e-3)


def test_metric_vectors_give_the_second_order_of_the_divergence() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, u = torch.randn(6, 5, generator=draw).double(), torch.randn(1, 6, 5, generator=draw).double()
    v = KLDamage().metric(logits, u, 1.0)[0]
    step = 1e-3
    divergence = KLDamage().rows(logits, logits + step * u[0])
    assert torch.allclose(0.5 * v.square().sum(-1), divergence / step**2, rtol=5e-3)


def test_metric_vectors_of_the_squared_error_give_the_squared_error() -> None:
    draw = torch.Generator().manual_seed(0)
    a, u = torch.randn(8, 3, generator=draw), torch.randn(8, 3, generator=draw)
    error = SquaredError.relative_to((5 * a).double().square().sum(-1))
    assert torch.allclose(0.5 * error.metric(a, u, 1.0).square().sum(-1), error.rows(a, a + u))


def test_squared_error_is_relative_and_the_same_for_any_unit() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 3, generator=draw), torch.randn(8, 3, generator=draw)
    one, ten = (SquaredError.relative_to(x.double().square().sum(-1)) for x in (a, 10 * a))
    expected = 0.5 * ((a - b) ** 2).sum() / (a**2).sum()
    assert torch.allclose(one.rows(a, b).mean(), expected)
    assert torch.allclose(one.rows(a, b), ten.rows(10 * a, 10 * b))


@pytest.mark.parametrize(
    ("shape", "expected"), [((2, 5), (2, 5)), ((2, 7, 5), (14, 5)), ((2, 5, 3, 4), (24, 5)), ((6,), (6, 1))]
)
def test_rows_have_the_classes_last(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert tuple(rows_of(torch.ones(shape)).shape) == expected


def test_rows_of_maps_keep_the_classes_of_a_position_together() -> None:
    maps = torch.randn(2, 5, 3, 4)
    assert torch.equal(rows_of(maps)[1 * 12 + 2 * 4 + 3], maps[1, :, 2, 3])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_softened_divergence_is_that_of_the_softened_distributions_with_gradients_as_large(temperature: float) -> None:
    reference = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    output = (reference + 1e-4 * torch.randn(6, 5, dtype=torch.float64)).requires_grad_()
    rows = KLDamage().smooth_rows(reference, output, temperature)
    twin = torch.nn.functional.kl_div(
        (output / temperature).log_softmax(-1), (reference / temperature).softmax(-1), reduction="none"
    ).sum(-1)
    assert torch.allclose(rows, temperature**2 * twin)
    (gradient,) = torch.autograd.grad(rows.sum(), output)
    expected = temperature * ((output / temperature).softmax(-1) - (reference / temperature).softmax(-1))
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_squared_error_has_no_temperature() -> None:
    reference, output = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    damage = SquaredError(2.0)
    assert torch.equal(damage.smooth_rows(reference, output, 4.0), damage.rows(reference, output))
