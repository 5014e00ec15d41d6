"""What models take, return and keep: lists, dictionaries, records, buffers that a forward updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.program.nets.entry import architecture, images, randn, sequences, vectors


class RunningState(nn.Module):
    """Inputs normalized by a running mean that every forward updates in place, and a counter that is assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("calls", torch.tensor(0))
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        self.calls = self.calls + 1
        return self.two(F.gelu(self.one(x - self.mean))) / self.calls


@architecture(vectors(6))
def running_state():
    return RunningState()


class FunctionalDropout(nn.Module):
    """Dropout by function, off in each of the three notations."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = F.dropout(self.one(x), 0.5, training=False)
        x = F.dropout(F.relu(x), p=0.5, training=self.training)
        return self.two(torch.dropout(x, 0.5, self.training))


@architecture(sequences(6, 5), lengths=(5, 7))
def functional_dropout():
    return FunctionalDropout()


class Pyramid(nn.Module):
    """A dictionary in a dictionary, one entry of integers and one without value."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fine, self.coarse = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 3, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        levels = {"fine": self.fine(x), "coarse": self.coarse(x)}
        return {"levels": levels, "best": levels["fine"].argmax(1), "loss": None}


@architecture(images(3, 12), lengths=(12, 15))
def nested_dictionary_output():
    return Pyramid()


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    loss: Tensor | None = None


class RecordOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        first = F.relu(self.one(x))
        second = F.relu(self.two(first))
        return Output(self.head(second), (first, second))


@architecture(sequences(6, 5), lengths=(5, 7))
def dataclass_output():
    return RecordOutput()


class ListOfScales(nn.Module):
    """A list of the same samples at three sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(12, 3)

    def forward(self, scales: list[Tensor]):
        features = [F.adaptive_avg_pool2d(F.relu(self.stem(x)), 1).flatten(1) for x in scales]
        return self.head(torch.cat(features, 1))


def scales(samples: int, length: int | None = None, seed: int = 0) -> tuple[tuple, dict[str, Any]]:
    length = length or 8
    return ([randn(samples, 3, length * k, length * k, seed=seed + k) for k in (1, 2, 3)],), {}


@architecture(scales, lengths=(8, 5))
def list_of_scales():
    return ListOfScales()


class ListOfImages(nn.Module):
    """An image per sample, as torchvision's detectors take them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6])[:, None, None])
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 3)

    def forward(self, images: list[Tensor]):
        return self.head(F.relu(self.conv(torch.stack([image - self.mean for image in images]))).mean((2, 3)))


def separate_images(samples: int, length: int | None = None, seed: int = 0) -> tuple[tuple, dict[str, Any]]:
    length = length or 10
    return ([randn(3, length, length, seed=seed * samples + i) for i in range(samples)],), {}


@architecture(separate_images, lengths=(10, 14), control_flow=("samples",))
def list_of_images():
    return ListOfImages()


class EarlyExit(nn.Module):
    """A second stage only where the first is not sure."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.early, self.two, self.late = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.one(x))
        early = self.early(x)
        if early.softmax(-1).amax(-1).mean() > 0.5:
            return early
        return early + self.late(F.relu(self.two(x)))


@architecture(vectors(6), control_flow=("values",))
def early_exit():
    return EarlyExit()
