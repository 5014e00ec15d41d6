"""Damage of models with several outputs and of padded batches: what is added up, and that all estimators mean the
same by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import quantkit
from quantkit.errors import InvalidRequest
from quantkit.program.inputs import Batch
from quantkit.sensitivity import ESTIMATORS
from quantkit.sensitivity.around import PlanDamage
from quantkit.sensitivity.curvature import Landscape
from quantkit.sensitivity.damage import Damage, KLDamage, Reference, RunningDamage, SquaredError
from quantkit.sensitivity.gram import gram
from quantkit.sensitivity.measure import Perturbation, Subject
from quantkit.sensitivity.outputs import OutputRule, Outputs
from quantkit.sensitivity.pair_terms import Shifts, metric_lengths
from tests.sensitivity.networks import inputs, perturbed, request_of, subject_of


class Heads(nn.Module):
    """A trunk with three heads: logits per sample, boxes of three places per sample, one number per sample."""

    def __init__(self, results: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(6, 8)
        self.scores, self.boxes, self.size = nn.Linear(8, 5), nn.Linear(8, 12), nn.Linear(8, 1)
        self.results = results
        for layer in (self.trunk, self.scores, self.boxes, self.size):
            nn.init.normal_(layer.weight, std=0.5)

    def forward(self, x: Tensor) -> Any:
        x = self.trunk(x).relu()
        return self.results(self.scores(x), 40 * self.boxes(x).unflatten(-1, (3, 4)), self.size(x))


RESULTS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "pair": lambda scores, boxes, size: (scores, boxes),
    "dict": lambda scores, boxes, size: {"class": scores, "boxes": boxes},
    "logits": lambda scores, boxes, size: {"boxes": boxes, "logits": scores},
    "three": lambda scores, boxes, size: {"logits": scores, "found": [boxes, size]},
}


def measured(kind: str, count: int = 40) -> tuple[Subject, list[Perturbation]]:
    batches = inputs(count)
    request = request_of(Heads(RESULTS[kind]).eval(), batches)
    return subject_of(request, batches), perturbed(request)


def slow_rows(reference: Outputs, output: Outputs, losses: list[str]) -> list[np.ndarray]:
    """The damage of each row, by output, in numpy and without batches."""
    found = []
    for a, b, loss in zip(reference, output, losses, strict=True):
        p, q = a.double().numpy(), b.double().numpy()
        if loss == "mse":
            found.append(0.5 * ((p - q) ** 2).sum(1) / (p**2).sum(1).mean())
            continue
        log_p, log_q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
        found.append((np.exp(log_p) * (log_p - log_q)).sum(1))
    return found


def whole(batches: list[Outputs]) -> Outputs:
    return tuple(torch.cat(column) for column in zip(*batches, strict=True))


@pytest.mark.parametrize(
    ("kind", "losses"),
    [
        ("pair", ["mse", "mse"]),
        ("dict", ["mse", "mse"]),
        ("logits", ["mse", "kl"]),
        ("three", ["kl", "mse", "mse"]),
    ],
)
def test_damage_is_the_sum_over_outputs_of_the_mean_over_their_rows(kind: str, losses: list[str]) -> None:
    subject, changes = measured(kind)
    reference = whole(list(subject.float_outputs()))
    assert subject.rule is not None and [o.loss for o in subject.rule.outputs] == losses
    scores = ESTIMATORS["kl"](subject, changes, False, torch.Generator())
    for k, one in enumerate(changes):
        rows = slow_rows(reference, whole(list(subject.outputs([one]))), losses)
        assert scores.damage[k] == pytest.approx(sum(r.mean() for r in rows), rel=1e-3, abs=2e-8)  # float32
        most = sum(r.std(ddof=1) / len(r) ** 0.5 for r in rows)
        assert scores.standard_error[k] == pytest.approx(most, rel=1e-3, abs=1e-8)
    boxes = [scores.damage[k] for k, one in enumerate(changes) if one.owner == "boxes" and one.format == "w2"]
    assert min(boxes) > 1e-3  # no head is free
    assert scores.notes["damage"] == str(subject.rule)


@pytest.mark.parametrize("kind", ["dict", "three"])
def test_damage_does_not_depend_on_the_units_of_an_output(kind: str) -> None:
    subject, changes = measured(kind)
    before = ESTIMATORS["kl"](subject, changes, False, torch.Generator()).damage
    make = subject.model.results
    subject.model.results = lambda scores, boxes, size: make(scores, 1000 * boxes, size)
    after = ESTIMATORS["kl"](replace(subject, rule=None), changes, False, torch.Generator()).damage
    assert np.allclose(before, after, rtol=1e-4)


@pytest.mark.parametrize("kind", list(RESULTS))
def test_all_estimators_of_damage_agree_on_small_perturbations(kind: str) -> None:
    subject, changes = measured(kind)
    small = [p for p in changes if p.format == "w8"]
    draw = torch.Generator().manual_seed(0)
    kl, exact, pairs, noisy = (
        ESTIMATORS[name](subject, small, False, draw) for name in ("kl", "hvp-pairs", "pairwise", "fisher")
    )
    assert np.allclose(exact.damage, kl.damage, rtol=0.05)
    assert np.allclose(gram(subject, small, False).damage, kl.damage)
    assert np.allclose(pairs.damage, kl.damage)
    assert np.allclose(noisy.damage, kl.damage, rtol=0.6)  # few draws


@pytest.mark.parametrize("kind", ["logits", "three"])
def test_pair_terms_add_up_the_metrics_of_all_outputs(kind: str) -> None:
    subject, changes = measured(kind)
    small = [p for p in changes if p.format == "w8"]
    reference = Reference.of(subject)
    here = whole(list(reference.outputs))
    moved = [whole(list(subject.outputs([p]))) for p in small]
    shifts = [torch.stack([after[o] - rows for after in moved]) for o, rows in enumerate(here)]
    every = zip(reference.damage.measures, here, shifts, reference.samples(), strict=True)
    lengths = metric_lengths([Shifts(*one) for one in every])
    exact = ESTIMATORS["hvp-pairs"](subject, small, False, torch.Generator())
    assert np.allclose(0.5 * lengths**2, exact.damage, rtol=0.05)


@pytest.mark.parametrize("kind", list(RESULTS))
def test_cotangents_have_the_hessian_of_the_damage_as_their_second_moment(kind: str) -> None:
    subject, _ = measured(kind, 4)
    reference = Reference.of(subject)
    damage, point, draw = reference.damage, reference.outputs[0], torch.Generator().manual_seed(0)
    drawn = [damage.cotangent(point, draw) for _ in range(4000)]
    for o, rows in enumerate(point):
        moment = sum(torch.outer(one[o][0], one[o][0]) for one in drawn) / len(drawn)

        def first_row(x: Tensor, o: int = o, rows: Tensor = rows) -> Tensor:
            return damage.measures[o].smooth_rows(rows[:1], x[None])[0]

        hessian = torch.func.hessian(first_row)(rows[0])
        weight = damage.counts[0] / damage.counts[o]
        assert torch.allclose(moment, weight * hessian, atol=0.1 * float(weight * hessian.abs().max()))


def test_shares_of_batches_add_up_to_the_damage() -> None:
    subject, changes = measured("three")
    land = Landscape(replace(subject, base=[p for p in changes if p.format == "w4"]), changes)
    with land.opened(), torch.no_grad():
        total = sum(float(land.point(i).loss) for i in range(len(land)))
    reference = Reference.of(subject)
    assert total == pytest.approx(reference.damage_of(subject.outputs([*land.subject.base])).mean, rel=1e-5)
    assert land.shares.sum() == pytest.approx(1)


def test_plans_are_measured_by_sample_over_all_outputs() -> None:
    subject, changes = measured("three")
    plan = [k for k, p in enumerate(changes) if p.format in ("w4", "a8")]
    measurements = PlanDamage(subject, changes, progress=False)
    rows = measurements.rows_at([1.0], [plan])[0][0]
    reference = whole(list(subject.float_outputs()))
    output = whole(list(subject.outputs([changes[k] for k in plan])))
    slow = slow_rows(reference, output, ["kl", "mse", "mse"])
    assert rows == pytest.approx(sum(r.reshape(40, -1).mean(1) for r in slow), rel=1e-3, abs=1e-7)
    damage, pairs = measurements.around(plan)
    assert damage[plan[0]] == pytest.approx(rows.mean(), rel=1e-6)
    assert np.linalg.eigvalsh(pairs).min() > -1e-9


def test_wide_outputs_are_sketched_beside_narrow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.sensitivity.pair_terms.TEMPERATURES", (1.0,))
    subject, changes = measured("three")
    full = gram(subject, changes, False)
    elements = sum(rows.numel() for rows in whole(list(subject.float_outputs())))
    monkeypatch.setattr("quantkit.sensitivity.sketch.SHIFT_BYTES", 2 * len(changes) * elements)
    half = gram(subject, changes, False)
    assert half.notes["sketch"]["rows"] == 0.5
    assert np.array_equal(half.damage, full.damage)
    assert half.notes["sketch"]["relative_error"] < 0.5


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 6), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_merging_parts_is_measuring_the_whole(sizes: list[int], cut: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((1, 5), (3, 4))
    first, second = (
        [tuple(torch.randn(n * rows, classes, generator=draw) for rows, classes in shapes) for n in sizes]
        for _ in range(2)
    )
    rule = OutputRule.of(nn.Linear(1, 1), {"logits": first[0][0], "boxes": first[0][1]}, ((), {}), "auto")
    damage = Damage.of(rule, first)
    pieces = [RunningDamage(damage) for _ in range(3)]
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        pieces[0].update(a, b)
        pieces[1 if i < cut else 2].update(a, b)
    pieces[1].merge(pieces[2])
    assert pieces[1].mean_and_error == pieces[0].mean_and_error
    slow = slow_rows(whole(first), whole(second), ["kl", "mse"])
    assert pieces[0].mean == pytest.approx(sum(r.mean() for r in slow), rel=1e-4)


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_damage_of_a_single_output_is_that_of_all_its_rows_at_once(loss: str) -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = ([(torch.randn(n, 5, generator=draw),) for n in (16, 16, 8)] for _ in range(2))
    rule = OutputRule.of(nn.Linear(1, 1), first[0][0], ((), {}), loss)
    damage = Damage.of(rule, first)
    a, b = whole(first)[0], whole(second)[0]
    once = KLDamage() if loss == "kl" else SquaredError(float(a.double().square().sum(-1).mean()))
    assert damage.measures == (once,)
    running = RunningDamage(damage)
    for one, other in zip(first, second, strict=True):
        running.update(one, other)
    rows = once.rows(a, b).double()
    assert running.mean_and_error == (float(rows.mean()), float(rows.std()) / 40**0.5)


class Tokens(nn.Module):
    """Classes of every token, which sees the mean of all tokens that are no padding, and of the whole sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        nn.init.normal_(self.head.weight, std=1.0)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        mask = attention_mask.unsqueeze(-1).float()
        x = self.embed(ids) * mask
        mean = x.sum(1) / mask.sum(1)
        return {"logits": self.head(x + self.mix(mean).relu().unsqueeze(1)), "pooled": self.mix(mean)}


