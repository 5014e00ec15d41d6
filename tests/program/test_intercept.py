"""Keys of torch calls, and that watching leaves no trace on the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quantkit.program.intercept import (
    INPUT,
    OpKey,
    change_inputs,
    intercept,
    map_tensors,
    operation_name,
    own_inputs,
    tensors_of,
)
from tests.program.models import Net, randn


def keys_of(model: nn.Module, *args, **kwargs) -> list[str]:
    """The keys of every call in a run of the model."""
    seen = []

    def handle(key, func, call_args, call_kwargs):
        seen.append(str(key))
        return func(*call_args, **call_kwargs)

    with torch.no_grad(), intercept(model, handle):
        model(*args, **kwargs)
    return seen


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_key_reads_as_scope_operation_count_and_output() -> None:
    assert str(OpKey("layer1.0", "relu", 1)) == "layer1.0/relu.1"
    assert str(OpKey("", "chunk", 0, 2)) == "/chunk[2]"
    assert str(OpKey("a", "split", 3, 1)) == "a/split.3[1]"


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (torch.Tensor.add_, "add"),
        (torch.Tensor.__iadd__, "add"),
        (torch.Tensor.__radd__, "add"),
        (torch.add, "add"),
        (torch.Tensor.__imul__, "mul"),
        (torch.Tensor.__getitem__, "getitem"),
        (F.relu, "relu"),
        (torch.Tensor.mT.__get__, "mT"),
        (torch.Tensor.shape.__get__, None),
        (torch.Tensor.data.__set__, None),
    ],
)
def test_spellings_of_one_operation_share_a_name(func, name) -> None:
    assert operation_name(func) == name


def test_calls_are_counted_per_scope_and_operation() -> None:
    inner = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))

    def forward(self, x):
        return torch.relu(self.inner(torch.relu(x)) + self.inner(x))

    expected = ["/relu", "inner.0/relu", "inner.1.0/relu", "inner.1.1/linear", "inner.0/relu.1", "inner.1.0/relu.1",
                "inner.1.1/linear.1", "/add", "/relu.1"]  # fmt: skip
    model = Net(forward, inner=inner)
    assert keys_of(model, randn(2, 4)) == expected
    assert keys_of(model, randn(5, 4)) == expected


def test_transposing_attribute_is_a_call_and_reading_a_shape_is_not() -> None:
    model = Net(lambda self, x: x.T.reshape(x.shape[1], x.shape[0]))
    assert keys_of(model, randn(2, 4)) == ["/T", "/reshape"]


def test_result_of_the_handler_replaces_that_of_the_call() -> None:
    model = Net(lambda self, x: torch.relu(x) + 1)

    def handle(key, func, args, kwargs):
        result = func(*args, **kwargs)
        return result * 10 if key.op == "relu" else result

    with intercept(model, handle):
        found = model(torch.tensor([-1.0, 2.0]))
    assert found.tolist() == [1.0, 21.0]


def test_calls_of_the_handler_are_not_intercepted() -> None:
    seen = []

    def handle(key, func, args, kwargs):
        seen.append(str(key))
        return torch.relu(torch.abs(func(*args, **kwargs)))

    x, model = randn(3), Net(lambda self, x: torch.tanh(x))
    with intercept(model, handle):
        model(x)
    assert seen == ["/tanh"]


def test_calls_that_change_the_inputs_are_not_the_models() -> None:
    seen = []

    def handle(key, func, args, kwargs):
        seen.append((str(key), args[0].tolist()))
        return func(*args, **kwargs)

    x, model = torch.tensor([1.0, 2.0]), Net(lambda self, x: x + 1)
    with intercept(model, handle, enter_model=lambda args, kwargs: ((args[0].clone() + 4,), kwargs)):
        model(x)
    assert seen == [("/add", [5.0, 6.0])]


def test_exception_in_forward_leaves_no_hooks_and_no_interception() -> None:
    def forward(self, x):
        return self.inner(x.reshape(7, 7))

    model = Net(forward, inner=nn.Linear(4, 4))
    with pytest.raises(RuntimeError):
        keys_of(model, randn(2, 4))
    assert hooks_of(model) == 0
    torch.relu(randn(2))  # would raise if a dead mode were still active


def test_exception_caught_by_the_model_keeps_the_scope() -> None:
    def forward(self, x):
        try:
            self.inner(x[:, :2])
        except RuntimeError:
            x = torch.relu(x)
        return self.inner(x)

    found = keys_of(Net(forward, inner=nn.Linear(4, 4)), randn(2, 4))
    assert found == ["/getitem", "inner/linear", "/relu", "inner/linear.1"]


def test_users_own_hooks_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    assert keys_of(model, randn(2, 4)) == ["0/linear", "0/add"]
    assert hooks_of(model) == 1


def test_map_tensors_counts_every_tensor_and_changes_floating_point_ones() -> None:
    seen = []

    def change(key, tensor):
        seen.append(key.output)
        return tensor + 1

    value = {"a": torch.zeros(1), "b": [torch.zeros(1, dtype=torch.int64), "text", torch.zeros(2)]}
    found = map_tensors(value, OpKey("s", "op"), change)
    assert seen == [0, 2]
    assert found["a"].item() == 1
    assert found["b"][0].item() == 0
    assert found["b"][1] == "text"


def test_map_tensors_keeps_the_type_of_named_results() -> None:
    found = map_tensors(torch.max(torch.ones(2, 2), 1), OpKey("", "max"), lambda key, t: t * 3)
    assert found.values.tolist() == [3, 3]
    assert found.indices.tolist() == [0, 0]


@pytest.mark.parametrize("kwargs", [{"a": 1.0, "b": 2.0, "c": 3.0}, {"c": 3.0, "b": 2.0, "a": 1.0}])
def test_inputs_are_numbered_in_the_order_of_the_signature(kwargs) -> None:
    class Three(nn.Module):
        def forward(self, b, *, a, c):
            return a + b + c

    seen: dict[int, float] = {}

    def note(key: OpKey, tensor: torch.Tensor) -> torch.Tensor:
        assert (key.scope, key.op) == (INPUT.scope, INPUT.op)
        seen[key.output] = tensor.item()
        return tensor

    change_inputs(Three(), (), {name: torch.tensor(value) for name, value in kwargs.items()}, note)
    assert seen == {0: 2.0, 1: 1.0, 2: 3.0}


def test_inputs_are_copied_and_integers_pass_unchanged() -> None:
    ids, x = torch.arange(3), torch.zeros(3)
    args, kwargs = own_inputs((ids, [x]), {"mask": None})
    args[1][0].add_(1)
    args[0].add_(1)
    assert x.tolist() == [0, 0, 0]
    assert ids.tolist() == [0, 1, 2]
    assert kwargs == {"mask": None}
    assert len(tensors_of((args, kwargs))) == 2
