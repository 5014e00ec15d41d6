"""Networks of plain PyTorch, as people write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from .entry import Inputs, add, noise, randint, randn

WIDTH = 32


def plain(inputs: Inputs, **options: Any) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register a builder under its function's name."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        add("plain", build.__name__, build, inputs, **options)
        return build

    return register


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def tokens(vocabulary: int, length: int) -> Inputs:
    return lambda samples, seed: randint(vocabulary, samples, length, seed=seed)


@plain(noise(20))
def mlp():
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 5))


@plain(noise(3, 32, 32))
def small_cnn():
    pool = [nn.MaxPool2d(2), conv_bn(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(conv_bn(3, 16), *pool, nn.Linear(32, 10))


@plain(noise(1, 28, 28))
def lenet():
    body = [nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 10))


class Recurrent(nn.Module):
    """A recurrent module over series, and a head at every step."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.recurrent = recurrent
        width = getattr(recurrent, "proj_size", 0) or recurrent.hidden_size
        self.head = nn.Linear(width * (2 if recurrent.bidirectional else 1), 5)

    def forward(self, x):
        return self.head(self.recurrent(x)[0])


SERIES = noise(12, 16)


@plain(SERIES)
def lstm():
    return Recurrent(nn.LSTM(16, WIDTH, batch_first=True))


@plain(SERIES)
def lstm_bidirectional():
    return Recurrent(nn.LSTM(16, WIDTH, 2, batch_first=True, bidirectional=True))


@plain(SERIES)
def lstm_projected():
    return Recurrent(nn.LSTM(16, WIDTH, proj_size=8, batch_first=True))


@plain(SERIES)
def gru():
    return Recurrent(nn.GRU(16, WIDTH, 2, batch_first=True))


@plain(SERIES)
def elman_rnn():
    return Recurrent(nn.RNN(16, WIDTH, nonlinearity="relu", batch_first=True))


class Cells(nn.Module):
    """Cells one step at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTMCell(16, WIDTH), nn.GRUCell(WIDTH, 24), nn.Linear(24, 5)

    def forward(self, x):
        hidden = cell = x.new_zeros(len(x), WIDTH)
        top = x.new_zeros(len(x), 24)
        for step in x.unbind(1):
            hidden, cell = self.lstm(step, (hidden, cell))
            top = self.gru(hidden, top)
        return self.head(top)


@plain(SERIES)
def cells_in_a_loop():
    return Cells()


class Captioner(nn.Module):
    """Embedding, LSTM, head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(200, WIDTH), nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 200)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.lstm(self.embed(ids))[0])


@plain(tokens(200, 12))
def lstm_language_model():
    return Captioner()


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        y = self.norm(x)
        y, shares = self.attention(y, y, y)
        return self.head(x + y), shares


@plain(noise(10, WIDTH))
def multihead_attention():
    return SelfAttention()


class CrossAttention(nn.Module):
    """Keys and values of another width, a bias for both, a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, kdim=24, vdim=20, add_bias_kv=True, batch_first=True)

    def forward(self, query, key, value):
        return self.attention(query, key, value, need_weights=False)[0]


def _three(samples: int, seed: int) -> tuple[Tensor, ...]:
    shapes = ((7, WIDTH), (9, 24), (9, 20))
    return tuple(randn(samples, *shape, seed=seed + k) for k, shape in enumerate(shapes))


@plain(_three)
def cross_attention():
    return CrossAttention()


@plain(noise(10, WIDTH))
def transformer_encoder():
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH, 5))


@plain(noise(10, WIDTH))
def transformer_encoder_norm_first():
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, activation="gelu", batch_first=True, norm_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(WIDTH, 5))


class Translator(nn.Module):
    """nn.Transformer between embeddings with sinusoidal positions and a head, causal over the target."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(60, WIDTH), nn.Embedding(50, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 4, 2, 2, 64, batch_first=True)
        self.head = nn.Linear(WIDTH, 50)
        angles = torch.arange(40)[:, None] * torch.exp(torch.arange(0, WIDTH, 2) * (-math.log(1e4) / WIDTH))
        self.register_buffer("positions", torch.stack([angles.sin(), angles.cos()], -1).flatten(1))

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        x, y = (e(ids) + self.positions[: ids.shape[1]] for e, ids in ((self.source, source), (self.target, target)))
        return self.head(self.transformer(x, y, tgt_mask=mask, tgt_is_causal=True))


