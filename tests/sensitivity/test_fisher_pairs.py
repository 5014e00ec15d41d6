"""Fisher inner products against loops over samples, finite differences and exact second order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantkit.sensitivity import COSTS
from quantkit.sensitivity import fisher as module
from quantkit.sensitivity.by_segments import passes_for
from quantkit.sensitivity.curvature import Landscape
from quantkit.sensitivity.fisher import _landscape, fisher
from quantkit.sensitivity.hvp_pairs import hvp_pairs
from quantkit.sensitivity.measure import Subject, applied
from quantkit.sensitivity.output_gradients import Calls, inner_products, whole
from quantkit.sensitivity.registry import Workload
from tests.sensitivity.networks import (
    classifier,
    generator,
    inputs,
    perturbed,
    request_of,
    sequences,
    subject_of,
    transformer,
)


def products(subject: Subject, changes: list, draws: int = 3) -> Tensor:
    """Inner products of the first batch, with the labels of seed 0."""
    land = Landscape(subject, changes, by_weights=False)
    with land.opened():
        return inner_products(land, 0, draws, generator())


def labels_of(subject: Subject, changes: list, draws: int) -> list[Tensor]:
    """What the labels of seed 0 say of the outputs of the first batch, (rows, classes) for each draw."""
    land = Landscape(subject, changes, by_weights=False)
    with torch.no_grad():
        (here,) = next(subject.float_outputs())
    draw = generator()
    return [land.damage.cotangent((here,), draw)[0] for _ in range(draws)]


def test_they_are_those_of_each_samples_weight_gradient_with_the_error_of_the_weight() -> None:
    batches = inputs(12)
    request = request_of(classifier(), batches)
    subject, changes = subject_of(request, batches), perturbed(request)
    weights = [p for p in changes if not p.at_site]
    found, labels = products(subject, weights), labels_of(subject, weights, 3)
    (x,), _ = batches[0]
    for k, one in enumerate(weights):
        parameter = subject.model.get_submodule(one.owner).weight
        error = one.change.dequantize() - parameter.detach()
        for draw, c in enumerate(labels):
            for n in range(len(x)):
                (slope,) = torch.autograd.grad((subject.model(x[n : n + 1]) * c[n]).sum(), parameter)
                assert float(found[k, draw, n]) == pytest.approx(float((slope * error).sum()), rel=1e-3, abs=1e-6)


def test_those_of_sites_and_of_sequences_are_the_slopes_of_the_outputs_along_the_changes() -> None:
    batches = sequences(6)
    request = request_of(transformer(), batches)
    subject, changes = subject_of(request, batches), perturbed(request)
    changes = [p for p in changes if p.format in ("w4", "a8")]
    found, labels = products(subject, changes), labels_of(subject, changes, 3)
    (before,) = next(subject.float_outputs())
    for k, one in enumerate(changes):
        (after,) = next(subject.outputs_with(*_some(subject, one, 1e-2)))
        slope = [100 * (c * (after - before)).double().sum(-1).reshape(6, 5).sum(1) for c in labels]
        scale = float(found[k].abs().max())
        assert torch.allclose(found[k], torch.stack(slope), rtol=0.05, atol=0.05 * scale)


def _some(subject: Subject, one, share: float):
    """A share of a change: what layers compute with, and what sites do."""
    weights, at = applied([one])
    floats = {name: subject.floats[name].detach() for name in weights}
    moved = {name: floats[name] + share * (value - floats[name]) for name, value in weights.items()}
    return moved, {name: lambda x, change=change: x + share * (change(x) - x) for name, change in at.items()}


def test_pair_terms_are_on_average_the_exact_ones(monkeypatch) -> None:
    monkeypatch.setattr(module, "plans_of", lambda formats: 0)
    monkeypatch.setattr(module, "shrunk_cosines", lambda halves, owners: (_cosines(sum(halves)), 1.0))
    batches = inputs(24)
    request = request_of(classifier(), batches)
    subject = subject_of(request, batches)
    changes = [p for p in perturbed(request) if p.format in ("w4", "a8")]
    exact = hvp_pairs(subject, changes, False, generator()).gram
    found = np.array([fisher(subject, changes, False, generator(s)).gram for s in range(40)])
    error = found.std(0, ddof=1) / len(found) ** 0.5
    lengths = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert (np.abs(found.mean(0) - exact) < 4 * error + 0.02 * lengths).all()
    assert np.abs(exact / lengths)[~np.eye(len(exact), dtype=bool)].max() > 0.1  # there are pair terms


def _cosines(matrix: np.ndarray) -> np.ndarray:
    lengths = np.sqrt(np.diag(matrix))
    return matrix / np.outer(lengths, lengths)


class Fused(nn.Module):
    """Layers that are parts of one parameter, and one that is a transposed matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.turned = nn.Parameter(0.4 * torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0] @ self.turned


