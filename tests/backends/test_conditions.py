"""What torch.export asks of sizes: read off the guards, told apart from what it asks of every size, and checked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quantkit.backends.onnxruntime.conditions import SizeTrace
from quantkit.backends.onnxruntime.dynamic import TakenSizes
from quantkit.program.intercept import OpKey

PLACES = (("x", 0), ("x", 1), ("y", 0), ("y", 1))
HERE = OpKey("layer", "add")


class Traced(nn.Module):
    """A function of two tensors, of which the first call is noted."""

    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.compute, self.trace = compute, SizeTrace()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.trace.enter((x, y))
        result = self.compute(x, y)
        self.trace.called(HERE)
        return result


def traced(compute: Callable[[Tensor, Tensor], Tensor]) -> SizeTrace:
    auto = torch.export.Dim.AUTO
    model = Traced(compute)
    sizes = ({0: auto, 1: auto}, {0: auto, 1: auto})
    torch.export.export(model, (torch.ones(4, 12), torch.ones(4, 6)), dynamic_shapes=sizes, strict=False)
    return model.trace


def pairs(x: Tensor, y: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, 2).sum(-1) + y


def even(x: Tensor, y: Tensor) -> Tensor:
    return x * 2 if x.shape[1] % 2 == 0 else x


def few(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y], 1) if x.shape[1] <= 15 else x


def anything(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x.relu(), y], 1)


@pytest.mark.parametrize(
    ("compute", "texts", "taken", "refused"),
    [(even, ("Mod(width, 2) == 0",), 8, 7), (few, ("width <= 15",), 15, 16), (anything, (), 99, None)],
    ids=["even", "few", "anything"],
)
def test_conditions_are_what_the_code_asks(
    compute: Callable[[Tensor, Tensor], Tensor], texts: tuple[str, ...], taken: int, refused: int | None
) -> None:
    trace = traced(compute)
    sizes = TakenSizes(trace.sizes(("x", "y")), trace.conditions(), {("x", 1): "width"})
    assert sizes.texts() == texts
    assert sizes.problem({"x": (3, taken), "y": (3, 5)}) is None
    if refused is not None:
        assert f"needs {texts[0]}, and is given" in str(sizes.problem({"x": (3, refused), "y": (3, 5)}))
        assert trace.conditions()[0].place == HERE


def test_sizes_that_follow_each_other() -> None:
    trace = traced(pairs)
    sizes = TakenSizes(trace.sizes(("x", "y")), trace.conditions())
    assert sizes.dynamic == set(PLACES)
    assert sizes.problem({"x": (3, 10), "y": (3, 5)}) is None
    assert sizes.problem({"x": (3, 10), "y": (3, 7)}) is not None
    assert "have to be the same" in str(sizes.problem({"x": (3, 10), "y": (2, 5)}))


def test_a_size_that_the_code_fixes_is_a_number_with_a_reason() -> None:
    trace = traced(lambda x, y: x + torch.ones(12) * y.sum())
    sizes = TakenSizes(trace.sizes(("x", "y")), trace.conditions())
    assert sizes.sizes["x", 1] == 12
    assert sizes.dynamic == set(PLACES) - {("x", 1)}
    guard = trace.fixing(("x", "y"), ("x", 1))
    assert guard is not None
    assert guard.place == HERE
    labels = {symbol: f"{name}{axis}" for symbol, (name, axis) in trace.original(("x", "y")).items()}
    assert guard.text(labels) == "x1 == 12"
    assert sizes.problem({"x": (3, 13), "y": (3, 5)}) == "axis 1 of 'x' is 13, and the file takes 12 only"
