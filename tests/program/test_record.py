"""What a run of a model tells: layers, shapes, costs, and which tensors are one value."""

from __future__ import annotations

import gc
import weakref
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.errors import InvalidRequest
from quantkit.program.intercept import OpKey
from quantkit.program.program import Program, Step
from quantkit.program.record import record, run_model
from quantkit.program.replayable import computed_weights
from tests.program.models import IMAGE, TOKENS, VECTOR, MobileNetBlock, Net, Shortcuts, randn, settled


def ops_named(found: Program, op: str) -> list[Step]:
    return [o for o in found.steps if o.key.op == op]


def conv_macs(conv: nn.Conv2d, height: int, width: int) -> int:
    """Output positions times the window each of them reads."""
    kernel = conv.kernel_size[0] * conv.kernel_size[1]
    return height * width * conv.out_channels * (conv.in_channels // conv.groups) * kernel


def test_layers_of_a_network_with_their_shapes_and_costs() -> None:
    model = settled(MobileNetBlock())
    found = record(model, ((randn(4, 4, 6, 5),), {}))
    expected = {
        "expand.0": conv_macs(model.expand[0], 6, 5),
        "depthwise.0": conv_macs(model.depthwise[0], 6, 5),
        "squeeze": conv_macs(model.squeeze, 1, 1),
        "excite": conv_macs(model.excite, 1, 1),
        "project.0": conv_macs(model.project[0], 6, 5),
    }
    assert {name: [c.macs for c in calls] for name, calls in found.calls.items()} == {
        name: [macs] for name, macs in expected.items()
    }
    assert expected["depthwise.0"] == 30 * 8 * 9
    assert found.shape[found.calls["squeeze"][0].input] == (4, 8, 1, 1)
    assert found.shape[found.calls["project.0"][0].output] == (4, 4, 6, 5)
    assert set(found.kinds.values()) == {"conv2d"}


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Linear(6, 4), (3, 6), 6 * 4),
        (nn.Linear(6, 4), (3, 5, 6), 5 * 6 * 4),
        (nn.Conv1d(4, 6, 3, stride=2, groups=2), (3, 4, 9), 4 * 6 * 2 * 3),
        (nn.Conv3d(2, 3, 2), (3, 2, 3, 4, 5), 2 * 3 * 4 * 3 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (3, 4, 5, 7), 5 * 7 * 4 * 3 * 4),
        (nn.ConvTranspose1d(2, 3, 3, stride=3), (1, 2, 5), 5 * 2 * 3 * 3),
    ],
)
def test_costs_are_per_sample(layer: nn.Module, shape, macs: int) -> None:
    assert [c.macs for c in record(nn.Sequential(layer), ((randn(*shape),), {})).calls["0"]] == [macs]


def test_costs_are_per_sample_also_where_the_batch_is_reshaped_away() -> None:
    model = Net(lambda self, x: self.fc(x.reshape(-1, x.shape[-1])), fc=nn.Linear(8, 3))
    assert record(model, TOKENS).calls["fc"][0].macs == 5 * 8 * 3


def test_layer_called_twice_and_layer_never_called() -> None:
    model = Net(lambda self, x: self.used(torch.tanh(self.used(x))), used=nn.Linear(6, 6), idle=nn.Linear(6, 6))
    found = record(model, VECTOR)
    assert list(found.calls) == ["used"]
    first, second = found.calls["used"]
    assert [str(c.key) for c in (first, second)] == ["used/linear", "used/linear.1"]
    assert first.output == ops_named(found, "tanh")[0].inputs[0]
    assert second.input == ops_named(found, "tanh")[0].outputs[0]
    assert found.kinds == {"used": "linear", "idle": "linear"}


@pytest.mark.parametrize(
    "relu", [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, torch.relu_, lambda x: x.relu_(), Tensor.relu]
)
def test_relu_in_any_spelling_makes_a_new_value(relu) -> None:
    model = Net(lambda self, x: relu(self.conv(x)), conv=nn.Conv2d(3, 4, 3))
    if isinstance(relu, nn.Module):
        model.relu = relu
    found = record(model, IMAGE)
    (op,) = ops_named(found, "relu")
    assert op.inputs == (found.calls["conv"][0].output,)
    assert found.outputs == op.outputs != op.inputs


def test_in_place_statement_changes_what_every_name_of_the_tensor_means() -> None:
    def forward(self, x):
        x = held = self.one(x)
        F.relu_(x)
        return self.two(held)

    found = record(Net(forward, one=nn.Linear(6, 6), two=nn.Linear(6, 6)), VECTOR)
    assert found.calls["two"][0].input == ops_named(found, "relu")[0].outputs[0]


