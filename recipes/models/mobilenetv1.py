"""MobileNetV1 x0.25, the visual wake words reference of MLPerf Tiny: is there a person? (216,322 parameters)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BN_EPS = 1e-3
CHANNELS = (8, 16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)  # of the depthwise convolution between two entries of CHANNELS


def pad_same(x: Tensor, stride: int) -> Tensor:
    """Zeros where TensorFlow's "same" puts them for a 3x3 kernel: only below and to the right at stride 2."""
    return F.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))


class MobileNetV1(nn.Module):
    """A 3x3 stem with stride 2, thirteen pairs of depthwise and pointwise convolutions, the mean, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        inputs, outputs = CHANNELS[:-1], CHANNELS[1:]
        self.conv0 = nn.Conv2d(3, CHANNELS[0], 3, stride=2)
        self.bn0 = nn.BatchNorm2d(CHANNELS[0], eps=BN_EPS)
        self.dw = nn.ModuleList(nn.Conv2d(c, c, 3, s, groups=c) for c, s in zip(inputs, STRIDES, strict=True))
        self.dwbn = nn.ModuleList(nn.BatchNorm2d(c, eps=BN_EPS) for c in inputs)
        self.pw = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in zip(inputs, outputs, strict=True))
        self.pwbn = nn.ModuleList(nn.BatchNorm2d(c, eps=BN_EPS) for c in outputs)
        self.fc = nn.Linear(CHANNELS[-1], 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(pad_same(x, stride=2))))
        pairs = zip(STRIDES, self.dw, self.dwbn, self.pw, self.pwbn, strict=True)
        for stride, depthwise, depthwise_bn, pointwise, pointwise_bn in pairs:
            x = F.relu(depthwise_bn(depthwise(pad_same(x, stride))))
            x = F.relu(pointwise_bn(pointwise(x)))
        return self.fc(x.mean((2, 3)))


def build() -> nn.Module:
    """The network in eval mode; its weights are read separately."""
    return MobileNetV1().eval()


def preprocess(images: np.ndarray) -> Tensor:
    """RGB images (N, 96, 96, 3) of bytes as the network expects them: (N, 3, 96, 96), 0 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous() / 255
