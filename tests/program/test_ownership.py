"""Every number that a model stores has one owner, nearly all weights are quantizable, and quantizing all of them
works.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.formats import WeightFormat
from quantkit.program.ownership import FLOAT, LAYER, OTHER, UNREAD, Owned, ownership
from quantkit.program.record import record
from quantkit.program.updates import restored
from quantkit.rounding.weights import quantize_weight
from quantkit.simulation.model import SimulatedModel
from quantkit.targets import Target
from quantkit.transforms.prepare import Prepared, prepare
from tests.program.architectures import ARCHITECTURES, Architecture, float_elements
from tests.program.models import randn

# Tables of position biases that small networks compute from coordinates alone, and experts of which copies are read.
PARTLY = {"torchvision_swin_v2": 0.95, "experts_gathered": 0.5}
EVERY_KIND = (
    *(f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)),
    *("linear", "matmul", "embedding", "embedding_bag", "recurrent"),
)
W8 = WeightFormat("8")
TAKEN = [name for name in ARCHITECTURES if name != "list_of_images"]  # refused: its samples are no first axis


def all_kinds() -> Target:
    return replace(Target.load("onnxruntime-cpu"), layers=EVERY_KIND)


def prepared(entry: Architecture) -> Prepared:
    return prepare(entry.build(), [entry.batch(2)], all_kinds())


def stored_bytes(model: nn.Module) -> int:
    """The slow twin: all places in memory, each byte once."""
    return len({x.data_ptr() + i for x in [*model.parameters(), *model.buffers()] for i in range(x.nbytes)})


def owned_when_ready(ready: Prepared) -> list[Owned]:
    return ownership(ready.model, ready.program, {name: layer.reason for name, layer in ready.layers.items()})


def share_of_layers(model: nn.Module, owned: list[Owned], entry: Architecture) -> float:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    of_layers = sum(part.elements for part in owned if part.owner == LAYER and part.name in parameters)
    return of_layers / float_elements(model, entry.added_tables)


@pytest.mark.parametrize("name", TAKEN)
def test_owners_share_the_bytes_of_the_model(name: str) -> None:
    entry = ARCHITECTURES[name]
    model = entry.build()
    owned = ownership(model, record(model, entry.batch(2)))
    assert sum(part.bytes for part in owned) == stored_bytes(model)
    for part in owned:
        assert part.elements > 0
        assert bool(part.reason) == (part.owner == FLOAT)
        assert part.owner in (LAYER, FLOAT, OTHER)
        assert part.layer or part.owner != LAYER

    ready = prepared(entry)
    owned = owned_when_ready(ready)
    assert sum(part.bytes for part in owned) == stored_bytes(ready.model)
    assert {part.layer for part in owned if part.owner == LAYER} == set(ready.quantizable)


@pytest.mark.parametrize("name", TAKEN)
def test_nearly_all_weights_are_quantizable(name: str) -> None:
    entry = ARCHITECTURES[name]
    model = entry.build()
    owned = ownership(model, record(model, entry.batch(2)))
    assert share_of_layers(model, owned, entry) >= PARTLY.get(name, 0.99)
    ready = prepared(entry)
    assert share_of_layers(ready.model, owned_when_ready(ready), entry) >= PARTLY.get(name, 0.99)


@pytest.mark.parametrize("name", TAKEN)
def test_tables_that_are_only_added_say_so(name: str) -> None:
    entry = ARCHITECTURES[name]
    model = entry.build()
    owned = {part.name: part for part in ownership(model, record(model, entry.batch(2)))}
    for table in entry.added_tables:
        assert owned[table].owner == FLOAT
        assert "element by element" in owned[table].reason


def outputs_of(model: nn.Module, entry: Architecture) -> list[Tensor]:
    args, kwargs = entry.batch(3, None, 7)
    with torch.no_grad(), restored(model):
        return entry.output(model(*args, **kwargs))


@pytest.mark.parametrize("name", TAKEN)
def test_every_layer_computes_with_eight_bits(name: str) -> None:
    entry = ARCHITECTURES[name]
    ready = prepared(entry)
    wanted = outputs_of(ready.model, entry)
    before = {layer: ready.weights[layer].clone() for layer in ready.quantizable}
    codes = {
        layer: quantize_weight(weight, [W8], groups=1, rounding="nearest").weights[W8]
        for layer, weight in before.items()
    }
    model = SimulatedModel(ready.model, (), codes, {}, ready.weights, ready.program.updated)

    for layer, weight in before.items():
        found = model.floats[layer]
        assert torch.equal(found, codes[layer].dequantize())
        assert not torch.equal(found, weight)
        assert (found - weight).norm() <= 0.02 * weight.norm()
    for found, expected in zip(outputs_of(model, entry), wanted, strict=True):
        assert not torch.equal(found, expected)
        assert (found - expected).norm() <= 0.15 * expected.norm()


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.allclose(one, other, 1e-5, 1e-6) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", [name for name in TAKEN if name != "early_exit"])
def test_every_layer_is_computed_with(name: str) -> None:
    """A layer's weight that is turned round changes what the model gives, and back again restores it."""
    entry = ARCHITECTURES[name]
    ready = prepared(entry)
    model = ready.float_model()
    wanted = outputs_of(model, entry)
    for layer in ready.quantizable:
        before = ready.weights[layer].clone()
        ready.weights.write(layer, -1.5 * before)
        model.weights[layer] = None  # its operand is computed from what was written
        found = outputs_of(model, entry)
        assert not same(found, wanted), layer
        ready.weights.write(layer, before)
        assert same(outputs_of(model, entry), wanted), layer


class Unusual(nn.Module):
    """Parts of parameters, in notations that no network of the zoo has."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(randn(10, 6))
        self.turned = nn.Parameter(randn(6, 4, seed=1))
        self.experts = nn.Parameter(randn(3, 4, 5, seed=2))
        self.tied = nn.Parameter(self.turned.data)
        self.mixed = nn.Parameter(randn(4, 5, seed=4))
        self.gain = nn.Parameter(randn(4, 1, seed=5))
        self.unread = nn.Parameter(randn(2, 2, seed=6))
        self.register_buffer("basis", randn(5, 5, seed=7))
        self.register_buffer("steps", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.packed[:6]) + (x @ self.packed.narrow(0, 6, 4).t()).repeat_interleave(2, -1)[..., 2:]
        x = F.linear(x, self.turned.t()) + torch.einsum("bi,io->bo", x, self.tied)
        picked = self.experts[x.argmax(-1) % 3]
        x = torch.bmm(x.unsqueeze(1), picked).squeeze(1)
        x = x @ torch.fft.fft(self.basis.to(x.dtype)).real
        return F.linear(F.linear(x, self.mixed * self.gain), self.turned[:4].t())


def test_parts_in_other_notations_have_one_owner() -> None:
    model, batch = Unusual().eval(), ((randn(5, 6, seed=9),), {})
    by_name: dict[str, list[Owned]] = {}
    for part in ownership(model, record(model, batch)):
        by_name.setdefault(part.name, []).append(part)
    assert sum(part.bytes for parts in by_name.values() for part in parts) == stored_bytes(model)
    assert [(part.owner, part.elements) for part in by_name["packed"]] == [(LAYER, 36), (LAYER, 24)]
    assert {part.owner for name in ("turned", "experts", "mixed", "gain") for part in by_name[name]} == {LAYER}
    assert [part.reason for part in by_name["unread"]] == [UNREAD]
    assert {by_name[name][0].owner for name in ("basis", "steps")} <= {LAYER, OTHER}
    assert "tied" not in by_name