def test_in_place_sum_is_a_sum_of_the_old_value() -> None:
    found = record(settled(Shortcuts()), IMAGE)
    iadd, add = ops_named(found, "add")
    relu = ops_named(found, "relu")[0].outputs[0]
    assert iadd.inputs == (found.calls["conv1"][0].output, relu)
    assert add.inputs == (found.calls["conv2"][0].output, iadd.outputs[0])
    assert found.calls["conv2"][0].input == iadd.outputs[0]


@pytest.mark.parametrize(
    "keep",
    [nn.Dropout(0.5), nn.Identity(), lambda x: F.dropout(x, 0.5, False), Tensor.contiguous, Tensor.float, lambda x: x],
)
def test_call_that_returns_its_argument_keeps_the_value(keep) -> None:
    model = Net(lambda self, x: self.two(keep(self.one(x))), one=nn.Linear(6, 6), two=nn.Linear(6, 6))
    if isinstance(keep, nn.Module):
        model.keep = keep
    found = record(model.eval(), VECTOR)
    assert found.calls["two"][0].input == found.calls["one"][0].output
    assert len(found.consumers[found.calls["one"][0].output]) == 1


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.__setitem__((slice(None), 0), 0.0),
        lambda x: x[:, :2].relu_(),
        lambda x: x.view(-1).mul_(2),
        lambda x: torch.add(x, 1, out=x),
        lambda x: torch._foreach_mul_([x], 2.0),
    ],
)
def test_writing_through_a_view_is_another_value_and_a_use(write) -> None:
    def forward(self, x):
        x = self.one(x)
        write(x)
        return self.two(x)

    found = record(Net(forward, one=nn.Linear(6, 6), two=nn.Linear(6, 6)), VECTOR)
    before, after = found.calls["one"][0].output, found.calls["two"][0].input
    assert before != after
    assert before in {v for op in found.steps if op.key.scope == "" for v in op.inputs}
    assert after in found.varying


def uses_counted(use) -> int:
    """How many uses of a layer's output are recorded where its ReLU is one and ``use`` may be another."""

    def forward(self, x):
        y = self.fc(x)
        use(y)
        return torch.relu(y)

    found = record(Net(forward, fc=nn.Linear(6, 6)), VECTOR)
    return len(found.consumers[found.calls["fc"][0].output])


@pytest.mark.parametrize(
    "use", [lambda y: y > 0, lambda y: y.argmax(), lambda y: float(y.sum()), lambda y: y[0, 0].item()]
)
def test_use_that_makes_no_floating_point_tensor_is_a_use(use) -> None:
    assert uses_counted(use) == 2


@pytest.mark.parametrize("look", [lambda y: y.shape[0] + y.size(1) + y.dim(), lambda y: y.is_floating_point(), len])
def test_looking_at_a_shape_is_no_use(look) -> None:
    assert uses_counted(look) == 1


def test_two_inputs_by_keyword_and_a_dict_of_outputs() -> None:
    def forward(self, image, *, features, scale=2.0):
        mixed = self.left(image).mean((2, 3)) + self.right(features) * scale
        return {"mixed": mixed, "parts": (mixed[:, 0], features)}

    model = Net(forward, left=nn.Conv2d(3, 4, 3), right=nn.Linear(5, 4))
    found = record(model, ((), {"image": randn(4, 3, 8, 8), "features": randn(4, 5)}))
    (add,) = ops_named(found, "add")
    assert [str(found.producer[found.calls[n][0].input]) for n in ("right", "left")] == ["/input", "/input[1]"]
    assert found.outputs == (add.outputs[0], ops_named(found, "getitem")[0].outputs[0], found.calls["right"][0].input)


@pytest.mark.parametrize("kind", ["list", "tuple", "nested", "namedtuple", "dataclass"])
def test_outputs_in_any_container_are_known(kind: str) -> None:
    pair = namedtuple("pair", "first second")

    @dataclass
    class Record:
        first: Tensor
        second: list[Tensor]

    def forward(self, x):
        y = self.fc(x)
        z = torch.relu(y)
        made = {"list": [z, y], "tuple": (z, y), "nested": {"a": [z], "b": {"c": (y,)}}, "namedtuple": pair(z, y)}
        return Record(z, [y]) if kind == "dataclass" else made[kind]

    found = record(Net(forward, fc=nn.Linear(6, 6)), VECTOR)
    y = found.calls["fc"][0].output
    assert found.outputs == (ops_named(found, "relu")[0].outputs[0], y)


def test_nested_containers_name_their_layers() -> None:
    parts = nn.ModuleDict({"a": nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 2)))])})
    found = record(Net(lambda self, x: self.parts["a"][0](x), parts=parts), VECTOR)
    assert list(found.calls) == ["parts.a.0.0", "parts.a.0.1.0"]


