"""Learning after rounding lowers the damage on inputs nobody learned from, repeats itself, and says what it did."""

from __future__ import annotations

from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quantkit import QuantkitError, Result
from quantkit.reconstruction.learning import LearningOptions, Schedule
from quantkit.sensitivity.damage import kl_rows
from quantkit.stages import reconstruct
from tests.stages.networks import images, small
from tests.stages.schedules import apply_with

DIGITS = import_module("recipes.models.digits_cnn")
FOLDER = Path(__file__).resolve().parents[2] / "calibration"
SMALL = ("stem.0", "conv", "mix", "head")


@cache
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """The trained network for digits, a few calibration inputs, and unseen ones."""
    model = DIGITS.build()
    model.load_state_dict(load_file(FOLDER / "digits_cnn.safetensors"))
    data = np.load(FOLDER / "digits.npz")
    seen, unseen = (DIGITS.preprocess(data["images"][data[part]]) for part in ("calibration", "evaluation"))
    return model, seen[:192], unseen[:300]


SHORT = LearningOptions(
    network=Schedule(steps=150, batch=32, code_rate=3e-4),
    block=Schedule(steps=24, batch=32),
    layer=Schedule(steps=40, batch=32, checks=10),
)
apply = partial(apply_with, SHORT)


def layers() -> list[str]:
    return [name for name, module in digits()[0].named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


@cache
def applied(how: str, scheme: str, seed: int = 0) -> Result:
    model, seen, _ = digits()
    plan = dict.fromkeys(layers(), scheme)
    return apply(model, plan, seen, reconstruction=how, correction=None, seed=seed, progress=False)


def damage(result: Result) -> float:
    """KL to the float network on unseen inputs."""
    model, _, unseen = digits()
    with torch.no_grad():
        return float(kl_rows(model(unseen).log_softmax(-1), result.model(unseen).log_softmax(-1)).mean())


@pytest.mark.parametrize("how", ["network", "block"])
@pytest.mark.parametrize("scheme", ["w2a8", "w2a4"])
def test_learning_lowers_the_damage_on_unseen_inputs(how: str, scheme: str) -> None:
    result = applied(how, scheme)
    assert damage(result) < 0.8 * damage(applied("none", scheme))
    learned = result.notes["reconstruction"]
    assert learned["network"].helped
    assert len(learned) == (3 if how == "block" else 1)


@pytest.mark.parametrize(("how", "scheme"), [("adaquant", "w2a8"), ("adaquant-parallel", "w3a4")])
def test_learning_layer_by_layer_lowers_the_damage_of_rounding_to_nearest(how: str, scheme: str) -> None:
    model, seen, _ = digits()
    plan = dict.fromkeys(layers(), scheme)
    options: dict[str, Any] = {"rounding": "nearest", "progress": False}
    nearest = apply(model, plan, seen, reconstruction="none", correction=None, **options)
    learned = apply(model, plan, seen, reconstruction=how, correction=None, **options)
    assert damage(learned) < 0.8 * damage(nearest)
    assert set(learned.notes["reconstruction"]) == {*layers(), "network"}
    corrected = apply(model, plan, seen, reconstruction=how, **options)
    assert set(corrected.notes["correction"]) == {"norm", "bias", "tuning"}


def test_each_block_is_no_worse_on_held_back_inputs() -> None:
    learned = applied("block", "w2a8").notes["reconstruction"]
    assert all(step.after <= step.before for step in learned.values())
    assert any(step.helped for name, step in learned.items() if name != "network")


def test_the_network_moves_scales_and_biases_but_no_code_behind_learned_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = []
    learn = reconstruct.learn_network

    def watched(runner, *rest, **options):
        before = dict(runner.model.weights)
        found = learn(runner, *rest, **options)
        steps.append((before, dict(runner.model.weights)))
        return found

    monkeypatch.setattr(reconstruct, "learn_network", watched)
    result = applied.__wrapped__("block", "w2a8")
    ((before, after),) = steps
    assert result.notes["reconstruction"]["network"].helped
    assert all(torch.equal(w.codes, after[n].codes) for n, w in before.items())
    assert any(not torch.equal(w.scale, after[n].scale) for n, w in before.items())


@pytest.mark.parametrize("moving", [True, False])
def test_images_are_learned_from_as_the_network_could_have_seen_them(
    moving: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Digits may be moved by a pixel, but not mirrored; a network that looks at single pixels allows neither."""
    model, seen, _ = digits()
    still = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        still[1].weight.mul_(20)
    caplog.set_level("INFO", logger="quantkit")
    plan = dict.fromkeys(layers(), "w4a8") if moving else {"1": "w4a8"}
    apply(model if moving else still, plan, seen, reconstruction="network", progress=False)
    said = [r.message for r in caplog.records if "learning from images" in r.message]
    assert (["shifted" in text and "mirrored" not in text for text in said] == [True]) is moving


def test_it_repeats_itself_and_other_seeds_differ() -> None:
    one, other = applied("network", "w2a8").quantized, applied("network", "w2a8", seed=1).quantized
    again = applied.__wrapped__("network", "w2a8").quantized
    assert all(torch.equal(w.codes, again.weights[n].codes) for n, w in one.weights.items())
    assert all(torch.equal(w.scale, again.weights[n].scale) for n, w in one.weights.items())
    assert any(not torch.equal(w.codes, other.weights[n].codes) for n, w in one.weights.items())


def test_bytes_and_formats_stay_those_of_the_plan() -> None:
    plan = dict(zip(SMALL, ("w8a8", "w3a4", "w2a6", "w5a8"), strict=True))
    rounded, learned = (
        apply(small(), plan, images(96), reconstruction=how, correction=None, progress=False)
        for how in ("none", "network")
    )
    assert learned.plan.size_bytes == rounded.plan.size_bytes
    for name, weight in learned.quantized.weights.items():
        low, high = weight.format.code_range
        assert str(weight.format) == plan[name].split("a")[0]
        assert low <= int(weight.codes.min()) and int(weight.codes.max()) <= high
        assert torch.equal(learned.quantized.model.get_submodule(name).weight, weight.dequantize())
    kinds = [{s: (r.bits, r.zero_point) for s, r in result.quantized.ranges.items()} for result in (rounded, learned)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize(("scheme", "count", "learns"), [("w6a8", 96, 0), ("w2a8", 63, 0), ("w2a8", 64, 1)])
def test_auto_learns_only_where_it_is_worth_it(scheme: str, count: int, learns: bool) -> None:
    result = apply(small(), dict.fromkeys(SMALL, scheme), images(count), progress=False)
    assert ("reconstruction" in result.notes) == learns


def test_too_few_samples_are_refused_when_asked_to_be_learned_from() -> None:
    refused = r"reconstruction='network' cannot learn this model: .*3 samples are too few.*'none'"
    with pytest.raises(QuantkitError, match=refused):
        apply(small(), {"head": "w2a8"}, images(3), reconstruction="network", progress=False)


def test_images_of_two_sizes_are_learned_from_together() -> None:
    calibration = [images(40), torch.randn(40, 2, 8, 8, generator=torch.Generator().manual_seed(1))]
    result = apply(small(), dict.fromkeys(SMALL, "w2"), calibration, reconstruction="network", progress=False)
    assert result.notes["reconstruction"]["network"].helped


@pytest.mark.parametrize(
    "how, weight_bits, site_bits, positions, way",
    [
        ("auto", [3, 8], [8], False, "block"),
        ("auto", [4, 8], [8], False, "network"),
        ("auto", [8], [8, 4], False, "block"),
        ("auto", [4], [], False, "network"),
        ("network", [2], [4], False, "network"),
        ("block", [8], [8], False, "block"),
        ("auto", [4], [], True, "block"),
        ("network", [4], [], True, "network"),
    ],
)
def test_auto_learns_blocks_first_where_codes_are_narrowest_or_outputs_have_positions(
    how: str, weight_bits: list[int], site_bits: list[int], positions: bool, way: str
) -> None:
    assert reconstruct.method_to_learn(how, weight_bits, site_bits, positions) == way
