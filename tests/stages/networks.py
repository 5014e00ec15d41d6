"""Networks for the whole path: one of the usual kind, and some written as nobody who wrote quantkit would."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

from tests.program.models import conv_bn, randn, settled


class Small(nn.Module):
    """A convolution with BatchNorm, a residual block and a head: 4 layers, 1,776 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(2, 12)
        self.conv = nn.Conv2d(12, 12, 3, padding=1)
        self.mix = nn.Conv2d(12, 12, 1)
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.mix(F.relu(self.conv(x))) + x)
        return self.head(x.mean((2, 3)))


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return settled(Small())


def images(count: int = 24, seed: int = 1) -> Tensor:
    return randn(count, 2, 6, 6, seed=seed)


def hard_swish_block(inputs: int, outputs: int, size: int, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.Hardswish())


class MobileNet(nn.Module):
    """A stem and an inverted residual block with a depthwise convolution, Hardswish everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = hard_swish_block(3, 32, 3)
        self.expand = hard_swish_block(32, 128, 1)
        self.depthwise = hard_swish_block(128, 128, 5, groups=128)
        self.project = nn.Sequential(nn.Conv2d(128, 32, 1, bias=False), nn.BatchNorm2d(32))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.head(x.mean((2, 3)))


class FunctionalReLU(nn.Module):
    """Activations as functions, one in place on a tensor that a shortcut still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 10)

    def forward(self, x):
        x = held = self.conv1(x)
        F.relu(x, inplace=True)
        x = F.relu_(self.conv2(x))
        x += held
        return self.fc2(torch.relu(self.fc1(F.adaptive_avg_pool2d(x, 1).flatten(1))))


class ImageAndFeatures(nn.Module):
    """Two inputs by keyword, a dict of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(3, 16, 3, padding=1)
        self.read = nn.Linear(5, 16)
        self.classify = nn.Linear(16, 10)

    def forward(self, image, features):
        seen = F.relu(self.look(image)).mean((2, 3))
        both = torch.tanh(self.read(features)) + seen
        return {"logits": self.classify(both), "embedding": both}


class ConvReused(nn.Module):
    """One convolution that runs twice, on tensors of different ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.step = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.step(x))
        x = F.relu(self.step(3 * x))
        return self.head(x.mean((2, 3)))


class Standardized(nn.Conv2d):
    """A convolution that computes its weight and its bias, and is told its padding."""

    def forward(self, x, padding):
        weight = 0.2 * self.weight / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias - self.bias.mean(), padding=padding)


class ComputedWeights(nn.Module):
    """Every weight is computed from parameters; a padding follows the size of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.hooked = weight_norm(nn.Conv2d(3, 8, 3, padding=1))
        self.parametrized = parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.one, self.two = Standardized(8, 8, 3), Standardized(8, 8, 3)
        self.head = parametrizations.spectral_norm(nn.Linear(8, 10))

    def forward(self, image):
        x = F.relu(self.parametrized(F.relu(self.hooked(image))))
        for layer in (self.one, self.two):
            x = F.relu(layer(x, image.shape[-1] // 8))
        return self.head(x.mean((2, 3)))


class ConstantBranch(nn.Module):
    """Of two convolutions one reads a constant, and one, which no module makes, has the name of what it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.ones = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return F.conv2d(x, 0.5 * self.image.weight) + self.ones(x.new_ones(1, 3, 8, 8))
