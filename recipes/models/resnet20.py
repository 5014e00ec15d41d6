"""ResNet20 for CIFAR-10 (He et al. 2016, section 4.2; 269,722 parameters), with shortcuts that have no parameters."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut.

    Where the shape changes, the shortcut keeps every second pixel and puts as many empty channels before as behind the
    given ones ("option A" of the paper).
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.stride = stride
        self.empty_channels = (channels_out - channels_in) // 2

    def shortcut(self, x: Tensor) -> Tensor:
        if self.empty_channels == 0:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.empty_channels, self.empty_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def stage(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    """Three blocks of one width; the first one changes width and resolution."""
    return nn.Sequential(
        Block(channels_in, channels_out, stride),
        Block(channels_out, channels_out, stride=1),
        Block(channels_out, channels_out, stride=1),
    )


class ResNet20(nn.Module):
    """A 3x3 stem, three stages of 16, 32 and 64 channels, the mean over all pixels, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(16, 16, stride=1)
        self.layer2 = stage(16, 32, stride=2)
        self.layer3 = stage(32, 64, stride=2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def build() -> nn.Module:
    """The network in eval mode; its weights are read separately."""
    return ResNet20().eval()


def preprocess(images: np.ndarray) -> Tensor:
    """RGB images (N, 32, 32, 3) of bytes as the network expects them: (N, 3, 32, 32), normalised per channel."""
    return ((torch.from_numpy(images).float() / 255 - MEAN) / STD).permute(0, 3, 1, 2).contiguous()
