"""Where activations are quantized: one site per tensor, where the runtime writes and reads codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quantkit.program.additions import additions_of_no_use
from quantkit.program.inputs import Batch
from quantkit.program.record import record
from quantkit.program.sites import Site, place_sites
from quantkit.targets import Target
from quantkit.transforms.prepare import prepare
from tests.backends.models import ConvTwice, Residual, TwoInputs
from tests.program.models import IMAGE, TOKENS, VECTOR, MobileNetBlock, Net, Shortcuts, conv_bn, randn, settled

TARGET = Target.load("onnxruntime-cpu")


def sites_of(model: nn.Module, batch: Batch, layers: Sequence[str] | None = None) -> dict[str, Site]:
    found = record(model.eval(), batch)
    names = list(found.calls) if layers is None else layers
    placed = place_sites(model, found, TARGET, names, additions_of_no_use(found, TARGET, names))
    assert len({site.name for site in placed}) == len({site.place for site in placed}) == len(placed)
    return {site.name: site for site in placed}


def two_convs(between, **parts: nn.Module) -> nn.Module:
    """A convolution, ``between(self, x)`` and another convolution."""
    return Net(
        lambda self, x: self.two(between(self, self.one(x))), one=nn.Conv2d(3, 4, 3), two=nn.Conv2d(4, 2, 1), **parts
    )


def test_one_site_serves_all_readers_of_a_tensor() -> None:
    def forward(self, x):
        return self.a(x) + self.b(x) + self.c(torch.tanh(x))

    found = sites_of(Net(forward, a=nn.Linear(6, 2), b=nn.Linear(6, 2), c=nn.Linear(6, 2)), VECTOR)
    assert found["input"].consumers == ("a", "b")
    assert found["/tanh"].consumers == ("c",)
    assert found["input"].shape == (6,)


@pytest.mark.parametrize(
    ("activation", "place"),
    [
        (nn.ReLU(), "act"),
        (nn.ReLU(inplace=True), "act"),
        (nn.ReLU6(), "act"),
        (nn.Hardtanh(0, 4), "act"),
        (F.relu, "/relu"),
        (torch.relu_, "/relu"),
        (lambda x: x.clamp(min=0), "/clamp"),
        (lambda x: torch.clip(x, 0, 6), "/clip"),
    ],
)
def test_site_stands_after_the_activation_the_runtime_fuses(activation, place: str) -> None:
    parts = {"act": activation} if isinstance(activation, nn.Module) else {}
    found = sites_of(two_convs(lambda self, x: activation(x), **parts), IMAGE)
    assert list(found) == ["input", place, "two"]
    assert found[place].consumers == ("two",)


@pytest.mark.parametrize("activation", [nn.Hardswish(), nn.SiLU(), nn.GELU(), nn.Sigmoid(), nn.LeakyReLU()])
def test_activation_the_runtime_does_not_fuse_has_sites_on_both_sides(activation) -> None:
    found = sites_of(two_convs(lambda self, x: self.act(x), act=activation), IMAGE)
    assert list(found) == ["input", "one", "act", "two"]
    assert [found[n].consumers for n in ("one", "act")] == [(), ("two",)]


@pytest.mark.parametrize("use", [torch.tanh, lambda y: y > 0, lambda y: y.mean().item()])
def test_activation_is_not_fused_where_its_input_is_read_elsewhere(use) -> None:
    def between(self, y):
        use(y)
        return F.relu(y)

    assert list(sites_of(two_convs(between), IMAGE)) == ["input", "one", "/relu", "two"]


def test_activation_is_not_fused_where_its_input_is_an_output() -> None:
    def forward(self, x):
        y = self.conv(x)
        return F.relu(y), y

    assert list(sites_of(Net(forward, conv=nn.Conv2d(3, 4, 3)), IMAGE)) == ["input", "conv"]


def test_linear_layer_needs_no_site_on_its_output() -> None:
    model = Net(lambda self, x: self.b(F.relu(self.a(x))), a=nn.Linear(6, 6), b=nn.Linear(6, 2))
    assert list(sites_of(model, VECTOR)) == ["input", "/relu"]


def test_residual_sums_have_sites_on_operands_and_result() -> None:
    found = sites_of(settled(Shortcuts()), IMAGE)
    assert list(found) == ["input", "/relu", "conv1", "/add", "conv2", "/relu.1"]
    assert [found[n].consumers for n in found] == [("stem",), ("conv1",), (), ("conv2",), (), ("head",)]
    assert found["/relu.1"].shape == (4, 8, 8)


@pytest.mark.parametrize(
    ("combine", "placed"),
    [
        (lambda y, z: y + z, True),
        (lambda y, z: torch.add(y, other=z), True),
        (lambda y, z: y + z.mean((2, 3), keepdim=True), False),
        (lambda y, z: y + 1.0, False),
        (lambda y, z: y + torch.ones(4, 6, 6), False),
        (lambda y, z: y + torch.ones_like(y[:1]).expand(4, 4, 6, 6), True),
        (lambda y, z: y + torch.ones(y.shape), False),
        (lambda y, z: torch.add(y, z, alpha=2), False),
        (lambda y, z: y * z, False),
        (lambda y, z: y - z, False),
    ],
)
def test_only_sums_of_two_activations_of_one_shape_run_on_codes(combine, placed: bool) -> None:
    def forward(self, x):
        y = self.conv(x)
        return self.read(combine(y, torch.tanh(y)))

    found = sites_of(Net(forward, conv=nn.Conv2d(3, 4, 3), read=nn.Conv2d(4, 4, 1)), IMAGE)
    assert list(found)[:2] == ["input", "conv"]
    assert ("addition operand" in found["conv"].roles) == placed


@pytest.mark.parametrize("use", [lambda self, x: x + self.shift, lambda self, x: x + self.shift.expand_as(x)])
def test_sum_with_a_parameter_is_not_placed(use) -> None:
    model = Net(lambda self, x: self.fc(use(self, self.fc(x))), fc=nn.Linear(8, 8))
    model.shift = nn.Parameter(torch.ones(5, 8))
    for rows in (1, 4):
        assert list(sites_of(model, ((TOKENS[0][0][:rows],), {}))) == ["input", "/add"]


def test_sum_without_any_quantized_neighbour_is_not_placed() -> None:
    model = Net(lambda self, x: self.fc(F.gelu(torch.tanh(x) + torch.sin(x))), fc=nn.Linear(6, 2))
    assert list(sites_of(model, VECTOR)) == ["/gelu"]


@pytest.mark.parametrize(
    ("move", "echo"),
    [
        (lambda x: x[:, :, ::2, ::2], "/getitem"),
        (lambda x: F.pad(x, (1, 1, 1, 1)), "/pad"),
        (lambda x: F.pad(x, (1, 1), "constant", 0.0), "/pad"),
        (lambda x: F.max_pool2d(x, 2), "/max_pool2d"),
        (lambda x: x.flatten(2).unflatten(2, (6, 6)), "/unflatten"),
        (lambda x: x.transpose(2, 3).contiguous(), "/contiguous"),
        (lambda x: x.mT, "/mT"),
        (lambda x: x.clone(), "/clone"),
    ],
)
def test_moved_tensor_echoes_the_site_it_came_from(move, echo: str) -> None:
    found = sites_of(two_convs(lambda self, x: move(F.relu(x))), IMAGE)
    assert list(found) == ["input", "/relu", "two"]
    assert [str(key) for key in found["/relu"].echoes] == [echo]
    assert found["/relu"].consumers == ("two",)
    assert found["/relu"].shape == (4, 6, 6)


@pytest.mark.parametrize(
    ("operation", "place"),
    [
        (lambda x: F.pad(x, (1, 1), value=1.0), "/pad"),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "/pad"),
        (lambda x: F.avg_pool2d(x, 2), "/avg_pool2d"),
        (lambda x: F.interpolate(x, scale_factor=2), "/interpolate"),
        (lambda x: torch.cat([x[:, :2], x[:, 2:]], 1), "/cat"),
        (lambda x: F.dropout(x, 0.5, training=True), "/dropout"),
    ],
)
def test_tensor_with_other_values_has_a_site_of_its_own(operation, place: str) -> None:
    found = sites_of(two_convs(lambda self, x: operation(F.relu(x))), IMAGE)
    assert list(found) == ["input", "/relu", place, "two"]
    assert found["/relu"].echoes == ()


def test_parts_of_one_tensor_echo_it_one_by_one() -> None:
    def forward(self, x):
        left, right = torch.relu(x).chunk(2, 1)
        return self.a(left) + self.b(right)

    found = sites_of(Net(forward, a=nn.Linear(3, 2), b=nn.Linear(3, 2)), VECTOR)
    assert [str(key) for key in found["/relu"].echoes] == ["/chunk", "/chunk[1]"]
    assert found["/relu"].consumers == ("a", "b")


def test_unfolded_batch_norm_between_keeps_both_of_its_sides() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    found = sites_of(settled(model), IMAGE)
    assert list(found) == ["input", "0", "2", "3"]


def test_inputs_are_named_by_their_position_among_the_tensors() -> None:
    model = Net(lambda self, ids, x, y: self.a(x) + self.b(y), a=nn.Linear(6, 2), b=nn.Linear(6, 2))
    found = sites_of(model, ((torch.arange(4), randn(4, 6), randn(4, 6)), {}))
    assert {name: site.consumers for name, site in found.items()} == {"input.1": ("a",), "input.2": ("b",)}


def test_names_stay_apart_where_a_module_is_called_input() -> None:
    model = Net(lambda self, x: self.output(self.input(x)), input=nn.Conv2d(3, 4, 3), output=nn.Conv2d(4, 2, 3))
    assert list(sites_of(model, IMAGE)) == ["input", "input/conv2d", "output"]


def test_names_stay_apart_where_a_leaf_module_computes_in_steps() -> None:
    class Gate(nn.Module):
        def forward(self, x):
            return torch.tanh(x) + torch.relu(x)

    found = sites_of(two_convs(lambda self, x: self.gate(x), gate=Gate()), IMAGE)
    assert list(found) == ["input", "one", "gate", "two"]
    with_relu = Net(lambda self, x: self.a(self.act(self.a(x))), a=nn.Conv2d(3, 3, 3, padding=1), act=Gate())
    with_relu.act.forward = lambda x: x + torch.relu(x)
    assert list(sites_of(with_relu, IMAGE)) == ["input", "a", "act/relu", "act", "a/conv2d.1"]


def test_place_without_a_quantized_layer_is_no_site() -> None:
    model = settled(Shortcuts())
    assert list(sites_of(model, IMAGE, ["head"])) == ["/relu.1"]
    assert sites_of(model, IMAGE, []) == {}


CASES = {
    "mobilenet block": (MobileNetBlock, lambda n: ((randn(n, 4, 6, 5),), {})),
    "functional relu": (Shortcuts, lambda n: ((randn(n, 3, 8, 8),), {})),
    "residual": (Residual, lambda n: ((randn(n, 3, 12, 12),), {})),
    "two inputs": (TwoInputs, lambda n: ((randn(n, 2, 8, 8),), {"features": randn(n, 5)})),
    "conv twice": (ConvTwice, lambda n: ((randn(n, 4, 6, 6),), {})),
    "positions": (lambda: Positions(), lambda n: ((randn(n, 5, 8),), {})),
}


class Positions(nn.Module):
    """Adds encodings computed in the forward, whose first dimension is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        steps = torch.arange(x.shape[1]).float().unsqueeze(1) * torch.ones(8)
        return self.last(self.fc(x) + torch.sin(steps).unsqueeze(0))