def test_weight_used_by_a_function_is_a_call_of_its_layer() -> None:
    model = Net(lambda self, x: F.conv2d(x, self.conv.weight, self.conv.bias), conv=nn.Conv2d(3, 4, 3))
    found = record(model, IMAGE)
    (call,) = found.calls["conv"]
    assert [op.key for op in found.consumers[found.stored["conv.weight"]]] == [call.key] == [OpKey("", "conv2d")]


def test_call_by_keywords_in_any_order() -> None:
    class Turned(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(weight=self.weight, bias=self.bias, input=x)

    found = record(nn.Sequential(Turned(3, 4, 3)), IMAGE)
    assert str(found.producer[found.calls["0"][0].input]) == "/input"


def test_module_under_two_names_is_one_layer() -> None:
    shared = nn.Linear(6, 6)
    model = Net(lambda self, x: self.second(torch.relu(self.first(x))), first=shared, second=shared)
    found = record(model, VECTOR)
    assert {name: len(calls) for name, calls in found.calls.items()} == {"first": 2}


def test_token_ids_vary_but_are_no_activations() -> None:
    def forward(self, ids):
        return self.fc(self.embed(ids) + self.position(torch.arange(ids.shape[1])))

    parts = {"embed": nn.Embedding(11, 8), "position": nn.Embedding(5, 8), "fc": nn.Linear(8, 2)}
    found = record(Net(forward, **parts), ((torch.arange(20).reshape(4, 5) % 11,), {}))
    words, places = found.calls["embed"][0], found.calls["position"][0]
    assert words.input not in found.producer
    assert words.output in found.varying
    assert places.output not in found.varying
    assert found.calls["fc"][0].input in found.varying
    assert (words.macs, found.calls["fc"][0].macs) == (0, 5 * 8 * 2)


def probed(self, x):
    """A query of the model's own, repeated for every sample."""
    query = self.own(self.table[:1].repeat(x.shape[0], 1, 1))
    return self.fc(query @ x.transpose(1, 2) @ x)


def placed(self, x):
    """Scores against what is made of as many places as the input has."""
    keys = self.own(self.table[: x.shape[1]])
    return self.fc((x @ keys.t()).softmax(-1) @ x)


@pytest.mark.parametrize("forward", [probed, placed])
def test_what_is_computed_for_one_size_of_the_inputs_is_no_weight(forward) -> None:
    model = Net(forward, own=nn.Linear(8, 8), fc=nn.Linear(8, 2))
    model.table = nn.Parameter(randn(7, 8))
    found = record(model, ((randn(4, 5, 8),), {}))
    assert set(found.weights) == {"own", "fc"}
    assert computed_weights(model, found) == {}


def test_forward_in_inference_mode() -> None:
    class Inference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.relu, self.last = nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)

        @torch.inference_mode()
        def forward(self, x):
            return self.last(self.relu(self.fc(x)).contiguous())

    found = record(Inference(), VECTOR)
    assert found.calls["last"][0].input == ops_named(found, "relu")[0].outputs[0]


def test_two_traces_are_equal() -> None:
    model = settled(MobileNetBlock())
    assert record(model, ((randn(4, 4, 6, 5),), {})) == record(model, ((randn(4, 4, 6, 5, seed=9),), {}))


def test_trace_keeps_no_activation_alive() -> None:
    alive = []

    def forward(self, x):
        y = torch.relu(self.fc(x))
        alive.append(weakref.ref(y))
        return torch.cat([y, torch.stack([y, y])[0]], 1)

    found = record(Net(forward, fc=nn.Linear(6, 6)), VECTOR)
    gc.collect()
    assert [ref() for ref in alive] == [None]
    assert found.steps


def test_model_that_works_in_place_leaves_the_callers_data_alone() -> None:
    def forward(self, x):
        x -= 1
        return self.fc(x)

    model, x = Net(forward, fc=nn.Linear(6, 2)), randn(4, 6)
    before = x.clone()
    record(model, ((x,), {}))
    run_model(model, ((x,), {}))
    assert torch.equal(x, before)


def test_failure_names_the_batch_and_the_models_own_words() -> None:
    def forward(self, x):
        raise AssertionError("five features wanted")

    model = Net(forward, fc=nn.Linear(5, 2))
    wanted = r"rejected a calibration batch \(\(4, 6\)\): AssertionError: five features wanted\. Pass batches exactly"
    for call in (record, run_model):
        with pytest.raises(InvalidRequest, match=wanted):
            call(model, VECTOR)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