def sentences(longer: int) -> list[Batch]:
    """Sentences of 1 to 6 tokens, padded to 6 and ``longer``."""
    draw = torch.Generator().manual_seed(1)
    found: list[Batch] = []
    for count in (8, 6):
        ids = torch.randint(20, (count, 6), generator=draw)
        lengths = torch.randint(1, 7, (count, 1), generator=draw)
        mask = (torch.arange(6 + longer) < lengths).long()
        found.append(((torch.cat([ids, torch.zeros(count, longer, dtype=torch.long)], 1), mask), {}))
    return found


@pytest.mark.parametrize("sensitivity", ["kl", "gram", "hvp-pairs"])
def test_longer_padding_changes_no_damage(sensitivity: str) -> None:
    found = []
    for longer in (0, 5):
        batches = sentences(longer)
        request = request_of(Tokens().eval(), sentences(0))
        changes = [p for p in perturbed(request) if p.format in ("w2", "w4")]
        subject = subject_of(request, batches)
        scores = ESTIMATORS[sensitivity](subject, changes, False, torch.Generator().manual_seed(0))
        assert [o.padded for o in Reference.of(subject).damage.rule.outputs] == [True, False]
        rows = PlanDamage(subject, changes, progress=False).rows_at([1.0], [[0, len(changes) - 1]])[0][0]
        found.append((scores.damage, scores.gram if scores.gram is not None else 0.0, rows))
    for short, long in zip(*found, strict=True):
        assert np.allclose(short, long, rtol=1e-4, atol=1e-8)
    assert (found[0][0] > 0).all()