@pytest.mark.parametrize("case", CASES)
def test_sites_are_the_same_in_every_run_and_at_every_batch_size(case: str) -> None:
    build, inputs = CASES[case]
    model = settled(build())
    first = prepare(model, [inputs(1)], TARGET)
    for samples in (1, 2, 7):
        assert prepare(model, [inputs(samples)], TARGET).sites == first.sites
        found = record(first.model, inputs(samples))
        assert place_sites(first.model, found, TARGET, first.quantizable, first.float_sums) == first.sites


def test_mobilenet_block_gets_the_sites_of_its_kernels() -> None:
    ready = prepare(settled(MobileNetBlock()), [((randn(4, 4, 6, 5),), {})], TARGET)
    expected = ["input", "expand.0", "expand.2", "depthwise.0", "/adaptive_avg_pool2d", "/relu", "excite", "/mul",
                "project.0", "/add"]  # fmt: skip
    assert [site.name for site in ready.sites] == expected
    assert {n: layer.inputs for n, layer in ready.layers.items()} == {
        "expand.0": ("input",),
        "depthwise.0": ("expand.2",),
        "squeeze": ("/adaptive_avg_pool2d",),
        "excite": ("/relu",),
        "project.0": ("/mul",),
    }


def test_layer_called_twice_reads_two_sites() -> None:
    ready = prepare(ConvTwice(), [((randn(2, 4, 6, 6),), {})], TARGET)
    assert ready.layers["layer"].inputs == ("input", "/mul")
    assert [site.name for site in ready.sites] == ["input", "layer", "/mul", "layer/conv2d.1"]


