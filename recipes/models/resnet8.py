"""ResNet8, the image classification reference of MLPerf Tiny, for CIFAR-10 (78,186 parameters)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BN_EPS = 1e-3


def pad_end(x: Tensor) -> Tensor:
    """One row of zeros below and one column to the right: what TensorFlow's "same" means for 3x3 with stride 2."""
    return F.pad(x, (0, 1, 0, 1))


class ResNet8(nn.Module):
    """A 3x3 stem, one residual block each of 16, 32 and 64 channels, the mean over all pixels, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 16, 3, padding=1)
        self.bn0 = nn.BatchNorm2d(16, eps=BN_EPS)

        self.conv1 = nn.Conv2d(16, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16, eps=BN_EPS)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(16, eps=BN_EPS)

        self.conv3 = nn.Conv2d(16, 32, 3, stride=2)
        self.bn3 = nn.BatchNorm2d(32, eps=BN_EPS)
        self.conv4 = nn.Conv2d(32, 32, 3, padding=1)
        self.bn4 = nn.BatchNorm2d(32, eps=BN_EPS)
        self.short2 = nn.Conv2d(16, 32, 1, stride=2)

        self.conv5 = nn.Conv2d(32, 64, 3, stride=2)
        self.bn5 = nn.BatchNorm2d(64, eps=BN_EPS)
        self.conv6 = nn.Conv2d(64, 64, 3, padding=1)
        self.bn6 = nn.BatchNorm2d(64, eps=BN_EPS)
        self.short3 = nn.Conv2d(32, 64, 1, stride=2)

        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        y = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(y)) + x)
        y = F.relu(self.bn3(self.conv3(pad_end(x))))
        x = F.relu(self.bn4(self.conv4(y)) + self.short2(x))
        y = F.relu(self.bn5(self.conv5(pad_end(x))))
        x = F.relu(self.bn6(self.conv6(y)) + self.short3(x))
        return self.fc(x.mean((2, 3)))


def build() -> nn.Module:
    """The network in eval mode; its weights are read separately."""
    return ResNet8().eval()


def preprocess(images: np.ndarray) -> Tensor:
    """RGB images (N, 32, 32, 3) of bytes as the network expects them: (N, 3, 32, 32), still 0 to 255."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous()
