"""Convolutional networks of one to three dimensions, forward and transposed."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.program.nets.entry import architecture, images


@architecture(images(3, 16, dimensions=1), lengths=(16, 25))
def conv1d():
    layers = [nn.Conv1d(3, 6, 5, padding=2), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 6, 3, groups=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3))


@architecture(images(3, 12), lengths=(12, 17))
def conv2d_padding_modes():
    first = nn.Conv2d(3, 6, 3, padding="same", padding_mode="reflect")
    second = nn.Conv2d(6, 6, (3, 5), padding=(1, 2), padding_mode="circular", groups=6)
    return nn.Sequential(first, nn.SiLU(), second, nn.PReLU(6), nn.Conv2d(6, 4, 3, stride=2, dilation=2))


@architecture(images(2, 8, dimensions=3), lengths=(8, 10))
def conv3d():
    layers = [nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 4, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3))


def transposed(dimensions: int) -> nn.Sequential:
    """A decoder of two transposed convolutions: strided with groups, then with room left at the end."""
    conv = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    wide = conv(4, 6, 4, stride=2, padding=1, groups=2)
    return nn.Sequential(wide, nn.ReLU(), conv(6, 2, 3, stride=2, padding=1, output_padding=1))


@architecture(images(4, 5, dimensions=1), lengths=(5, 8))
def conv_transpose1d():
    return transposed(1)


@architecture(images(4, 5), lengths=(5, 8))
def conv_transpose2d():
    return transposed(2)


@architecture(images(4, 3, dimensions=3), lengths=(3, 4))
def conv_transpose3d():
    return transposed(3)


class TransposedUNet(nn.Module):
    """Two levels down and up again; the way up asks for the size that the way down had."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up2, self.up1 = nn.ConvTranspose2d(8, 8, 2, 2), nn.ConvTranspose2d(8, 4, 3, 2, padding=1)
        self.mix2, self.mix1 = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        first = F.relu(self.down1(x))
        second = F.relu(self.down2(F.max_pool2d(first, 2)))
        y = F.relu(self.middle(F.max_pool2d(second, 2)))
        y = F.relu(self.mix2(torch.cat([self.up2(y), second], 1)))
        return self.mix1(torch.cat([self.up1(y, output_size=first.shape[-2:]), first], 1))


@architecture(images(3, 16), lengths=(16, 24))
def transposed_unet():
    return TransposedUNet()


class FlattenedByView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 100, 5)

    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.fc(x.view(x.size(0), -1))


@architecture(images(3, 12))
def flattened_by_view():
    return FlattenedByView()


class ReshapedByLen(nn.Module):
    """Sizes taken by len, by unpacking and by multiplication of shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 6)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        x = F.relu(self.conv(x))
        x = self.fc(x.reshape(len(x), x.shape[1] * x.shape[2] * x.shape[3]))
        n, width = x.shape
        pairs = x.reshape(2 * n, width // 2)
        return self.head(pairs).reshape([n, -1])


@architecture(images(3, 8))
def reshaped_by_len():
    return ReshapedByLen()


class Detector(nn.Module):
    """Two heads over every place of two feature maps; box offsets counted from a grid that follows the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next = nn.Conv2d(3, 6, 3, 2, padding=1), nn.Conv2d(6, 6, 3, 2, padding=1)
        self.score, self.box = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

    def boxes(self, features):
        h, w = features.shape[2:]
        ys, xs = torch.arange(h, device=features.device), torch.arange(w, device=features.device)
        y, x = torch.meshgrid(ys, xs, indexing="ij")
        centres = torch.stack([x, y, x, y]).to(features.dtype) + 0.5
        return ((self.box(features) + centres) * (64 / h)).flatten(2).transpose(1, 2)

    def forward(self, x):
        levels = [F.relu(self.stem(x))]
        levels.append(F.relu(self.next(levels[0])))
        scores = torch.cat([self.score(f).permute(0, 2, 3, 1).reshape(len(f), -1, 5) for f in levels], 1)
        return scores.sigmoid(), torch.cat([self.boxes(f) for f in levels], 1)


@architecture(images(3, 16), lengths=(16, 24, 20))
def two_head_detector():
    return Detector()
