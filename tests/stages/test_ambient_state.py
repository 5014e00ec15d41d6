"""What torch is set to around a call changes neither plan nor codes, and is found as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit import Result
from quantkit.reconstruction.learning import LearningOptions, Schedule
from tests.program.architectures import ARCHITECTURES
from tests.stages.networks import images, small
from tests.stages.schedules import apply_with, quantize_with

SHORT = LearningOptions(network=Schedule(steps=6, batch=32, code_rate=3e-4), block=Schedule(steps=4, batch=32))
ENOUGH, FEW = 64, 8  # samples to learn from, and where nothing is learned


@contextmanager
def _set(get: Callable[[], Any], put: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
        assert get() == value, "changed inside"
    finally:
        put(before)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64 by default": lambda: _set(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "bfloat16 by default": lambda: _set(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "meta by default": lambda: torch.device("meta"),
    "deterministic": lambda: _set(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "two threads": lambda: _set(torch.get_num_threads, torch.set_num_threads, 2),
    "another seed": lambda: _seeded(1234),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
}


def cnn(samples: int = ENOUGH) -> tuple[nn.Module, Any]:
    return small(), images(samples)


def decoder(samples: int = ENOUGH) -> tuple[nn.Module, Any]:
    entry = ARCHITECTURES["llama"]
    return entry.build(), entry.batch(samples)[1]


BUILD = {"cnn": cnn, "decoder": decoder}


def call(kind: str, setting: Callable[[], AbstractContextManager[Any]] = nullcontext, learned: bool = True) -> Result:
    """3 bits for a small CNN, learning included; w3a8 for the linear layers of a decoder."""
    model, samples = BUILD[kind](ENOUGH if learned else FEW)
    how: dict[str, Any] = {} if learned else {"reconstruction": "none", "correction": None}
    with setting():
        if kind == "cnn":
            return quantize_with(SHORT, model, "3 bits", samples, **how)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return apply_with(SHORT, model, dict.fromkeys(linear, "w3a8"), samples, **how)


@cache
def plain(kind: str, learned: bool = True) -> Result:
    return call(kind, learned=learned)


def tensors(result: Result) -> dict[str, Tensor]:
    """All that was decided: codes, scales, ranges, biases and whatever else the model holds."""
    state = result.simulated()
    found = {f"{name}.codes": weight.codes for name, weight in state.weights.items()}
    found |= {f"{name}.scale": weight.scale for name, weight in state.weights.items()}
    return found | dict(state.model.state_dict())


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("setting", SETTINGS)
def test_plan_and_codes_are_those_of_a_plain_call(kind: str, setting: str) -> None:
    # the order of torch's own sums follows the number of threads: learning would carry the last digit far
    learned = exact = setting != "two threads"
    wanted = plain(kind, learned)
    found = call(kind, SETTINGS[setting], learned)
    model, samples = small(), images(8)
    with SETTINGS[setting]():
        quantkit.apply(model, {"head": "w8a8"}, samples, reconstruction="none", correction=None, progress=False)
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert grad == (setting not in ("inference mode", "no gradients"))
        assert inference == (setting == "inference mode")
        assert torch.is_autocast_enabled("cpu") == (setting == "autocast")

    assert found.plan.digest() == wanted.plan.digest()
    expected = tensors(wanted)
    assert tensors(found).keys() == expected.keys()
    for name, tensor in tensors(found).items():
        assert tensor.dtype == expected[name].dtype, name
        if exact or name.endswith(".codes"):
            assert torch.equal(tensor, expected[name]), name
        else:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert not exact or found.simulated().ranges == wanted.simulated().ranges
    assert not exact or found.metrics == wanted.metrics


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("real", [False, True], ids=["simulated", "real"])
def test_quantized_models_compute_the_same(kind: str, setting: str, real: bool) -> None:
    result = plain(kind).to_real() if real else plain(kind)
    _, samples = BUILD[kind]()

    def outputs() -> Tensor:
        return result.model(**samples).logits if isinstance(samples, dict) else result.model(samples)

    wanted = outputs()
    with SETTINGS[setting]():
        found = outputs()
    assert torch.equal(found, wanted)
