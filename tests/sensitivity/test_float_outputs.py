"""Float outputs of large vocabularies are made again when they are asked for: the same, and in little memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.sensitivity import float_outputs as module
from quantkit.sensitivity.damage import Reference
from quantkit.sensitivity.float_outputs import LastLayers
from quantkit.sensitivity.measure import Subject
from quantkit.stages.request import Request, make_ready


class Language(nn.Module):
    """A causal model of a sum over what came before."""

    def __init__(self, vocabulary: int, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(vocabulary, width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        x = x + self.second(self.first(x.cumsum(1)).relu())
        return self.head(x / x.norm(dim=-1, keepdim=True) * 20)


def tokens(count: int, length: int, vocabulary: int, batch: int = 4) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return list(torch.randint(0, vocabulary, (count, length), generator=draw).split(batch))


def prepared(vocabulary: int = 500) -> tuple[Request, Subject]:
    request = make_ready(Language(vocabulary).eval(), tokens(10, 7, vocabulary), schemes=["w4", "w8"])
    program = request.session.standing
    assert program is not None
    ready, batches = request.ready, request.batches
    return request, Subject(ready.model, batches, {}, weights=ready.weights, program=program)


def test_outputs_that_are_made_again_are_those_that_would_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    _, subject = prepared()
    held = Reference.of(replace(subject))
    assert isinstance(held.outputs, list)
    monkeypatch.setattr(module, "HELD_BYTES", 0)
    made = Reference.of(replace(subject))
    assert isinstance(made.outputs, LastLayers) and made.counts == held.counts and made.damage == held.damage
    for (one,), (other,) in zip(made.outputs, held.outputs, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_they_stay_those_of_the_float_model_after_it_has_been_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD_BYTES", 0)
    _, subject = prepared()
    made = Reference.of(subject)
    before = [rows.clone() for (rows,) in made.outputs]
    with torch.no_grad():
        for parameter in subject.model.parameters():
            parameter.zero_()
    assert all(torch.equal(rows, own) for (rows,), own in zip(made.outputs, before, strict=True))


def test_outputs_that_are_not_much_larger_than_what_enters_the_last_layer_are_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "HELD_BYTES", 0)
    _, subject = prepared(20)
    assert isinstance(Reference.of(subject).outputs, list)


@pytest.mark.parametrize("sensitivity", ["gram", "fisher"])
def test_a_plan_is_the_same_however_outputs_are_kept(sensitivity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan() -> quantkit.Plan:
        found = quantkit.quantize(
            Language(500).eval(), "5 bits", tokens(10, 7, 500), schemes=["w3", "w4", "w8"], sensitivity=sensitivity,
            rounding="nearest", reconstruction="none", correction=None, progress=False,
        )  # fmt: skip
        damages.append(found.metrics["calibration_damage"])
        return found.plan

    damages: list[float] = []
    held = plan()
    monkeypatch.setattr(module, "HELD_BYTES", 0)
    assert plan().schemes == held.schemes and damages[0] == pytest.approx(damages[1], rel=1e-3)


SCRIPT = """
import resource, torch
from quantkit.allocation.allocate import allocate
from quantkit.sensitivity import curvature, damage, float_outputs
from quantkit.stages import recording
from quantkit.stages.apply import Application, apply_plan
from quantkit.stages.options import ApplyOptions, Run
from quantkit.stages.profile import measure
from quantkit.stages.request import make_ready
from quantkit import session
from tests.sensitivity.test_float_outputs import Language, tokens

# sequences of 16 tokens, eight times shorter than those that the limits are for
for module, name in ((session, "FORWARD_BYTES"), (curvature, "GRAPH_BYTES"), (float_outputs, "HELD_BYTES")):
    setattr(module, name, getattr(module, name) >> 3)
recording.TRIED_BYTES >>= 3
damage.SLICE_ELEMENTS >>= 3
torch.set_num_threads(1)
model, data = Language(150_000).eval(), tokens({count}, 16, 150_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
request = make_ready(model, data, schemes=["w4", "w8"], sensitivity="fisher", rounding="nearest")
plan = allocate(measure(request, Run(False)), "7 bits")
options = ApplyOptions("nearest", reconstruction="none", correction="none", reparameterization="none")
result = apply_plan(request.session, plan, Application(options, run=Run(False)))
assert result.metrics["calibration_damage"] > 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_vocabulary_of_150000_is_profiled_and_compared_without_holding_logits() -> None:
    count = 128
    logits = count * 16 * 150_000 * 4
    script = SCRIPT.format(count=count)
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    assert 1024 * int(done.stdout.split()[-1]) < logits / 2
