"""Networks as users write them, from many families, each with the layers that stay float and a word of the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.program.inputs import Batch
from tests.program.models import IMAGE, TOKENS, Net, conv_bn


@dataclass(frozen=True)
class Family:
    """``build`` returns (model, batch); ``floats`` maps each layer that stays float to a part of the reason."""

    build: Callable[[], tuple[nn.Module, Batch]]
    floats: dict[str, str]


ZOO: dict[str, Family] = {}


def family(**floats: str) -> Callable[[Callable], Callable]:
    """Register a builder; in the names of ``floats`` two underscores stand for a dot."""

    def register(build: Callable) -> Callable:
        ZOO[build.__name__] = Family(build, {name.replace("__", "."): text for name, text in floats.items()})
        return build

    return register


@family()
def googlenet_concat():
    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([self.one(x), self.three(x), self.pool(x)], 1)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

    pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(4, 4, 1))
    model = Net(
        forward, stem=conv_bn(3, 4), one=conv_bn(4, 4, 1), three=conv_bn(4, 4), pool=pool, head=nn.Linear(12, 3)
    )
    return model, IMAGE


@family()
def inception_with_auxiliary_output():
    class Outputs(NamedTuple):
        logits: Tensor
        auxiliary: Tensor

    def forward(self, x):
        x = self.stem(x)
        return Outputs(self.head(x.mean((2, 3))), self.aux(F.avg_pool2d(x, 4).flatten(1)))

    return Net(forward, stem=conv_bn(3, 4), head=nn.Linear(4, 3), aux=nn.Linear(16, 3)), IMAGE


@family()
def densenet():
    def layer(inputs):
        return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, 2, 3, padding=1, bias=False))

    def forward(self, x):
        features = [self.stem(x)]
        for step in self.steps:
            features.append(step(torch.cat(features, 1)))
        return self.head(torch.cat(features, 1).mean((2, 3)))

    return Net(
        forward, stem=nn.Conv2d(3, 4, 3), steps=nn.ModuleList([layer(4), layer(6)]), head=nn.Linear(8, 3)
    ), IMAGE


@family()
def unet():
    def forward(self, x):
        skip = self.down(x)
        x = self.middle(F.max_pool2d(skip, 2))
        x = torch.cat([self.up(x), skip], 1)
        x = F.interpolate(self.out(x), scale_factor=2, mode="bilinear")
        return torch.sigmoid(self.last(x))

    parts = {"down": conv_bn(3, 4), "middle": conv_bn(4, 8), "up": nn.ConvTranspose2d(8, 4, 2, 2)}
    return Net(forward, **parts, out=conv_bn(8, 4), last=nn.Conv2d(4, 1, 1)), IMAGE


class ViT(nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8) * 0.02)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True) if attention == "module" else None
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)

    def attend(self, x):
        if self.mha is not None:
            return self.mha(x, x, x, need_weights=False)[0]
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.attend(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


@family(qkv="no recorded call", proj="no recorded call")
def vit_with_attention_module():
    return ViT("module"), IMAGE


@family()
def vit_with_attention_function():
    return ViT("function"), IMAGE


@family()
def transformer_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)), TOKENS


@family()
def language_model_with_tied_embedding():
    def forward(self, ids, mask=None):
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        x = x + self.fc(F.layer_norm(x, (8,)))
        return {"logits": self.head(x)}

    model = Net(
        forward,
        embed=nn.Embedding(11, 8),
        position=nn.Embedding(5, 8),
        fc=nn.Linear(8, 8),
        head=nn.Linear(8, 11, False),
    )
    model.head.weight = model.embed.weight
    return model, ((), {"ids": torch.arange(20).reshape(4, 5) % 11, "mask": torch.ones(4, 5)})


@family()
def lstm_tagger():
    model = Net(lambda self, x: self.head(self.lstm(x)[0]), lstm=nn.LSTM(8, 6, batch_first=True), head=nn.Linear(6, 3))
    return model, TOKENS


@family()
def recurrent_cell_by_hand():
    def forward(self, x):
        state = torch.zeros(x.shape[0], 6)
        for step in x.unbind(1):
            state = torch.tanh(self.from_input(step) + self.from_state(state))
        return self.head(state)

    return Net(forward, from_input=nn.Linear(8, 6), from_state=nn.Linear(6, 6), head=nn.Linear(6, 3)), TOKENS
