"""What is told of a float model before anything is measured: whether it is random, and what its samples are."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from quantkit.errors import InvalidRequest
from quantkit.targets import Target
from quantkit.transforms.prepare import prepare
from tests.program.models import randn

TARGET = Target.load("onnxruntime-cpu")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def between(self, x):
        return x

    def forward(self, x):
        return self.b(self.between(self.a(x).relu()))


class Dropout(Mlp):
    def between(self, x):
        return nn.functional.dropout(x, 0.5)


class Noise(Mlp):
    def between(self, x):
        return x + 0.1 * torch.randn_like(x)


class PythonNoise(Mlp):
    def between(self, x):
        return x * (1 + random.random())


class Counting(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def between(self, x):
        self.seen += 1
        return x * self.seen


@pytest.mark.parametrize(("kind", "call"), [(Dropout, "/dropout"), (Noise, "/randn_like"), (PythonNoise, "/mul")])
def test_a_random_model_is_refused_with_the_call(kind: type[nn.Module], call: str) -> None:
    with pytest.raises(InvalidRequest, match=f"random in eval mode.*first call that differs is {call}"):
        prepare(kind().eval(), [((randn(8, 6),), {})], TARGET)


def test_what_updates_state_is_not_random() -> None:
    prepare(Counting().eval(), [((randn(8, 6),), {})], TARGET)


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return self.b(self.a((x - 0.5) / 2).relu())


class Flat(Image):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(5 * 64, 4)

    def forward(self, x):
        return self.c(super().forward(x).flatten(1))


class Attention(nn.Module):
    """One head on rows of vectors, which need not be in a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1) @ self.v(x)


@pytest.mark.parametrize(
    ("model", "shape"),
    [(Image(), (3, 8, 8)), (Flat(), (3, 8, 8)), (Mlp(), (6,)), (Attention(), (5, 6))],
    ids=["image", "rejected", "vector", "sequence"],
)
def test_a_missing_batch_axis_is_named(model: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match=r"batch axis is missing.*x\.unsqueeze"):
        prepare(model.eval(), [((randn(*shape),), {})], TARGET)
    prepare(model.eval(), [((randn(1, *shape),), {})], TARGET)
    prepare(model.eval(), [((randn(4, *shape),), {})], TARGET)


class Rows(Mlp):
    """Rows that look at each other, as in contrastive learning."""

    def forward(self, x):
        y = nn.functional.normalize(super().forward(x), dim=-1)
        return y @ y.t()


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.LSTM(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(x)[0])


class OverTheBatch(nn.Module):
    """Normalizes by the largest value of all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.a(x).relu()
        return self.b(y / (1 + y.amax((0, 1))))


@pytest.mark.parametrize("model", [Rows(), TimeFirst(), OverTheBatch()], ids=["rows", "time first", "over the batch"])
def test_dependent_rows_are_no_missing_axis(model: nn.Module) -> None:
    prepare(model.eval(), [((randn(5, 4, 6) if isinstance(model, TimeFirst) else randn(5, 6),), {})], TARGET)


class Detector(nn.Module):
    """Takes a list of images C x H x W."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.f = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]))

    def forward(self, images):
        stacked = torch.stack([image - self.mean[:, None, None] for image in images])
        return self.f(self.c(stacked).mean((2, 3)))


class GrayDetector(Detector):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(1, 8, 3)

    def forward(self, images):
        return self.f(self.c(torch.stack([i.mean(0, keepdim=True) for i in images])).mean((2, 3)))


class Pyramid(nn.Module):
    """Takes a list of feature maps, samples first in each."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 4, 1)

    def forward(self, maps):
        return [self.c(x).mean((2, 3)) for x in maps]


class Unstacked(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(list(images.unbind(0)))


@pytest.mark.parametrize("kind", [Detector, GrayDetector])
@pytest.mark.parametrize("count", [2, 3])
def test_a_list_of_images_is_refused_with_the_way_out(kind: type[nn.Module], count: int) -> None:
    images = [torch.rand(3, 8, 8) for _ in range(count)]
    with pytest.raises(InvalidRequest, match=rf"list of {count} samples.*list\(images.unbind\(0\)\)"):
        prepare(kind().eval(), [((images,), {})], TARGET)
    prepare(Unstacked(kind()).eval(), [((torch.stack(images),), {})], TARGET)


def test_a_list_of_batched_tensors_is_taken() -> None:
    ready = prepare(Pyramid().eval(), [(([randn(4, 3, 8, 8), randn(4, 3, 4, 4)],), {})], TARGET)
    assert ready.layers["c"].calls == 2