def test_folded_sequential_has_its_site_after_the_relu() -> None:
    ready = prepare(settled(nn.Sequential(conv_bn(3, 4), conv_bn(4, 2))), [IMAGE], TARGET)
    assert [site.name for site in ready.sites] == ["input", "0.2", "1.2"]


class PostNorm(nn.Module):
    """Layers beside shortcuts, a norm behind each sum, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.norms = nn.ModuleList([nn.LayerNorm(6), nn.LayerNorm(6)])

    def forward(self, x):
        x = self.norms[0](x + self.first(x))
        return self.head(self.norms[1](x + self.second(x)))


def test_a_sum_that_only_a_norm_reads_has_no_codes() -> None:
    found = sites_of(PostNorm(), VECTOR)
    assert list(found) == ["input", "norms.0", "norms.1"]


def test_sums_that_only_norms_and_further_sums_read_have_no_codes() -> None:
    def forward(self, x):
        x = self.stem(x)
        x = x + self.first(self.norm(x))
        x = x + self.second(self.norm(x))
        return self.head(self.norm(x))

    layers = {name: nn.Linear(6, 6) for name in ("stem", "first", "second", "head")}
    found = sites_of(Net(forward, norm=nn.LayerNorm(6), **layers), VECTOR)
    assert [site.roles for site in found.values()] == [("layer input",)] * 4


def test_a_sum_of_what_has_codes_anyway_has_some() -> None:
    """As the last one of a residual network, which a mean reads: its operands are there in codes."""
    model = Net(lambda self, x: self.two(y := self.one(x)) + y, one=nn.Conv2d(3, 4, 1), two=nn.Conv2d(4, 4, 1))
    assert list(sites_of(model, IMAGE)) == ["input", "one", "two", "/add"]


@pytest.mark.parametrize(
    "carried",
    [
        lambda self, x: self.head(x),
        lambda self, x: self.head(F.relu(x)),
        lambda self, x: self.head(F.max_pool1d(x[:, None], 1)[:, 0]),
        lambda self, x: self.head(x.reshape(-1, 6) + torch.tanh(x)),
        lambda self, x: x @ x.T,
    ],
    ids=["layer", "relu", "pool", "sum", "product"],
)
def test_a_sum_whose_codes_a_product_reads_has_some(carried) -> None:
    model = Net(lambda self, x: carried(self, x + self.first(x)), first=nn.Linear(6, 6), head=nn.Linear(6, 2))
    assert {"input", "first"} < set(sites_of(model, VECTOR))


def test_another_runtime_may_want_codes_for_every_sum() -> None:
    target = replace(TARGET, roles=dict(TARGET.roles) | {"addition result": "may"})
    ready = prepare(PostNorm().eval(), [VECTOR], target)
    names = [site.name for site in ready.sites]
    assert names == ["input", "first", "/add", "norms.0", "second", "/add.1", "norms.1"]
    assert [site.name for site in prepare(ready.model, [VECTOR], TARGET).sites] == ["input", "norms.0", "norms.1"]
