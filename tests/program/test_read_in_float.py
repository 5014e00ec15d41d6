"""Tensors made in float that others than layers read too: layers take their codes, the others their values."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantkit
from quantkit.plan.operations import execute
from quantkit.program.intercept import READ, OpKey, read_place
from quantkit.program.operations import operations_of
from quantkit.program.segments import whole
from quantkit.program.sites import sites_by_maker
from quantkit.reconstruction.blocks import FloatReference, begin
from quantkit.simulation.playback import SimulatedProgram
from quantkit.targets import Target
from quantkit.transforms.prepare import prepare
from tests.program.models import Net, randn

TARGET = Target.load("onnxruntime-cpu")
X = randn(16, 5, 8)


def post_norm() -> nn.Module:
    """Two residual sums of what norms make, as in BERT: a norm is read by layers and by the next sum."""

    def forward(self, x):
        y = self.first(x)
        z = self.second(y + self.value(F.gelu(self.query(y)) * self.key(y)))
        return self.head(self.third(z + self.down(F.gelu(self.up(z)))))

    torch.manual_seed(1)
    parts = {name: nn.Linear(8, 8) for name in ("query", "key", "value", "up", "down", "head")}
    return Net(forward, first=nn.LayerNorm(8), second=nn.LayerNorm(8), third=nn.LayerNorm(8), **parts).eval()


def returned() -> nn.Module:
    """A hidden state that is an output, too, and read by a layer behind a reshape."""

    def forward(self, x):
        y = self.norm(x)
        return self.head(y.flatten(1)), y

    return Net(forward, norm=nn.LayerNorm(8), head=nn.Linear(40, 4)).eval()


def gated() -> nn.Module:
    """An activation that runs in float, read by convolutions and by a mean that gates them."""

    def forward(self, x):
        y = F.silu(self.stem(x))
        return self.left(y) * y.mean((2, 3), keepdim=True) + self.right(y)

    return Net(forward, stem=nn.Conv2d(3, 4, 3), left=nn.Conv2d(4, 4, 1), right=nn.Conv2d(4, 4, 1)).eval()


NETWORKS = {
    "post-norm": (post_norm, X, {"first": ["query", "key"], "second": ["up"]}),
    "returned": (returned, X, {"norm": ["head"]}),
    "gated": (gated, randn(16, 3, 8, 8), {"/silu": ["left", "right"]}),
}


def quantized(name: str) -> quantkit.Result:
    build, x, _ = NETWORKS[name]
    return quantkit.quantize(build(), "w8a8", x, rules={"*": "w8a8"}, correction=None, progress=False)


@pytest.mark.parametrize("name", NETWORKS)
def test_codes_are_made_where_layers_read(name: str) -> None:
    build, x, expected = NETWORKS[name]
    ready = prepare(build(), [((x,), {})], TARGET)
    found = {site.name: site for site in ready.sites if site.place.output == READ}
    assert {name: list(site.consumers) for name, site in found.items()} == expected
    for site in found.values():
        calls = [call.key for consumer in site.consumers for call in ready.program.calls[consumer]]
        assert set(site.places) == set(map(read_place, calls)) and site.echoes == ()
    assert all(place.output >= 0 for place in sites_by_maker(ready.program, ready.sites))


def test_what_layers_alone_read_is_quantized_where_it_is_made() -> None:
    def forward(self, x):
        y = self.norm(x)
        return self.a(y) + self.b(y)

    ready = prepare(Net(forward, norm=nn.LayerNorm(8), a=nn.Linear(8, 4), b=nn.Linear(8, 4)), [((X,), {})], TARGET)
    assert {site.name: str(site.place) for site in ready.sites}["norm"] == "norm/layer_norm"


def test_the_sums_add_values_and_the_layers_read_codes() -> None:
    """By hand: the network with its ranges, layer by layer."""
    result = quantized("post-norm")
    model, ranges = result.simulated().model, result.simulated().ranges

    def codes(site: str, x: torch.Tensor) -> torch.Tensor:
        return ranges[site].fake_quantize(x)

    with torch.no_grad():
        y = model.first(X)
        read = codes("first", y)
        z = model.second(y + model.value(codes("/mul", F.gelu(model.query(read)) * model.key(read))))
        inner = F.gelu(model.up(codes("second", z)))
        wanted = model.head(codes("third", model.third(z + model.down(codes("/gelu.1", inner)))))
        assert torch.equal(result.model(X), wanted)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_has_the_same_codes_once(name: str, tmp_path: Path) -> None:
    result, expected = quantized(name), NETWORKS[name][-1]
    report = result.export_onnx(tmp_path / "model.onnx")
    assert max(one.relative_error for one in report.parity if not one.optimized) < 1e-5
    nodes = onnx.load(report.path).graph.node
    for site in expected:
        assert sum(node.op_type == "QuantizeLinear" and site in node.name for node in nodes) == 1, site


def test_they_are_saved_and_loaded(tmp_path: Path) -> None:
    result = quantized("post-norm")
    result.save(tmp_path / "saved")
    loaded = quantkit.load(tmp_path / "saved", post_norm())
    assert loaded.simulated().sites == result.simulated().sites
    assert torch.equal(loaded.model(X), result.model(X))
    assert torch.allclose(result.to_real().model(X), result.model(X), atol=1e-5)


def test_bookkeeping_has_one_conversion_and_no_way_back() -> None:
    build, x, _ = NETWORKS["post-norm"]
    ready = prepare(build(), [((x,), {})], TARGET)
    operations = operations_of(ready.program, ready.sites, TARGET)
    made = {site: op.name for op in operations if op.kind == "float" for site in op.writes}
    assert made["first"] == "first/layer_norm"
    done = execute(operations, ready.quantizable)
    assert {"first", "second"} <= done.quantized and not {"first", "second"} & done.dequantized


def test_blocks_learn_the_ranges_that_they_read() -> None:
    """In a block that has all calls that read a tensor; in one that has some, its range stays as it is."""
    result = quantkit.quantize(post_norm(), "w4a4", X, rules={"*": "w4a4"}, progress=False)
    simulated = result.simulated()
    program = prepare(post_norm(), [((X,), {})], TARGET).program
    layers = {name: simulated.floats[name].detach().clone() for name in simulated.weights}
    spread = {name: torch.ones(len(weight)) for name, weight in layers.items()}
    reference = FloatReference({}, layers, spread, torch.sub, torch.sub, lambda x, _: x.sum())

    everything = SimulatedProgram(simulated, program)
    begin(everything, reference, (), whole(program))
    assert {"first", "second", "third"} <= set(everything.ranges)

    between = next(i for i, step in enumerate(program.steps) if step.key.scope == "key")
    part = SimulatedProgram(simulated, program)
    begin(part, reference, (), whole(program).until(between, program.steps[between].inputs[0]))
    assert not {"first", "second", "third"} & set(part.ranges)


def test_a_read_place_names_its_call() -> None:
    assert read_place(OpKey("query", "linear")).output == READ
