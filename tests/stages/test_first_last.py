"""The policy on first and last layers: in the plan, in its reasons, and weaker than the user's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantkit
from quantkit import Plan, QuantkitError
from quantkit.recipe.read import read_recipe
from quantkit.recipe.run import profile_recipe
from quantkit.report.summary import explain
from tests.program.models import randn
from tests.recipe.tiny import rewritten, write_tiny
from tests.stages.networks import images, small

NARROW = ["w2a4", "w3a4"]


def planned(first_last: str = "8 bits", model: nn.Module | None = None, **options: Any) -> Plan:
    options = {"schemes": NARROW, "calibration": images()} | options
    budget = options.pop("budget", "8 bits")
    profile = quantkit.profile(model or small(), first_last=first_last, progress=False, **options)
    return quantkit.allocate(profile, budget)


def test_eight_bits_for_the_first_and_the_last_layer_and_for_what_they_read() -> None:
    plan = planned()
    schemes = {name: str(scheme) for name, scheme in plan.schemes.items()}
    assert (schemes["stem.0"], schemes["head"]) == ("w8a8", "w8a8")
    assert schemes["conv"] in NARROW and schemes["mix"] in NARROW
    assert plan.sites["input"] == "a8"
    wanted = {"policy": "8 bits", "first": ["stem.0"], "last": ["head"], "by_rule": []}
    assert plan.provenance["first_last"] == wanted
    assert plan.why["stem.0"].endswith("; first layer: 8 bits by first_last")
    assert "layer" not in plan.why["conv"].split("; ")[-1]


def test_the_same_by_default_and_said_so() -> None:
    plan = planned("same", budget="4.5 bits")
    assert {str(scheme) for scheme in plan.schemes.values()} <= set(NARROW)
    assert plan.provenance["first_last"]["policy"] == "same"
    assert explain(plan, "head").splitlines()[-1] == "  last layer: treated as all others"


def test_a_rule_wins_and_the_plan_and_a_notice_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="quantkit"):
        plan = planned(rules={"h*d": "w3a4", "conv": "w2a4"})
    assert str(plan.schemes["head"]) == "w3a4" and str(plan.schemes["stem.0"]) == "w8a8"
    assert plan.provenance["first_last"]["by_rule"] == ["head"]
    assert plan.why["head"].endswith("; last layer: a rule decides, not first_last='8 bits'")
    assert "first_last='8 bits' leaves head to your rule: w3a4" in caplog.text


def test_a_layer_kept_float_by_a_rule() -> None:
    plan = planned(rules={"stem.0": "float"})
    assert plan.schemes["stem.0"].is_float and str(plan.schemes["head"]) == "w8a8"
    assert plan.why["stem.0"].endswith("; first layer: a rule decides, not first_last='8 bits'")


class Detector(nn.Module):
    """One of its two outputs is made of features that a further layer reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.near, self.more, self.far = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x):
        x = F.relu(self.stem(x))
        return {"near": self.near(x), "far": self.far(F.relu(self.more(x)))}


def test_what_reads_the_input_of_a_last_layer_reads_it_at_the_same_bits() -> None:
    torch.manual_seed(0)
    plan = planned(model=Detector().eval(), calibration=randn(8, 3, 6, 6))
    assert plan.provenance["first_last"]["last"] == ["near", "far"]
    assert str(plan.schemes["near"]) == str(plan.schemes["far"]) == "w8a8"
    assert str(plan.schemes["more"]) in ("w2a8", "w3a8")


def test_weights_alone_with_an_example_to_find_the_layers() -> None:
    options: dict[str, Any] = {"first_last": "8 bits", "schemes": ["w3", "w4"], "progress": False}
    plan = quantkit.quantize(small(), "9 bits", example_inputs=images(2), **options).plan
    assert str(plan.schemes["stem.0"]) == str(plan.schemes["head"]) == "w8"
    assert str(plan.schemes["conv"]) in ("w3", "w4")
    with pytest.raises(QuantkitError, match=r"^first_last='8 bits' has to know .* pass calibration or example_inputs"):
        quantkit.quantize(small(), "9 bits", **options)


def test_it_is_saved_with_the_plan_and_given_plans_name_the_layers_too(tmp_path: Path) -> None:
    result = quantkit.quantize(small(), "8 bits", images(), schemes=NARROW, first_last="8 bits", progress=False)
    result.save(tmp_path)
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["provenance"]["first_last"]["policy"] == "8 bits"
    given = quantkit.apply(small(), {"head": "w4a8"}, images(), progress=False).plan
    assert given.provenance["first_last"] == {"policy": "as given", "first": ["stem.0"], "last": ["head"]}


def test_every_plan_of_a_front_says_it() -> None:
    profile = quantkit.profile(small(), images(), schemes=NARROW, first_last="8 bits", progress=False)
    front = quantkit.pareto(profile)
    assert len(front) > 1
    assert all(plan.provenance["first_last"]["policy"] == "8 bits" for plan in front)


def test_in_a_recipe(tmp_path: Path) -> None:
    path = rewritten(write_tiny(tmp_path), first_last="8 bits", output=str(tmp_path / "out"))
    measured, _ = profile_recipe(read_recipe(path), None, progress=False)
    assert measured.candidates["head"] == ("w8a8",)
    wrong = read_recipe(rewritten(path, first_last="8 bit"))
    with pytest.raises(QuantkitError, match=r"first_last: Unknown first_last '8 bit'; known: same, 8 bits"):
        profile_recipe(wrong, None, progress=False)