def test_layers_that_are_parts_of_a_parameter_have_them_too() -> None:
    torch.manual_seed(0)
    model, x = Fused().eval(), torch.randn(6, 5, 8)
    batches = [((x,), {})]
    request = request_of(model, batches)
    subject = replace(subject_of(request, batches), weights=request.ready.weights)
    changes = [p for p in perturbed(request) if p.format == "w8"]
    assert len(changes) > len(list(model.children())) + 1
    found, labels = products(subject, changes), labels_of(subject, changes, 3)
    (before,) = next(subject.float_outputs())
    for k, one in enumerate(changes):
        (after,) = next(subject.outputs([one]))
        shift = torch.stack([(c * (after - before)).double().sum().reshape(1) for c in labels])
        scale = float(shift.abs().max())
        assert scale > 0 and torch.allclose(found[k], shift, atol=0.05 * scale)  # (tokens, samples, channels)
    assert len(_landscape(subject, changes)) == 6


def test_layers_that_no_call_reads_as_they_are_held_are_run_forward(monkeypatch) -> None:
    batches = sequences(6)
    request = request_of(transformer(), batches)
    subject = subject_of(request, batches)
    changes = [p for p in perturbed(request) if p.format == "w8"]
    by_calls = products(subject, changes)
    monkeypatch.setattr(Calls, "follows", lambda self, layer: False)
    by_outputs = products(subject, changes)
    assert torch.allclose(by_calls, by_outputs, atol=0.03 * float(by_calls.abs().max()))


def test_graphs_are_of_as_many_samples_as_fit(monkeypatch) -> None:
    batches = sequences(6)
    subject = subject_of(request_of(transformer(), batches), batches)
    assert len(Landscape(subject)) == 1
    monkeypatch.setattr("quantkit.sensitivity.curvature.GRAPH_BYTES", 1)
    assert len(Landscape(subject)) == 6


def test_seeds_decide_everything_and_formats_cost_no_passes() -> None:
    batches = sequences(6)
    request = request_of(transformer(), batches)
    subject, changes = subject_of(request, batches), perturbed(request)
    first, again = (fisher(subject, changes, False, generator(3)) for _ in range(2))
    assert np.array_equal(first.gram, again.gram) and first.saturation == again.saturation
    assert np.linalg.eigvalsh(first.gram)[0] > -1e-9 * np.abs(first.gram).max()
    few, many = (COSTS["fisher"].forwards(Workload(formats, 50, 100)) for formats in (200, 600))
    assert many < few + 10 + 14 and many < COSTS["gram"].forwards(Workload(600, 50, 100)) / 5


def test_segments_give_what_the_whole_graph_gives(monkeypatch) -> None:
    monkeypatch.setattr("quantkit.sensitivity.curvature.GRAPH_BYTES", 1)
    batches = sequences(6)
    request = request_of(transformer(), batches)
    replay = request.session.replay
    assert not isinstance(replay, str)
    ready = request.ready
    sites = {site.name: site for site in ready.sites}
    subject = Subject(ready.model, batches, sites, weights=ready.weights, program=replay.program)
    changes = perturbed(request)
    land = Landscape(subject, changes, by_weights=False)
    with land.opened():
        passes = passes_for(land)
        assert passes is not whole and len(list(passes(land, 0, 1, generator()))) >= 3
        for i in (0, 3):
            found = inner_products(land, i, 3, generator(i), passes)
            expected = inner_products(land, i, 3, generator(i))
            assert expected.abs().amax((1, 2)).min() > 0
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    monkeypatch.undo()
    assert passes_for(Landscape(subject, changes, by_weights=False)) is whole
