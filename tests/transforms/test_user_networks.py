"""Networks as users write them: prepared, they compute the same, and every quantized layer reads codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit.errors import InvalidRequest
from quantkit.program.inputs import Batch
from quantkit.program.intercept import OpKey, own_inputs
from quantkit.program.outputs import results_of
from quantkit.ranges.activations import minmax_range
from quantkit.ranges.statistics import site_histograms
from quantkit.simulation.model import SimulatedModel
from quantkit.targets import Target
from quantkit.transforms.prepare import Prepared, prepare
from tests.program.models import settled
from tests.program.oddities import ZOO

TARGET = Target.load("onnxruntime-cpu")


def outputs_of(model: nn.Module, batch: Batch, grad: bool = False) -> list[Tensor]:
    args, kwargs = own_inputs(*batch)
    with torch.set_grad_enabled(grad):
        return [t.detach().clone() for t in results_of(model(*args, **kwargs))]


@dataclass(frozen=True)
class Case:
    """A network of the zoo, prepared; what it returned before; and simulated with all its sites quantized."""

    model: nn.Module
    batch: Batch
    floats: dict[str, str]
    before: list[Tensor]
    state: dict[str, Tensor]
    ready: Prepared
    prepared_outputs: list[Tensor]
    quantized: SimulatedModel


@pytest.fixture(params=ZOO, scope="module")
def case(request) -> Case:
    torch.manual_seed(0)
    model, batch = ZOO[request.param].build()
    model = settled(model)
    before, state = outputs_of(model, batch), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ready = prepare(model, [batch], TARGET)
    found = outputs_of(ready.model, batch)
    histograms = site_histograms(ready.model, ready.sites, [batch], False)
    ranges = {name: minmax_range(histogram, 8) for name, histogram in histograms.items()}
    quantized = SimulatedModel(ready.model, ready.sites, {}, ranges)
    return Case(model, batch, ZOO[request.param].floats, before, state, ready, found, quantized)


def test_prepared_network_computes_the_same_and_the_users_is_untouched(case: Case) -> None:
    for found, expected in zip(case.prepared_outputs, case.before, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, case.state[name]) for name, tensor in case.model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(case.model, case.batch), case.before, strict=True))


def test_layers_that_stay_float_say_why(case: Case) -> None:
    layers = case.ready.layers
    assert {name for name, layer in layers.items() if layer.reason} == set(case.floats)
    for name, reason in case.floats.items():
        assert reason in layers[name].reason
    assert all(bool(layer.inputs) != layer.weight_only for layer in layers.values() if not layer.reason)


def test_every_call_of_a_quantized_layer_reads_the_codes_of_a_site(case: Case) -> None:
    ready = case.ready
    coded = [name for name in ready.quantizable if not ready.layers[name].weight_only]
    calls = {call.key: name for name in coded for call in ready.program.calls[name]}
    read = set()

    def before(key: OpKey, args: Any, kwargs: Any) -> None:
        if key in calls:
            x = args[0] if args else kwargs["input"]
            ranges = [case.quantized.ranges[site] for site in ready.layers[calls[key]].inputs]
            assert any(torch.allclose(r.fake_quantize(x), x, rtol=0, atol=1e-6) for r in ranges), key
            read.add(key)

    with torch.no_grad():
        case.quantized.run(*case.batch, before=before)
    assert read == set(calls)


def test_simulation_computes_the_same_with_and_without_gradients(case: Case) -> None:
    with_gradients = outputs_of(case.quantized, case.batch, grad=True)
    for found, expected in zip(with_gradients, outputs_of(case.quantized, case.batch), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.jit.script(nn.Sequential(nn.Linear(6, 2))), r"went through torch\.jit, which hides its layers"),
        (nn.Sequential(nn.LazyLinear(2)), r"no values yet: 0\.weight, 0\.bias\. Run the model on a batch once"),
        (nn.Sequential(nn.Linear(6, 2, device="meta")), r"no values yet: 0\.weight, 0\.bias"),
    ],
)
def test_network_that_cannot_be_looked_into_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        prepare(model, [((torch.ones(4, 6),), {})], TARGET)


def test_network_of_complex_numbers_has_no_layer_to_quantize() -> None:
    model, x = nn.Sequential(nn.Linear(6, 2, dtype=torch.complex64)), torch.ones(4, 6, dtype=torch.complex64)
    with pytest.raises(InvalidRequest, match=r"no layer to quantize \(it has none of the known layers\)"):
        prepare(model, [((x,), {})], TARGET)


def test_compiled_network_is_refused() -> None:
    with pytest.raises(
        InvalidRequest, match=r"went through torch\.compile, which hides its layers\. Pass the model as"
    ):
        prepare(torch.compile(nn.Sequential(nn.Linear(6, 2))), [((torch.ones(4, 6),), {})], TARGET)  # type: ignore[arg-type]


def test_network_that_cannot_be_copied_is_refused() -> None:
    class Unique(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("there is only one")

    batch: Batch = ((torch.ones(4, 6),), {})
    with pytest.raises(InvalidRequest, match=r"cannot be copied: TypeError: there is only one\. Remove what"):
        prepare(nn.Sequential(Unique(6, 2)), [batch], TARGET)
