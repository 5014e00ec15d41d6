"""What improving a plan measures: plans, and every single change of one, with pair terms in the plan's own metric."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.sensitivity.around import PlanDamage
from quantkit.sensitivity.damage import KLDamage
from quantkit.sensitivity.measure import Perturbation
from tests.sensitivity.networks import by_hand, classifier, inputs, perturbed, request_of, subject_of


@pytest.fixture(scope="module")
def measured():
    """(measurements, perturbations, the plan of w4 everywhere, outputs by hand of chosen perturbations)."""
    batches = inputs()
    request = request_of(classifier(), batches)
    changes = perturbed(request)
    plan = [k for k, p in enumerate(changes) if p.format in ("w4", "a8")]
    x = torch.cat([args[0] for args, _ in batches])

    def outputs(chosen: list[Perturbation]) -> torch.Tensor:
        return by_hand(request, x, chosen)

    return PlanDamage(subject_of(request, batches), changes, progress=False), changes, plan, outputs


def test_damage_of_a_plan_is_the_divergence_from_the_float_model(measured) -> None:
    measurements, changes, plan, outputs = measured
    rows = KLDamage().rows(outputs([]), outputs([changes[k] for k in plan]))
    assert measurements.plans([plan])[0] == pytest.approx(float(rows.mean()), rel=1e-3)
    assert measurements.plans([plan], share=0.4)[0] == pytest.approx(float(rows[:16].mean()), rel=1e-3)
    assert measurements.plans([plan], share=0.55)[0] == pytest.approx(float(rows[:22].mean()), rel=1e-3)
    assert measurements.plans([[]])[0] == 0


def test_rows_of_one_sample_are_one_number() -> None:
    batches = [((torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(k)),), {}) for k in range(2)]
    model = torch.nn.Sequential(torch.nn.Linear(6, 5)).eval()
    request = request_of(model, batches)
    changes = perturbed(request)
    plan = [next(k for k, p in enumerate(changes) if p.format == "w2")]
    ((rows,),) = PlanDamage(subject_of(request, batches), changes, progress=False).rows_at([1.0], [plan])
    x = torch.cat([args[0] for args, _ in batches])
    expected = KLDamage().rows(model(x), by_hand(request, x, [changes[plan[0]]])).mean(1)
    assert rows == pytest.approx(expected.detach().numpy(), rel=1e-3)


def test_around_measures_every_change_of_the_plan(measured) -> None:
    measurements, changes, plan, _ = measured
    damage, _ = measurements.around(plan)
    for k, one in enumerate(changes):
        instead = [k if changes[j].owner == one.owner and changes[j].format[0] == one.format[0] else j for j in plan]
        assert damage[k] == pytest.approx(measurements.plans([instead])[0], rel=1e-6)


def test_pair_terms_are_those_of_the_plans_own_metric(measured) -> None:
    measurements, changes, plan, outputs = measured
    _, pairs = measurements.around(plan)
    base = outputs([changes[k] for k in plan]).double()
    q = base.softmax(-1)
    for k, one in enumerate(changes):
        if k in plan:
            assert not pairs[k].any()
            continue
        chosen = [changes[j] for j in plan if (changes[j].owner, changes[j].format[0]) != (one.owner, one.format[0])]
        u = outputs([*chosen, one]).double() - base
        curvature = ((q * u * u).sum(-1) - (q * u).sum(-1) ** 2).mean()
        assert pairs[k, k] == pytest.approx(float(curvature), rel=5e-3, abs=1e-9)
    assert np.allclose(pairs, pairs.T)
    assert np.linalg.eigvalsh(pairs).min() >= -1e-9