def test_outputs_whose_rows_depend_on_values_are_refused() -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x[:, 0] > 0]

    x = torch.tensor([[1.0, 2.0], [-1.0, 2.0]])
    reference = Reference.of(Subject(Chosen(), [((x,), {})], {}))
    other = Subject(Chosen(), [((x.abs(),), {})], {})
    with pytest.raises(InvalidRequest, match=r"output 'output'.*\(2, 2\).*\(1, 2\)"):
        reference.damage_of(other.outputs())
    with pytest.raises(InvalidRequest, match="without a row"):
        Reference.of(Subject(Chosen(), [((-x[:1],), {})], {}))


def test_the_rule_is_printed_once_and_kept_with_the_profile(caplog: pytest.LogCaptureFixture) -> None:
    model, data = Heads(RESULTS["dict"]).eval(), [args[0] for args, _ in inputs()]
    with caplog.at_level("INFO", logger="quantkit"):
        profile = quantkit.profile(model, data, schemes=["w4a8", "w8a8"], progress=False)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("damage: ")]
    assert lines == ["damage: relative squared error of class + relative squared error of boxes"]
    assert [o["name"] for o in profile.provenance["outputs"]["outputs"]] == ["class", "boxes"]
    result = quantkit.apply(model, quantkit.allocate(profile, "10 bits"), data, reconstruction="none", progress=False)
    assert 0 < result.metrics["calibration_damage"] < 0.05
