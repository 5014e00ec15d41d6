"""A small residual network for handwritten digits of 8x8 pixels (38,266 parameters).

Its weights are trained by tools/train_references.py.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 16.0  # the scans count dark pixels in 4x4 tiles: 0 to 16


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut: the input itself, or a 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsCNN(nn.Module):
    """A 3x3 stem, three residual blocks (the second one with stride 2), the mean over all pixels, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.block1 = Block(16, 16, stride=1)
        self.block2 = Block(16, 32, stride=2)
        self.block3 = Block(32, 32, stride=1)
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = self.block3(self.block2(self.block1(x)))
        return self.linear(x.mean((2, 3)))


def build() -> nn.Module:
    """The network in eval mode; its weights are read separately."""
    return DigitsCNN().eval()


def preprocess(images: np.ndarray) -> Tensor:
    """Images (N, 8, 8) with levels 0 to 16 as the network expects them: (N, 1, 8, 8), 0 to 1."""
    return torch.from_numpy(images).unsqueeze(1).float() / LEVELS
