"""Further networks of plain PyTorch: autoencoders, one and three dimensions, forms of outputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import noise, randn
from .plain import conv_bn, plain, tokens


@plain(noise(40))
def autoencoder():
    return nn.Sequential(
        nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 4), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 40)
    )


@plain(noise(3, 32, 32))
def convolutional_autoencoder():
    encoder = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    decoder = [nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Sigmoid()]
    return nn.Sequential(*encoder, *decoder)


class Variational(nn.Module):
    """Its mean as the code, as it is used after training; also the spread."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.mean, self.spread = nn.Linear(30, 24), nn.Linear(24, 6), nn.Linear(24, 6)
        self.decode = nn.Sequential(nn.Linear(6, 24), nn.SiLU(), nn.Linear(24, 30))

    def forward(self, x):
        hidden = F.elu(self.encode(x))
        mean = self.mean(hidden)
        return self.decode(mean), mean, self.spread(hidden).exp()


@plain(noise(30))
def variational_autoencoder():
    return Variational()


@plain(noise(16, 1, 1))
def dcgan_generator():
    body = [nn.ConvTranspose2d(16, 32, 4, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    body += [nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*body, nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh())


@plain(noise(4, 64))
def conv1d():
    body = [
        nn.Conv1d(4, 12, 5, padding=2),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(12, 12, 3, groups=3),
    ]
    return nn.Sequential(*body, nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(12, 5))


class Causal(nn.Module):
    """A dilated convolution that looks back only, gated, around a shortcut."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv, self.mix, self.left = (
            nn.Conv1d(width, 2 * width, 2, dilation=dilation),
            nn.Conv1d(width, width, 1),
            dilation,
        )

    def forward(self, x):
        signal, gate = self.conv(F.pad(x, (self.left, 0))).chunk(2, 1)
        return x + self.mix(torch.tanh(signal) * torch.sigmoid(gate))


@plain(noise(2, 48))
def wavenet():
    return nn.Sequential(nn.Conv1d(2, 12, 1), *[Causal(12, 2**k) for k in range(4)], nn.ReLU(), nn.Conv1d(12, 4, 1))


@plain(noise(2, 8, 16, 16))
def conv3d():
    body = [
        nn.Conv3d(2, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 8, 3),
        nn.ReLU(),
    ]
    return nn.Sequential(*body, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 5))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.score, self.box = conv_bn(3, 16, 3, 2), nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.score(x).sigmoid(), self.box(x).exp()


@plain(noise(3, 24, 24))
def two_outputs():
    return TwoHeads()


class Pyramid(nn.Module):
    """A dictionary in a dictionary, with integers and with nothing in it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fine, self.coarse = conv_bn(3, 8), nn.Conv2d(8, 3, 1), nn.Conv2d(8, 3, 3, 2)

    def forward(self, x):
        x = self.stem(x)
        fine = self.fine(x)
        return {"levels": {"fine": fine, "coarse": self.coarse(x)}, "best": fine.argmax(1), "loss": None}


@plain(noise(3, 16, 16))
def dictionary_output():
    return Pyramid()


class Prediction(NamedTuple):
    logits: Tensor
    features: Tensor


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(12, 24), nn.Linear(24, 5)

    def forward(self, x):
        features = F.silu(self.body(x))
        return Prediction(self.head(features), features)


@plain(noise(12))
def named_tuple_output():
    return Named()


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(16, 5)

    def forward(self, scales: list[Tensor]):
        return self.head(torch.cat([F.relu(self.stem(x)).mean((2, 3)) for x in scales], 1))


@plain(lambda samples, seed: ([randn(samples, 3, size, size, seed=seed + size) for size in (8, 16)],))
def list_input():
    return Scales()


class TextConvolutions(nn.Module):
    """Convolutions of several widths over embedded words, their maxima side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(120, 16)
        self.convolutions = nn.ModuleList([nn.Conv1d(16, 8, width) for width in (2, 3, 4)])
        self.head = nn.Linear(24, 4)

    def forward(self, ids):
        x = self.embed(ids).transpose(1, 2)
        return self.head(torch.cat([F.relu(conv(x)).amax(2) for conv in self.convolutions], 1))


@plain(tokens(120, 14))
def text_cnn():
    return TextConvolutions()


class Mixture(nn.Module):
    """Every expert sees every token, their matrices in one parameter; a router mixes what they say."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(16, 4), nn.Linear(16, 5)
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 32) * 0.3), nn.Parameter(torch.randn(4, 32, 16) * 0.2)

    def forward(self, x):
        shares = self.router(x).softmax(-1)
        hidden = F.gelu(torch.einsum("btd,edh->bteh", x, self.up))
        return self.head(x + torch.einsum("bteh,ehd,bte->btd", hidden, self.down, shares))


@plain(noise(6, 16))
def mixture_of_experts():
    return Mixture()


class EarlyExit(nn.Module):
    """A second stage only where the first is not sure: which operations run depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.early, self.two, self.late = (
            nn.Linear(12, 24),
            nn.Linear(24, 5),
            nn.Linear(24, 24),
            nn.Linear(24, 5),
        )

    def forward(self, x):
        x = F.relu(self.one(x))
        early = self.early(x)
        if early.softmax(-1).amax(-1).mean() > 0.9:
            return early
        return early + self.late(F.relu(self.two(x)))


@plain(noise(12))
def early_exit():
    return EarlyExit()


class SuperResolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (
            nn.Conv2d(1, 16, 5, padding=2),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Conv2d(16, 4, 3, padding=1),
        )

    def forward(self, x):
        return F.pixel_shuffle(self.last(F.relu(self.second(F.relu(self.first(x))))), 2)


@plain(noise(1, 16, 16))
def super_resolution():
    return SuperResolution()
