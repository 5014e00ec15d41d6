"""A session prepares a model once: what is recorded, folded and copied is counted."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import quantkit
from quantkit.plan import COMPOSITION
from quantkit.program.record import Recorder
from quantkit.reconstruction.learning import Schedule
from quantkit.session import Session
from quantkit.stages.inputs import Inputs
from quantkit.stages.recording import Replay
from quantkit.targets import Target
from quantkit.transforms import prepare
from tests.program.architectures import ARCHITECTURES
from tests.program.models import randn
from tests.stages.networks import images, small
from tests.stages.schedules import all_of, apply_with, quantize_with
from tests.stages.test_reconstruct import SMALL

SHORT = all_of(Schedule(steps=4, batch=8))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often a model was recorded, folded and copied."""
    found: Counter[str] = Counter()
    begin, fold, deepcopy = Recorder.__init__, prepare.fold, copy.deepcopy

    def recorded(self: Recorder, *given: Any) -> None:
        found["recorded"] += 1
        begin(self, *given)

    def folded(*given: Any) -> None:
        found["folded"] += 1
        fold(*given)

    def copied(x: Any, *given: Any) -> Any:
        found["copied"] += isinstance(x, nn.Module)
        return deepcopy(x, *given)

    monkeypatch.setattr(Recorder, "__init__", recorded)
    monkeypatch.setattr(prepare, "fold", folded)
    monkeypatch.setattr(copy, "deepcopy", copied)
    yield found


@pytest.mark.parametrize(("way", "count"), [("none", 20), ("block", 64), ("network", 64), ("adaquant", 64)])
def test_a_plan_is_applied_to_a_model_that_is_prepared_once(way: str, count: int, counted: Counter[str]) -> None:
    apply_with(SHORT, small(), dict.fromkeys(SMALL, "w4a8"), images(count), reconstruction=way)
    assert counted == {"recorded": 2, "folded": 1, "copied": 1}


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_a_model_is_quantized_that_is_prepared_once(effort: str, counted: Counter[str]) -> None:
    schemes = ["w4a8", "w8a8"]
    quantkit.quantize(small(), "5 bits", images(), schemes=schemes, effort=effort, progress=False)
    assert counted == {"recorded": 2, "folded": 1, "copied": 1}


def test_in_place_the_users_model_is_folded_too_and_not_recorded(counted: Counter[str]) -> None:
    model = small()
    result = quantize_with(SHORT, model, "5 bits", images(), ["w4a8", "w8a8"], inplace=True)
    assert result.quantized.model is model
    assert counted == {"recorded": 2, "folded": 2, "copied": 1}


def test_a_limit_on_accuracy_copies_once_for_each_plan_applied(
    counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    applied = []
    apply_plan = quantkit.stages.quantize.apply_plan
    monkeypatch.setattr("quantkit.stages.quantize.apply_plan", lambda *given: applied.append(1) or apply_plan(*given))
    model, x = small(), images()
    answers = model(x).argmax(1)
    quantkit.quantize(
        model, "accuracy_drop=0.3", x, schemes=["w2a8", "w4a8", "w8a8"], progress=False,
        evaluate=lambda m: float((m(x).argmax(1) == answers).float().mean()),
    )  # fmt: skip
    assert applied
    assert counted == {"recorded": 2, "folded": 1, "copied": 1 + len(applied)}


@pytest.mark.parametrize("name", ["llama", "bert", "whisper_encoder"])
def test_single_samples_are_recorded_twice_over_and_replayed(name: str) -> None:
    entry = ARCHITECTURES[name]
    model, batches = entry.build(), [entry.batch(1, None, seed) for seed in range(3)]
    inputs = Inputs.of(model, [kwargs or args for args, kwargs in batches], None, None)
    session = Session.open(model, inputs, quantkit.Target.load("onnxruntime-cpu"))
    assert session.prepared.program.size == 2
    assert isinstance(session.replay, Replay)


class OneSample(nn.Module):
    """Takes one sample only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(self.first(x.view(1, 6)).relu())


def test_a_model_of_one_sample_is_recorded_on_it() -> None:
    result = quantkit.apply(
        OneSample(), {"first": "w4a8", "second": "w4a8"}, [randn(1, 6, seed=i) for i in range(4)], progress=False
    )
    assert set(result.notes["rounding"]) == {"first", "second"}


class Experts(nn.Module):
    """Chooses one of its experts for all rows, by a number that is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))

    def forward(self, x):
        return self.experts[1](x)


class UnusedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.aside = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x, aside: bool = False):
        y = self.body(x)
        return self.aside(y) if aside else y


@pytest.mark.parametrize(
    ("kind", "names"), [(Experts, "experts.0, experts.2"), (UnusedHead, "aside")], ids=["experts", "head"]
)
def test_layers_that_no_input_reaches_are_named_and_stay_float(kind: type[nn.Module], names: str, caplog) -> None:
    model = kind().eval()
    inputs = Inputs.of(model, torch.randn(8, 6), None, None)
    with caplog.at_level(logging.WARNING, "quantkit"):
        session = Session.open(model, inputs, Target.load("onnxruntime-cpu"))
    assert f"no calibration input reaches {names}: these layers stay float" in caplog.text
    assert not set(names.split(", ")) & set(session.prepared.quantizable)


class Auxiliary(nn.Module):
    """A head that only training uses, with more weights than all that is used later."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 40), nn.Linear(40, 3)
        self.auxiliary = nn.Sequential(nn.Linear(40, 200), nn.ReLU(), nn.Linear(200, 3))

    def forward(self, x):
        y = self.body(x).relu()
        return (self.head(y), self.auxiliary(y)) if self.training else self.head(y)


@pytest.mark.parametrize(("budget", "bits"), [("7 bits", 7), ("w8", 8)])
def test_what_only_training_uses_is_in_no_size(budget: str, bits: int, tmp_path) -> None:
    result = quantkit.quantize(Auxiliary().eval(), budget, torch.randn(8, 6), progress=False)
    report = result.export_onnx(tmp_path / "model.onnx")
    used, scales = 6 * 40 + 40 * 3, 4 * 43  # a float32 scale for every output channel
    assert result.plan.size_bytes <= used * bits / 8 + scales * (budget == "w8")
    assert "auxiliary" not in str(result.plan.provenance[COMPOSITION])
    assert result.plan.average_bits == pytest.approx(8 * result.plan.size_bytes / used)
    assert report.weight_bytes == result.plan.size_bytes
    assert report.stored_bytes <= result.plan.total_bytes
