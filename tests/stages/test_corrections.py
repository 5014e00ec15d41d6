"""Corrections move no code, match the statistics they say they match, and stay only where they help."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch

import quantkit
from quantkit import Result
from quantkit.errors import InvalidRequest
from quantkit.program.segments import whole
from quantkit.reconstruction.corrections import best_factor, head_of, match_outputs, output_spread
from quantkit.reconstruction.learning import LearningOptions, Schedule
from quantkit.reconstruction.snapshot import Snapshot
from quantkit.rounding.in_sequence import round_in_sequence
from quantkit.rounding.request import RoundingRequest
from quantkit.sensitivity.damage import KLDamage
from quantkit.simulation.model import SimulatedModel
from quantkit.simulation.playback import SimulatedProgram
from quantkit.targets import Target
from quantkit.transforms.prepare import prepare
from tests.program.replays import program_of
from tests.stages.networks import images, small
from tests.stages.schedules import apply_with
from tests.stages.test_reconstruct import SMALL, damage, digits, layers

SHORT = LearningOptions(network=Schedule(steps=8, batch=32), tuning=Schedule(steps=40, batch=32, bias_rate=1e-2))
apply = partial(apply_with, SHORT)


@cache
def applied(correction: str | None, scheme: str = "w2a8") -> Result:
    model, seen, _ = digits()
    plan = dict.fromkeys(layers(), scheme)
    return apply(model, plan, seen, reconstruction="none", correction=correction, progress=False)


@pytest.mark.parametrize("correction", ["norm", "bias", "tuning", "auto"])
def test_codes_stay_and_the_damage_on_unseen_inputs_falls(correction: str) -> None:
    plain, corrected = applied(None), applied(correction)
    assert all(torch.equal(w.codes, corrected.quantized.weights[n].codes) for n, w in plain.quantized.weights.items())
    assert corrected.plan.size_bytes == plain.plan.size_bytes
    notes = corrected.notes["correction"]
    assert list(notes) == (["norm", "bias", "tuning"] if correction == "auto" else [correction])
    assert all(step.after <= step.before for step in notes.values())
    if any(step.helped for step in notes.values()):
        assert damage(corrected) < damage(plain)
    assert any(step.helped for step in applied("auto").notes["correction"].values())


@pytest.mark.parametrize("deviations", [False, True], ids=["bias", "norm"])
def test_every_channel_gets_its_statistics_back(deviations: bool) -> None:
    x = images(40)
    ready = prepare(small(), [((x,), {})], Target.load("onnxruntime-cpu"))
    program = program_of(ready.model, ((x[:16],), {}), ((x[16:32],), {}))
    assert program is not None
    float_state = {name: tensor.clone() for name, tensor in program.state_of(ready.model).items()}
    simulated = SimulatedModel(ready.model, (), {}, {})
    formats = {name: quantkit.Scheme.parse("w2").weight for name in ready.quantizable}
    round_in_sequence(simulated, ready.program, [((x,), {})], RoundingRequest(formats, "nearest", progress=False))
    codes = {name: weight.codes.clone() for name, weight in simulated.weights.items()}
    runner, floats = (
        SimulatedProgram(simulated, program),
        SimulatedProgram(SimulatedModel(ready.model, (), {}, {}), program, fixed=float_state),
    )
    blocks = [replace(whole(program), layers=tuple(ready.quantizable))]
    inputs = program.entering(ready.model, ((x,), {}))
    match_outputs(runner, floats, blocks, [inputs], deviations)
    for name in ready.quantizable:
        wanted = output_spread(floats, blocks[0], name, [inputs])
        found = output_spread(runner, blocks[0], name, [inputs])
        torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-4, atol=1e-5)
        ratio = found.deviation / wanted.deviation
        if deviations:  # but for channels that rounding made too flat or too steep to trust
            assert float((ratio - 1).abs().median()) < 1e-4
        assert torch.equal(simulated.weights[name].codes, codes[name])


def test_what_was_kept_is_put_back() -> None:
    model = applied.__wrapped__(None).quantized
    kept, before = Snapshot.of(model), {name: t.clone() for name, t in model.model.state_dict().items()}
    for name, weight in list(model.weights.items()):
        model.set_weight(name, type(weight)(weight.codes, 2 * weight.scale, weight.zero_point, weight.format))
        model.model.get_submodule(name).bias.data.add_(1)
    kept.put_back(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())


def test_nothing_is_corrected_after_learning_unless_asked() -> None:
    found = [
        apply(small(), dict.fromkeys(SMALL, "w2a8"), images(64), correction=how, progress=False).notes
        for how in ("auto", "bias")
    ]
    assert ["correction" in notes for notes in found] == [False, True]


def test_an_unknown_correction_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^Unknown correction 'all'; known: auto, none, bias, norm, tuning"):
        apply(small(), {"head": "w2a8"}, images(), correction="all", progress=False)


def test_confidence_scales_the_logits_and_nothing_else() -> None:
    plain, corrected = applied(None), applied("confidence")
    x = digits()[2][:64]
    with torch.no_grad():
        before, after = plain.model(x), corrected.model(x)
    factor = float(after.norm() / before.norm())
    torch.testing.assert_close(after, factor * before, rtol=1e-3, atol=1e-3)
    step = corrected.notes["correction"]["confidence"]
    assert step.helped == (abs(factor - 1) > 0.01)


@pytest.mark.parametrize("truth", [0.7, 1.0, 1.3])
def test_best_factor_undoes_logits_that_are_too_large_or_too_small(truth: float) -> None:
    wanted = 3 * torch.randn(400, 10, generator=torch.Generator().manual_seed(0))

    def damage(factor: float) -> float:
        return float(KLDamage().rows(wanted, factor * wanted / truth).mean())

    assert best_factor(damage) == pytest.approx(truth, abs=0.011)


def test_head_is_the_layer_that_makes_the_output() -> None:
    x = images(40)
    behind = (torch.nn.ReLU(), torch.nn.ReLU(inplace=True))  # the latter's output is the tensor the head made
    for model, name in ((small(), "head"), *((torch.nn.Sequential(small(), act), None) for act in behind)):
        ready = prepare(model, [((x,), {})], Target.load("onnxruntime-cpu"))
        program = program_of(ready.model, ((x[:16],), {}), ((x[16:32],), {}))
        assert program is not None
        simulated = SimulatedModel(ready.model, (), {}, {})
        formats = {n: quantkit.Scheme.parse("w4").weight for n in ready.quantizable}
        round_in_sequence(simulated, ready.program, [((x,), {})], RoundingRequest(formats, "nearest", progress=False))
        assert head_of(SimulatedProgram(simulated, program)) == name
