"""Requests that cannot be carried out: a clear error before anything is measured, and no file left behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantkit
from quantkit.errors import InfeasibleBudget, InvalidRequest, QuantkitError
from quantkit.stages import apply as last_stage
from quantkit.stages import profile as first_stage
from quantkit.stages import quantize as whole
from quantkit.targets import Target
from tests.stages.networks import images, small


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        pytest.fail("something was measured")

    monkeypatch.setattr(first_stage, "_measure", fail)
    monkeypatch.setattr(whole, "announced_evaluator", fail)
    for name in ("PlanApplication", "Subject"):
        monkeypatch.setattr(last_stage, name, fail)


def with_weight(value: float) -> nn.Module:
    model = small()
    with torch.no_grad():
        model.conv.weight[2, 1, 0, 0] = value
    return model


def with_running_variance(value: float) -> nn.Module:
    model = small()
    model.stem[1].running_var[3] = value
    return model


def with_input(value: float) -> torch.Tensor:
    x = images()
    x[17, 1, 2, 3] = value
    return x


@dataclass(frozen=True)
class Bad:
    """What is wrong in a call that is otherwise right, and the error it has to raise."""

    message: str
    options: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], Any] = small
    calibration: Any = None
    error: type[QuantkitError] = InvalidRequest


EMPTY = r"^The calibration data (is empty|has no samples: .*)\. Pass a few hundred typical inputs; labels are not "
NOT_FINITE = r"^Calibration batch {} contains NaN or infinite values\. Remove or repair these inputs"
WEIGHTS = r"^These weights contain NaN or infinite values: {}\. Repair the checkpoint\.$"

DATA = {
    "empty list": Bad(EMPTY, calibration=[]),
    "empty tensor": Bad(EMPTY, calibration=images()[:0]),
    "empty generator": Bad(EMPTY, calibration=(x for x in ())),
    "no iterable": Bad("^calibration must be an iterable of model inputs, not float", calibration=3.5),
    "a string": Bad("^The calibration data are texts, and the model takes numbers: tokenizer=", calibration="images"),
    "NaN": Bad(NOT_FINITE.format(0), calibration=with_input(float("nan"))),
    "infinity": Bad(NOT_FINITE.format(1), calibration=[images(), with_input(float("inf"))]),
    "wrong channels": Bad(
        r"^The model rejected a calibration batch \(\(8, 3, 6, 6\)\): RuntimeError: .*Pass batches exactly as",
        calibration=torch.zeros(8, 3, 6, 6),
    ),
    "wrong channels in a later batch": Bad(
        r"^The model rejected a calibration batch \(\(4, 3, 6, 6\)\)", calibration=[images(), torch.zeros(4, 3, 6, 6)]
    ),
    "empty dicts": Bad(EMPTY, calibration=[{}, {}]),
    "unknown keyword": Bad("^The model rejected a calibration batch.*pixels", calibration={"pixels": images()}),
    "images without a batch axis": Bad(r"^A batch axis is missing.*\(2, 6, 6\)", calibration=list(images())),
    "and with labels": Bad(r"^A batch axis is missing", calibration=[(x, 3) for x in images()]),
    "no samples": Bad("^samples=0: at least one calibration sample is needed", {"samples": 0}),
}

MODELS = {
    "NaN weight": Bad(WEIGHTS.format(r"conv\.weight"), model=lambda: with_weight(float("nan"))),
    "infinite weight": Bad(WEIGHTS.format(r"conv\.weight"), model=lambda: with_weight(float("-inf"))),
    "NaN statistic": Bad(WEIGHTS.format(r"stem\.1\.running_var"), model=lambda: with_running_variance(float("nan"))),
    "nothing to quantize": Bad(
        r"^The model has no layer to quantize \(it has none of the known layers\)", model=lambda: nn.ReLU()
    ),
    "only unsupported layers": Bad(
        r"no layer to quantize \(0: conv_transpose2d is not supported by target onnxruntime-cpu yet\)",
        {"target": replace(Target.load("onnxruntime-cpu"), weight_only_layers=())},
        model=lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2)),
    ),
    "all kept float": Bad(r"no layer to quantize \(.*kept float by a rule", {"rules": {"*": "float"}}),
    "lazy": Bad(r"^These parameters have no values yet", model=lambda: nn.Sequential(nn.LazyConv2d(3, 1))),
    "meta": Bad(r"^These parameters have no values yet", model=lambda: small().to("meta")),
    "no module": Bad(r"^The model must be a torch\.nn\.Module, not function", model=lambda: with_input),
}

BUDGETS = {
    "no unit": Bad(r"^Cannot read the budget '4': '4' is not an amount with a unit\. Understood", {"budget": "4"}),
    "a number": Bad(r"^A budget is text, a mapping or a Budget; 4 has no unit\. Understood", {"budget": 4}),
    "words": Bad(r"^Cannot read the budget 'small'", {"budget": "small"}),
    "negative": Bad(r"^size='-3 KB': a limit is a finite number above zero", {"budget": "-3 KB"}),
    "zero": Bad(r"^average_bits='0 bits': a limit is a finite number above zero", {"budget": "0 bits"}),
    "unknown limit": Bad(
        r"^'sise' is not a limit\. Did you mean 'size' or 'file_size'\?", {"budget": {"sise": "3 KB"}}
    ),
    "no times": Bad(r"^latency=60% needs times measured .* run `quantkit bench RECIPE`", {"budget": "latency=60%"}),
    "nothing to make fast by": Bad(
        r"^latency=100% needs times measured",
        {"budget": "accuracy_drop=1, minimize=latency", "evaluate": lambda model: 1.0},
    ),
    "accuracy in place": Bad(
        r"^accuracy_drop tries several plans, and inplace=True leaves one model\. Leave inplace out\.$",
        {"budget": "accuracy_drop=1%", "inplace": True, "evaluate": lambda model: 1.0},
    ),
    "bits out of reach": Bad(
        r"^No plan has average bits 1 bits: the smallest that can be reached is 2\.829 bits\. Ask for at least that",
        {"budget": "1 bits"},
        error=InfeasibleBudget,
    ),
    "bytes out of reach": Bad(
        r"^No plan has size 200 B: the smallest that can be reached is \d+ B",
        {"budget": "200 B"},
        error=InfeasibleBudget,
    ),
}

NAMES = {
    "scheme": Bad(r"^Unknown scheme 'w9a8'\. Expected 'float' or formats such as", {"schemes": ["w9a8"]}),
    "scheme in a rule": Bad(r"^Unknown scheme 'four'", {"rules": {"conv": "four"}}),
    "scheme not run": Bad(
        r"^activation format a3 is not supported by target onnxruntime-cpu yet.*Candidates that can run: w2a8",
        {"schemes": ["w4a3", "w4a8"]},
    ),
    "no scheme": Bad(r"^schemes is empty: name at least one candidate", {"schemes": []}),
    "target": Bad(r"^Unknown target 'onnxruntime'; known: onnxruntime-cpu.*Did you mean", {"target": "onnxruntime"}),
    "estimator": Bad(r"^Unknown sensitivity 'gramm'; known: .*Did you mean 'gram'", {"sensitivity": "gramm"}),
    "estimator of ranks": Bad(r"^sensitivity='depth' ranks layers and gives no damages", {"sensitivity": "depth"}),
    "estimator that cannot weigh activations": Bad(
        r"^sensitivity='weight-error' goes by the error of weights, which says nothing of activations, and they would "
        r"be a8\. Use weight-only schemes such as 'w4'",
        {"sensitivity": "weight-error"},
    ),
    "solver": Bad(r"^Unknown solver 'gredy'; known: .*Did you mean 'greedy'", {"solver": "gredy"}),
    "effort": Bad(r"^Unknown effort 'throrough'; known: fast, .*Did you mean 'thorough'", {"effort": "throrough"}),
    "rounding": Bad(r"^Unknown rounding 'gptqq'; known: .*Did you mean 'gptq'", {"rounding": "gptqq"}),
    "ranges": Bad(r"^Unknown ranges 'minmx'; known: .*Did you mean 'minmax'", {"ranges": "minmx"}),
    "loss": Bad(r"^Unknown loss 'kll'; known: auto, kl, mse", {"loss": "kll"}),
    "evaluate": Bad(r"^evaluate must be a function \(model -> metric\), not float", {"evaluate": 0.92}),
    "rule for nothing": Bad(
        r"^The rule 'cnov\*' matches no layer\. Did you mean 'conv'\? Layers: stem\.0, conv, mix, head\.$",
        {"rules": {"cnov*": "w8a8"}},
    ),
    "rules of no shape": Bad(
        r"^A rule is a pair \(pattern, scheme or schemes\), not \('conv',\)", {"rules": [("conv",)]}
    ),
}


CASES = {
    f"{kind}: {name}": bad
    for kind, group in (("data", DATA), ("model", MODELS), ("budget", BUDGETS), ("name", NAMES))
    for name, bad in group.items()
}


def arguments_of(bad: Bad) -> dict[str, Any]:
    data = images() if bad.calibration is None else bad.calibration
    data = None if data is ... else data
    return {"model": bad.model(), "budget": "4 bits", "calibration": data, "progress": False} | bad.options


@pytest.mark.parametrize("bad", CASES.values(), ids=CASES)
def test_a_bad_request_is_refused(bad: Bad, tmp_path: Path) -> None:
    with pytest.raises(bad.error, match=bad.message) as caught:
        quantkit.quantize(**arguments_of(bad), workdir=tmp_path)
    assert type(caught.value) is bad.error
    assert list(tmp_path.iterdir()) == []


ONLY_QUANTIZE = {"budget", "solver", "effort", "evaluate"}


@pytest.mark.parametrize(
    "bad",
    [b for b in CASES.values() if not ONLY_QUANTIZE & b.options.keys() and "generator" not in str(b.calibration)],
)
def test_profile_refuses_it_as_well(bad: Bad, tmp_path: Path) -> None:
    arguments = arguments_of(bad)
    del arguments["budget"]
    with pytest.raises(InvalidRequest, match=bad.message):
        quantkit.profile(**arguments, workdir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_group_that_does_not_fit_names_the_layer_and_the_nearest_that_does() -> None:
    """No target can run groups yet, so a target is made up that does."""
    target = replace(quantkit.Target.load("onnxruntime-cpu"), weight_groups=True, weight_scales=("f32", "f16"))
    message = (
        r"^Group size 16 of w4g16 does not fit layer 'stem\.0': its output channels read 18 inputs each\. "
        r"The nearest group size that divides them is 18\.$"
    )
    with pytest.raises(InvalidRequest, match=message):
        quantkit.profile(small(), images(), schemes=["w4g16a8"], target=target, progress=False)
    with pytest.raises(InvalidRequest, match=message):
        quantkit.apply(small(), {"stem.0": "w4g16a8"}, images(), target=target, progress=False)


def test_a_budget_out_of_reach_carries_the_smallest() -> None:
    with pytest.raises(InfeasibleBudget) as caught:
        quantkit.quantize(small(), "1 bits", images(), progress=False)
    assert caught.value.limit == "average_bits=1 bits"
    assert caught.value.smallest == 2.829
    with pytest.raises(pytest.fail.Exception, match="something was measured"):  # the smallest itself can be met
        quantkit.quantize(small(), "2.829 bits", images(), progress=False)
