"""Outputs made small: what is kept is a distribution, its divergence a lower bound, its error stated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantkit.sensitivity import sketch as module
from quantkit.sensitivity.around import PlanDamage
from quantkit.sensitivity.damage import KLDamage
from quantkit.sensitivity.gram import gram
from quantkit.sensitivity.sketch import BUCKETS, TOP, Sketch, sketch_for
from tests.sensitivity.networks import (
    classifier,
    generator,
    inputs,
    outputs_of,
    perturbed,
    request_of,
    samples_of,
    subject_of,
)


def logits(rows: int, classes: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, classes, generator=generator(seed))


def test_outputs_that_fit_are_kept_as_they_are() -> None:
    assert sketch_for([logits(50, 2000), logits(20, 2000)], 10, True, generator()) is None


def test_merged_classes_have_the_summed_probability_of_their_bucket() -> None:
    outputs = [logits(5, 3000), logits(4, 3000, 1)]
    sketch = sketch_for(outputs, 10, True, generator())
    assert sketch is not None and sketch.share == 1
    for i, output in enumerate(outputs):
        small = sketch(i, output).double().softmax(-1)
        assert small.shape == (len(output), TOP + BUCKETS)
        for row, full in zip(small, output.double().softmax(-1), strict=True):
            top = full.topk(TOP).indices
            assert torch.allclose(row[:TOP], full[top], rtol=1e-4)
            rest = full.clone()
            rest[top] = 0
            for b in range(BUCKETS):
                assert float(row[TOP + b]) == pytest.approx(float(rest[sketch.bucket == b].sum()), rel=1e-3)


def test_merging_classes_lowers_a_divergence_and_keeps_most_of_it() -> None:
    before = logits(40, 3000) * 2
    after = before + 0.3 * torch.randn(before.shape, generator=generator(1))
    sketch = sketch_for([before], 2, True, generator())
    full = KLDamage().rows(before, after)
    small = KLDamage().rows(sketch(0, before), sketch(0, after))
    assert (small <= full + 1e-6).all() and small.mean() > 0.7 * full.mean()


def test_rows_are_sampled_in_order_until_all_copies_fit(monkeypatch) -> None:
    monkeypatch.setattr(module, "SHIFT_BYTES", 4 * 10 * 5 * 30)  # thirty rows of five classes for ten formats
    outputs = [logits(40, 5), logits(80, 5, 1)]
    sketch = sketch_for(outputs, 10, True, generator())
    assert [len(r) for r in sketch.rows] == [10, 20] and sketch.share == 0.25
    for i, output in enumerate(outputs):
        assert torch.equal(sketch(i, output), output[sketch.rows[i]])
        assert (sketch.rows[i].diff() > 0).all()
    again, other = (sketch_for(outputs, 10, True, generator(seed)) for seed in (0, 1))
    assert torch.equal(again.rows[1], sketch.rows[1]) and not torch.equal(other.rows[1], sketch.rows[1])


def test_outputs_that_are_no_classes_are_not_merged() -> None:
    assert sketch_for([logits(5, 3000)], 10, False, generator()) is None


def wide() -> nn.Sequential:
    model = classifier(3000)
    with torch.no_grad():
        model[-1].weight *= 3  # as sharp as a language model's head
    return model


def test_pair_terms_of_a_sketch_are_close_to_those_of_all_classes_and_damages_are_the_same(monkeypatch) -> None:
    monkeypatch.setattr("quantkit.sensitivity.pair_terms.TEMPERATURES", (1.0,))
    batches = inputs(40)
    request = request_of(wide(), batches)
    subject = subject_of(request, batches)
    changes = [p for p in perturbed(request) if p.format in ("w2", "w4")]
    small = gram(subject, changes, False, generator())
    monkeypatch.setattr(module, "MOST_CLASSES", 3000)
    full = gram(subject, changes, False, generator())
    assert np.array_equal(small.damage, full.damage)
    assert small.notes["sketch"]["classes"] == TOP + BUCKETS and "sketch" not in full.notes
    assert small.notes["sketch"]["relative_error"] < 0.2
    lengths = np.sqrt(np.outer(np.diag(full.gram), np.diag(full.gram)))
    assert np.abs((small.gram - full.gram) / lengths).max() < 0.1


def test_stated_error_is_that_of_single_damages_on_what_was_kept(monkeypatch) -> None:
    batches = inputs(40)
    request = request_of(classifier(), batches)
    subject, changes = subject_of(request, batches), perturbed(request)
    monkeypatch.setattr(module, "SHIFT_BYTES", 4 * len(changes) * 4 * 10)
    scores = gram(subject, changes, False, generator(5))
    reference = outputs_of(subject)
    kept = sketch_for(reference, len(changes), True, generator(5))
    errors = []
    for p, full in zip(changes, scores.damage, strict=True):
        pairs = zip(reference, outputs_of(subject, [p]), strict=True)
        rows = [KLDamage().rows(kept(i, a), kept(i, b)) for i, (a, b) in enumerate(pairs)]
        errors.append(abs(float(torch.cat(rows).mean()) - full) / full)
    assert scores.notes["sketch"]["rows"] == 0.25
    assert scores.notes["sketch"]["relative_error"] == pytest.approx(np.median(errors), rel=0.05)


def test_rows_that_are_kept_know_their_samples() -> None:
    reference = [torch.arange(12.0).repeat(3, 1).T, torch.arange(12.0, 24.0).repeat(3, 1).T]
    sketch = Sketch([12, 12], [torch.tensor([0, 5, 11]), torch.tensor([3, 4])], None, None, 0.2)
    numbers = samples_of([12, 12], [3, 4])
    kept = torch.cat([sketch(i, one)[:, 0] for i, one in enumerate(reference)])
    assert sketch.of_kept(numbers).tolist() == [int(v) // 4 if v < 12 else 3 + int(v - 12) // 3 for v in kept]


def test_measuring_around_a_plan_sketches_its_pair_terms_too(monkeypatch) -> None:
    monkeypatch.setattr("quantkit.sensitivity.pair_terms.TEMPERATURES", (1.0,))
    batches = inputs(40)
    request = request_of(wide(), batches)
    changes = [p for p in perturbed(request) if p.format in ("w2", "w4")]
    plan = [k for k, p in enumerate(changes) if p.format == "w4"]
    measurements = PlanDamage(subject_of(request, batches), changes, progress=False)
    damage, small = measurements.around(plan)
    monkeypatch.setattr(module, "MOST_CLASSES", 3000)
    exact, full = measurements.around(plan)
    assert np.array_equal(damage, exact)
    assert not np.array_equal(small, full)
    lengths = np.sqrt(np.diag(full))
    assert np.abs(small - full).max() < 0.2 * lengths.max() ** 2
