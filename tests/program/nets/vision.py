"""Vision transformers: torchvision's ViT and Swin (both versions) and BEiT's attention, written again in small."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.program.nets.entry import architecture, images

WIDTH, HEADS, WINDOW = 8, 2, 2


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))


class EncoderBlock(nn.Module):
    """MultiheadAttention called without its weights, dropout and MLP, each around a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1, batch_first=True)
        self.dropout, self.mlp = nn.Dropout(0.1), mlp(WIDTH)

    def forward(self, x):
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = x + self.dropout(y)
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, WIDTH, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embedding = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.layers = nn.Sequential(*[EncoderBlock() for _ in range(2)])
        self.ln, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        n, _, h, w = x.shape
        x = self.conv_proj(x).reshape(n, WIDTH, (h // 4) * (w // 4)).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(n, -1, -1), x], dim=1) + self.pos_embedding
        return self.head(self.ln(self.layers(x))[:, 0])


@architecture(images(3, 16), blocks=2, added_tables=("class_token", "pos_embedding"))
def torchvision_vit():
    return VisionTransformer()


def to_windows(x: Tensor) -> Tensor:
    """(samples, height, width, channels) -> (samples * windows, places in a window, channels)."""
    n, h, w, c = x.shape
    x = x.view(n, h // WINDOW, WINDOW, w // WINDOW, WINDOW, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, WINDOW * WINDOW, c)


def from_windows(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of ``to_windows``."""
    n, h, w, c = shape
    x = x.view(n, h // WINDOW, w // WINDOW, WINDOW, WINDOW, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h, w, c)


def relative_offsets() -> Tensor:
    """(places, places, 2): rows and columns between two places of a window, from zero."""
    steps = torch.arange(WINDOW)
    places = torch.stack(torch.meshgrid(steps, steps, indexing="ij")).flatten(1)
    return (places[:, :, None] - places[:, None]).permute(1, 2, 0) + WINDOW - 1


def shift_mask(h: int, w: int, shift: int, like: Tensor) -> Tensor:
    """(windows, places, places): what rolled together from opposite edges of the image does not look at each other."""
    regions = like.new_zeros(1, h, w, 1)
    edges = ((0, -WINDOW), (-WINDOW, -shift), (-shift, None))
    for i, (top, bottom) in enumerate(edges):
        for j, (left, right) in enumerate(edges):
            regions[:, top:bottom, left:right] = 3 * i + j
    regions = to_windows(regions).squeeze(-1)
    difference = regions[:, :, None] - regions[:, None]
    return difference.masked_fill(difference != 0, -100.0)


class WindowAttention(nn.Module):
    """Attention in windows, every other time shifted; weights go to F.linear and the modules are never called."""

    def __init__(self, width: int, shift: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.shift = nn.Linear(width, 3 * width), nn.Linear(width, width), shift
        offsets = relative_offsets()
        index = offsets[..., 0] * (2 * WINDOW - 1) + offsets[..., 1]
        self.register_buffer("relative_position_index", index.flatten())
        self.make_bias()

    def make_bias(self) -> None:
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * WINDOW - 1) ** 2, HEADS))

    def bias(self) -> Tensor:
        table = self.relative_position_bias_table[self.relative_position_index]
        return table.view(WINDOW**2, WINDOW**2, -1).permute(2, 0, 1).unsqueeze(0)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * q.shape[-1] ** -0.5).matmul(k.transpose(-2, -1))

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        windows, places, width = x.shape
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias).reshape(windows, places, 3, HEADS, width // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = self.scores(q, k) + self.bias()
        if mask is not None:
            scores = scores.view(-1, len(mask), HEADS, places, places) + mask[:, None]
            scores = scores.view(-1, HEADS, places, places)
        y = F.dropout(scores.softmax(-1), 0.1, training=self.training).matmul(v)
        return F.linear(y.transpose(1, 2).reshape(windows, places, width), self.proj.weight, self.proj.bias)

    def forward(self, x):
        _, h, w, _ = shape = x.shape
        if not self.shift:
            return from_windows(self.attend(to_windows(x), None), shape)
        x = torch.roll(x, (-self.shift, -self.shift), dims=(1, 2))
        x = from_windows(self.attend(to_windows(x), shift_mask(h, w, self.shift, x)), shape)
        return torch.roll(x, (self.shift, self.shift), dims=(1, 2))


class CosineWindowAttention(WindowAttention):
    """Version 2: cosines with a learned temperature, and the bias from a network over constant offsets."""

    def make_bias(self) -> None:
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(HEADS, 1, 1)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, HEADS, bias=False))
        steps = torch.linspace(-1, 1, 2 * WINDOW - 1)
        self.register_buffer("offsets", torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).flatten(0, 1))

    def bias(self) -> Tensor:
        table = 16 * torch.sigmoid(self.cpb_mlp(self.offsets))[self.relative_position_index]
        return table.view(WINDOW**2, WINDOW**2, -1).permute(2, 0, 1).unsqueeze(0)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return cosines * self.logit_scale.clamp(max=math.log(100.0)).exp()


class SwinBlock(nn.Module):
    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = attention, mlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Four neighbours side by side, projected to twice the width; odd sizes padded."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x):
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class Swin(nn.Module):
    """Two stages of one plain and one shifted block, channels last inside."""

    def __init__(self, attention: type[WindowAttention]) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for width in (WIDTH, 2 * WIDTH):
            stages += [PatchMerging(WIDTH)] if stages else []
            stages += [SwinBlock(width, attention(width, shift)) for shift in (0, WINDOW // 2)]
        self.patch = nn.Conv2d(3, WIDTH, 2, 2)
        self.features = nn.Sequential(*stages)
        self.norm, self.head = nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, 3)

    def forward(self, x):
        x = self.norm(self.features(self.patch(x).permute(0, 2, 3, 1)))
        return self.head(F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 1).flatten(1))


def swin(table):
    """A Swin whose attention computes with a parameter ``table`` beside its layers' weights."""
    tables = tuple(f"features.{i}.attn.{table}" for i in (0, 1, 3, 4))
    return architecture(images(3, 16), lengths=(16, 24), blocks=4, added_tables=tables)


@swin("relative_position_bias_table")
def torchvision_swin():
    return Swin(WindowAttention)


@swin("logit_scale")
def torchvision_swin_v2():
    return Swin(CosineWindowAttention)


class BeitAttention(nn.Module):
    """The projection's bias put together at every call: keys have none."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("k_bias", torch.zeros(WIDTH), persistent=False)
        self.bias = nn.Parameter(torch.randn(HEADS, 16, 16))

    def forward(self, x):
        n, t, c = x.shape
        qkv = F.linear(x, weight=self.qkv.weight, bias=torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        q, k, v = qkv.reshape(n, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return self.proj(y.transpose(1, 2).reshape(n, t, c))


class Beit(nn.Module):
    """Features scaled channel by channel before they are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.Sequential(*[SwinBlock(WIDTH, BeitAttention()) for _ in range(2)])
        self.gamma = nn.Parameter(torch.rand(WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.blocks(self.patch(x).flatten(2).transpose(1, 2))
        return self.head((x * self.gamma).mean(1))


@architecture(images(3, 16), blocks=2, added_tables=("blocks.0.attn.bias", "blocks.1.attn.bias"))
def beit():
    return Beit()