@plain(lambda samples, seed: (randint(60, samples, 9, seed=seed), randint(50, samples, 7, seed=seed + 1)))
def nn_transformer():
    return Translator()


class UNet(nn.Module):
    def __init__(self, up: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = conv_bn(3, 8), conv_bn(8, 16), conv_bn(16, 32)
        self.up2, self.up1 = up(32, 16), up(16, 8)
        self.mix2, self.mix1, self.head = conv_bn(32, 16), conv_bn(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        y = self.middle(F.max_pool2d(second, 2))
        y = self.mix2(torch.cat([self.up2(y), second], 1))
        return self.head(self.mix1(torch.cat([self.up1(y), first], 1)))


@plain(noise(3, 32, 32))
def unet_transposed():
    return UNet(lambda inputs, outputs: nn.ConvTranspose2d(inputs, outputs, 2, 2))


@plain(noise(3, 32, 32))
def unet_interpolated():
    return UNet(lambda inputs, outputs: nn.Sequential(nn.Upsample(scale_factor=2), conv_bn(inputs, outputs)))


class Recommender(nn.Module):
    """Bags of what was seen, an embedding of who sees it, and dot products between them."""

    def __init__(self) -> None:
        super().__init__()
        self.history, self.user = nn.EmbeddingBag(300, 16, mode="mean"), nn.Embedding(100, 16)
        self.dense, self.head = nn.Linear(6, 16), nn.Linear(19, 1)

    def forward(self, dense, history, user):
        first = F.relu(self.dense(dense))
        stacked = torch.stack([first, self.history(history), self.user(user)], 1)
        crossed = torch.bmm(stacked, stacked.transpose(1, 2))
        return self.head(torch.cat([first, crossed[:, [1, 2, 2], [0, 0, 1]]], 1)).squeeze(-1)


def _clicks(samples: int, seed: int) -> tuple[Tensor, ...]:
    return randn(samples, 6, seed=seed), randint(300, samples, 5, seed=seed + 1), randint(100, samples, seed=seed + 2)


@plain(_clicks)
def embedding_bag_recommender():
    return Recommender()


class BareParameters(nn.Module):
    """Parameters in F.linear, F.conv2d and products; no module owns them."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2)
        self.first, self.second = nn.Parameter(torch.randn(24, 8) * 0.3), nn.Parameter(torch.randn(24, 10) * 0.3)
        self.bias = nn.Parameter(torch.randn(10))

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.kernel, padding=1)).mean((2, 3))
        return torch.tanh(F.linear(x, self.first)) @ self.second + self.bias


@plain(noise(3, 12, 12))
def bare_parameters():
    return BareParameters()


def _normalized(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    body = [norm(nn.Conv2d(3, 12, 4, 2, 1)), nn.LeakyReLU(0.2), norm(nn.Conv2d(12, 16, 4, 2, 1)), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), norm(nn.Linear(64, 5)))
    with torch.no_grad():
        for _ in range(20):  # spectra are estimated while training
            model(torch.zeros(1, 3, 16, 16))
    return model


@plain(noise(3, 16, 16))
def weight_norm_by_hook():
    return _normalized(weight_norm)


@plain(noise(3, 16, 16))
def weight_norm_parametrized():
    return _normalized(parametrizations.weight_norm)


@plain(noise(3, 16, 16))
def spectral_norm_by_hook():
    return _normalized(spectral_norm)


@plain(noise(3, 16, 16))
def spectral_norm_parametrized():
    return _normalized(parametrizations.spectral_norm)


class StandardizedConv(nn.Conv2d):
    """Weights with mean 0 and variance 1 for each output channel."""

    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, unbiased=False)
        return self._conv_forward(x, (self.weight - mean) * torch.rsqrt(variance + 1e-5), self.bias)


@plain(noise(3, 16, 16))
def weight_standardized():
    body = [StandardizedConv(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), StandardizedConv(16, 16, 3, 2)]
    return nn.Sequential(*body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
