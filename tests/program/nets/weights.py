"""Weights that are computed from parameters, read by functions, shared, or held in three dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from tests.program.nets.entry import architecture, images, randint, randn, sequences, vectors


class StdConv2d(nn.Conv2d):
    """Weight standardization with a gain per output channel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
        weight = self.gain * (self.weight - mean) / torch.sqrt(variance + 1e-6)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardizedUnit(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, inputs), nn.GroupNorm(2, outputs)
        self.conv1 = StdConv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = StdConv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = StdConv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        x = F.relu(self.norm1(x))
        return self.shortcut(x) + self.conv2(F.relu(self.norm2(self.conv1(x))))


@architecture(images(3, 12), lengths=(12, 16, 9))
def weight_standardized_resnet():
    body = [StdConv2d(3, 4, 3, padding=1), StandardizedUnit(4, 6, 1), StandardizedUnit(6, 8, 2)]
    return nn.Sequential(*body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def temporal_convolutions(norm) -> nn.Sequential:
    """Dilated convolutions over time, every weight through ``norm``."""
    convolutions = [norm(nn.Conv1d(c, 6, 3, dilation=d, padding=d)) for c, d in ((3, 1), (6, 2))]
    transposed = norm(nn.ConvTranspose1d(6, 4, 4, 2, 1))
    return nn.Sequential(convolutions[0], nn.LeakyReLU(0.1), convolutions[1], nn.Tanh(), transposed)


@architecture(images(3, 16, dimensions=1), lengths=(16, 27))
def weight_norm_by_hook():
    return temporal_convolutions(weight_norm)


@architecture(images(3, 16, dimensions=1), lengths=(16, 27))
def weight_norm_parametrized():
    return temporal_convolutions(parametrizations.weight_norm)


def discriminator(norm) -> nn.Sequential:
    """Strided convolutions and a score, every weight through ``norm``, which estimates its spectra while training."""
    convolutions = [norm(nn.Conv2d(c, 6, 4, 2, 1)) for c in (3, 6)]
    pooling = [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    model = nn.Sequential(convolutions[0], nn.LeakyReLU(0.2), convolutions[1], *pooling, norm(nn.Linear(24, 1)))

    with torch.no_grad():
        for _ in range(20):
            model(torch.zeros(1, 3, 8, 8))
    return model


@architecture(images(3, 16), lengths=(16, 20))
def spectral_norm_by_hook():
    return discriminator(spectral_norm)


@architecture(images(3, 16), lengths=(16, 20))
def spectral_norm_parametrized():
    return discriminator(parametrizations.spectral_norm)


class LoraLinear(nn.Module):
    """A weight and its low-rank change, one matrix product for both."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.lora_a = nn.Parameter(torch.randn(2, inputs) * 0.3)
        self.lora_b = nn.Parameter(torch.randn(outputs, 2) * 0.3)
        self.scale = 0.5

    def forward(self, x):
        return F.linear(x, self.base.weight + self.lora_b @ self.lora_a * self.scale, self.base.bias)


@architecture(sequences(8, 5), lengths=(5, 7))
def lora_merged_in_forward():
    return nn.Sequential(LoraLinear(8, 12), nn.GELU(), LoraLinear(12, 4))


class LoraBeside(LoraLinear):
    """The low-rank change as a branch of its own: three products."""

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


@architecture(sequences(8, 5), lengths=(5, 7))
def lora_beside():
    return nn.Sequential(LoraBeside(8, 12), nn.GELU(), LoraBeside(12, 4))


class BareProducts(nn.Module):
    """Parameters in F.linear, ``@`` on either side, addmm and matmul; no module owns them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(10, 8) * 0.3)
        self.second = nn.Parameter(torch.randn(10, 6) * 0.3)
        self.left = nn.Parameter(torch.randn(7, 6) * 0.3)
        self.third = nn.Parameter(torch.randn(7, 5) * 0.3)
        self.bias = nn.Parameter(torch.randn(5))
        self.scores = nn.ParameterList([nn.Parameter(torch.randn(5, 3) * 0.3) for _ in range(2)])

    def forward(self, x):
        x = torch.tanh(F.linear(x, self.first)) @ self.second
        x = (self.left @ F.gelu(x).transpose(1, 2)).transpose(1, 2)
        y = torch.addmm(self.bias, x.flatten(0, 1), self.third).view(*x.shape[:-1], 5)
        return torch.matmul(y, self.scores[0]), torch.tensordot(y, self.scores[1], dims=1)


@architecture(sequences(8, 5), lengths=(5, 7, 1))
def bare_parameters():
    return BareProducts()


class Experts(nn.Module):
    """Every expert sees every token; a router mixes what they say."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 12) * 0.3), nn.Parameter(torch.randn(3, 12, 8) * 0.3)
        self.head = nn.Linear(8, 4)

    def experts(self, tokens):
        inputs = tokens.expand(3, -1, -1)
        return torch.bmm(F.silu(torch.bmm(inputs, self.up)), self.down)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        shares = self.router(tokens).softmax(-1)
        mixed = (self.experts(tokens) * shares.T[..., None]).sum(0)
        return self.head(x + mixed.view_as(x))


@architecture(sequences(8, 5), lengths=(5, 7))
def experts_by_bmm():
    return Experts()


class EinsumExperts(Experts):
    def experts(self, tokens):
        hidden = F.silu(torch.einsum("td,edf->etf", tokens, self.up))
        return torch.einsum("etf,efd->etd", hidden, self.down)


@architecture(sequences(8, 5), lengths=(5, 7))
def experts_by_einsum():
    return EinsumExperts()


class GatheredExperts(Experts):
    """Each token's best two experts, their matrices gathered by number."""

    def forward(self, x):
        tokens = x.flatten(0, 1)
        shares, chosen = self.router(tokens).softmax(-1).topk(2, dim=-1)
        hidden = F.silu(torch.einsum("td,tkdf->tkf", tokens, self.up[chosen]))
        mixed = torch.einsum("tkf,tkfd,tk->td", hidden, self.down[chosen], shares)
        return self.head(x + mixed.view_as(x))


@architecture(sequences(8, 5), lengths=(5, 7))
def experts_gathered():
    return GatheredExperts()


class Recommender(nn.Module):
    """Bags of two fields, one of fixed size and one cut by offsets with a weight per entry, and a dot product."""

    def __init__(self) -> None:
        super().__init__()
        self.history = nn.EmbeddingBag(19, 6, mode="mean", padding_idx=0)
        self.tags = nn.EmbeddingBag(11, 6, mode="sum", include_last_offset=True)
        self.dense, self.head = nn.Linear(4, 6), nn.Linear(9, 1)

    def forward(self, dense, history, tags, offsets, weights):
        parts = [self.dense(dense), self.history(history), self.tags(tags, offsets, weights)]
        stacked = torch.stack(parts, 1)
        crossed = torch.bmm(stacked, stacked.transpose(1, 2))
        pairs = crossed[:, [1, 2, 2], [0, 0, 1]]
        return torch.sigmoid(self.head(torch.cat([parts[0], pairs], 1))).squeeze(-1)


def clicks(samples: int, length: int | None = None, seed: int = 0) -> tuple[tuple, dict[str, Any]]:
    length = length or 4
    tags = {"tags": randint(11, 3 * samples, seed=seed + 1), "offsets": torch.arange(samples + 1) * 3}
    tags["weights"] = randn(3 * samples, seed=seed + 2).abs()
    return (randn(samples, 4, seed=seed + 3), randint(19, samples, length, seed=seed)), tags


@architecture(clicks, lengths=(4, 7))
def embedding_bag_recommender():
    return Recommender()


@architecture(vectors(6), added_tables=("0.weight",))
def scaled_table():
    class Gate(nn.Module):
        """A matrix that is multiplied element by element with an outer product: in no matrix product itself."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6, 6))

        def forward(self, x):
            return (x[:, :, None] * x[:, None] * self.weight).flatten(1)

    return nn.Sequential(Gate(), nn.Linear(36, 3))
