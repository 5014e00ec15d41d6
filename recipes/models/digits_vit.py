"""A small vision transformer for handwritten digits of 8x8 pixels (26,762 parameters), LayerNorms before attention and
MLP (Dosovitskiy et al., arXiv 2010.11929).

Its weights are trained by tools/train_references.py.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 16.0  # the scans count dark pixels in 4x4 tiles: 0 to 16
PATCH = 2


class Attention(nn.Module):
    """Self-attention of several heads; queries, keys and values come from one linear layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens, width = x.shape[1:]
        split = self.qkv(x).reshape(x.shape[0], tokens, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(x.shape[0], tokens, width))


class Block(nn.Module):
    """Attention and two linear layers around a GELU, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DigitsViT(nn.Module):
    """Sixteen patches of 2x2 pixels and a class token, three blocks, a linear layer on the class token."""

    def __init__(self, width: int = 32, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, width, PATCH, stride=PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def build() -> nn.Module:
    """The network in eval mode; its weights are read separately."""
    return DigitsViT().eval()


def preprocess(images: np.ndarray) -> Tensor:
    """Images (N, 8, 8) with levels 0 to 16 as the network expects them: (N, 1, 8, 8), 0 to 1."""
    return torch.from_numpy(images).unsqueeze(1).float() / LEVELS
