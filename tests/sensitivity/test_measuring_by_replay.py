"""Variations of a plan played back: bit for bit what computing everything gives, and less computing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit.program.program import Step
from quantkit.sensitivity.measure import Perturbation, Subject
from quantkit.sensitivity.replay import variations
from quantkit.stages.options import Run
from quantkit.stages.profile import evaluator_of
from quantkit.stages.request import make_ready
from tests.sensitivity.networks import outputs_of


class Awkward(nn.Module):
    """A layer called twice, a tied pair, work in place on a layer's output, a shortcut, a layer that may not run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 8, 3, padding=1)
        self.tied = nn.Conv2d(8, 8, 3, padding=1)
        self.tied.weight = self.wide.weight
        self.rare = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        self.calls: list[str] = []
        for name, module in self.named_children():
            module.register_forward_hook(lambda *_, name=name: self.calls.append(name))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x += 1.0
        y = self.twice(x.relu())
        z = self.twice(self.wide(y).relu_())
        x = self.tied(x + z).mean((2, 3))
        if float(x.sum()) > 0:
            x = self.rare(x)
        return self.head(x)


@pytest.fixture(scope="module")
def evaluator() -> tuple[Subject, list[Perturbation]]:
    torch.manual_seed(0)
    images = [torch.randn(8, 3, 6, 6) for _ in range(3)]
    request = make_ready(Awkward().eval(), images, schemes=["w2a8", "w4a8"], rounding="nearest")
    found = evaluator_of(request, Run(progress=False))
    return found.subject, found.perturbations


def one_by_one(subject: Subject, plans: Sequence[Sequence[Perturbation]]) -> list[list[Tensor]]:
    return [outputs_of(subject, plan) for plan in plans]


def test_outputs_are_those_of_computing_everything(evaluator: tuple[Subject, list[Perturbation]]) -> None:
    subject, changes = evaluator
    four = [p for p in changes if p.format == "w4"]
    plans = [four, *([*four, p] for p in changes), [], changes[:3], four]
    expected = one_by_one(subject, plans)
    seen = 0
    for batch, plan, (output,) in variations(subject, plans):
        assert torch.equal(output, expected[plan][batch]), (batch, plan)
        seen += 1
    assert seen == len(plans) * len(subject.batches)


def test_around_a_base_plan_what_a_plan_leaves_out_is_the_bases(evaluator: tuple[Subject, list[Perturbation]]) -> None:
    subject, changes = evaluator
    based = replace(subject, base=[p for p in changes if p.format == "w2"])
    plans: list[list[Perturbation]] = [[], *([p] for p in changes)]
    expected = one_by_one(based, plans)
    for batch, plan, (output,) in variations(based, plans):
        assert torch.equal(output, expected[plan][batch])


def test_model_is_as_before_also_when_the_caller_stops(evaluator: tuple[Subject, list[Perturbation]]) -> None:
    subject, changes = evaluator
    before = [output.clone() for output in outputs_of(subject)]
    for _, plan, _ in variations(subject, [[changes[0]], [changes[-1]], []]):
        if plan == 1:
            break
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(subject), before, strict=True))
    assert not any("forward" in vars(module) for module in subject.model.modules())


def test_layers_before_the_change_are_not_computed_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))).eval()
    request = make_ready(model, [torch.randn(8, 4)], schemes=["w4a8"], rounding="nearest")
    found = evaluator_of(request, Run(progress=False))
    computed: list[str] = []
    list(found.subject.float_outputs())  # which tells what counts
    program = found.subject.program
    assert program is not None

    def counted(step: Step) -> Step:
        def compute(*args: Any, **kwargs: Any) -> Any:
            computed.append(step.key.scope)
            return step.func(*args, **kwargs)

        return replace(step, func=compute)

    subject = replace(found.subject, program=replace(program, steps=tuple(map(counted, program.steps))))
    weights = {p.owner: p for p in found.perturbations if p.format == "w4"}
    list(variations(subject, [[], [weights["4"]], [weights["0"], weights["5"]], []]))
    assert computed == [*"012345", *"45", *"012345"]
