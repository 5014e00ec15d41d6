"""Small networks as users write them: residual, several inputs, reused layers, in-place operations."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Residual(nn.Module):
    """A residual block, a strided shortcut padded with zero channels, max pooling, and a float layer at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(16, 4)
        self.offset = nn.Parameter(torch.full((4,), 0.5))

    def forward(self, image):
        x = self.stem(image)
        x = F.relu(self.conv2(F.relu(self.conv1(x))) + x)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = self.pool(F.relu(self.down(x) + short))
        return self.head(x.mean((2, 3))) + self.offset


class TwoInputs(nn.Module):
    """Two inputs, the second by keyword, and a dict of a tensor and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(2, 4, 3)
        self.right = nn.Linear(5, 4)

    def forward(self, image, *, features, scale=2.0):
        mixed = torch.relu(self.left(image)).mean((2, 3)) + self.right(features) * scale
        return {"mixed": mixed, "parts": (mixed[:, 0], features)}


class ConvTwice(nn.Module):
    """One convolution called twice, on inputs of different ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)) * 3)


class LinearTwice(nn.Module):
    """One linear layer called twice, on inputs of different ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)) * 3)


class BothRanks(nn.Module):
    """One square linear layer called on sequences and on vectors: ONNX transposes its weight for one of them only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(self.layer(x).mean(1))


class InPlace(nn.Module):
    """Changes a tensor that another name still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        x = held = self.conv1(x)
        F.relu_(x)
        x = self.conv2(x)
        x += held
        return x


class OneBatchSize(nn.Module):
    """Spells out the batch size it was written for."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(x.reshape(4, 6))


class Undecided(nn.Module):
    """Chooses its operations by the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(x) if float(x.sum()) > 0 else self.fc(-x)
