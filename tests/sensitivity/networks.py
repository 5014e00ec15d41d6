"""A small classifier with its perturbations, for the estimators to measure and for their twins to compute by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantkit.numbers.uniform import SiteRange
from quantkit.program.inputs import Batch
from quantkit.rounding.request import RoundingOptions
from quantkit.sensitivity.measure import Perturbation, Subject
from quantkit.sensitivity.outputs import Output, OutputRule
from quantkit.sensitivity.perturbations import site_perturbations, weight_perturbations
from quantkit.stages.request import Request, make_ready

SCHEMES = ("w2a8", "w4a8", "w8a8")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classifier(classes: int = 4) -> nn.Sequential:
    """Sharp enough that its outputs differ between inputs."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, classes)]
    for layer in layers[::2]:
        nn.init.normal_(layer.weight, std=0.6)
    return nn.Sequential(*layers).eval()


def inputs(count: int = 40, seed: int = 1) -> list[Batch]:
    x = torch.randn(count, 6, generator=generator(seed))
    return [((part,), {}) for part in x.split(16)]


def request_of(model: nn.Module, batches: list[Batch]) -> Request:
    return make_ready(model, [args for args, _ in batches], schemes=SCHEMES)


def perturbed(request: Request) -> list[Perturbation]:
    """Every weight format of every layer and every activation format of every site."""
    ready, batches = request.ready, request.batches
    weights, _ = weight_perturbations(ready, request.candidates, batches, RoundingOptions("nearest"), progress=False)
    return weights + site_perturbations(ready, request.site_formats, batches, "mse", progress=False)


def subject_of(request: Request, batches: list[Batch]) -> Subject:
    return Subject(request.ready.model, batches, {site.name: site for site in request.ready.sites})


def outputs_of(subject: Subject, chosen: Sequence[Perturbation] = ()) -> list[Tensor]:
    """The only output of a subject's model for each batch, with perturbations in place."""
    return [output for (output,) in subject.outputs(chosen)]


def samples_of(rows: Sequence[int], samples: Sequence[int]) -> Tensor:
    """The sample of every row of an only output, given the rows and the samples of each batch."""
    rule = OutputRule((Output("output", "kl", 2),))
    return rule.samples([((torch.zeros(count, 1),), {}) for count in samples], [[count] for count in rows])[0]


def by_hand(request: Request, x: Tensor, chosen: list[Perturbation]) -> Tensor:
    """The classifier's output with perturbations in place, layer by layer. Sites are named by what they quantize."""
    changes = {p.owner: p.change for p in chosen}
    readers = {site.consumers[0]: site.name for site in request.ready.sites}
    for name, layer in request.ready.model.named_children():
        if isinstance(layer, nn.Linear):
            site = changes.get(readers.get(name, ""))
            if isinstance(site, SiteRange):
                codes = (x / site.scale).round() + site.zero_point
                x = (codes.clamp(0, 2**site.bits - 1) - site.zero_point) * site.scale
            weight = changes[name].dequantize() if name in changes else layer.weight
            x = x @ weight.T + layer.bias
        else:
            x = x.relu()
    return x.detach()


class Attention(nn.Module):
    """Self-attention of two heads on a stream of width 8."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        heads = [h.unflatten(-1, (2, 4)).transpose(1, 2) for h in self.qkv(x).chunk(3, dim=-1)]
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block; its last add is done in place, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        out = self.mlp(self.norms[1](x))
        out += x
        return out


class Transformer(nn.Module):
    """Three blocks between an embedding of continuous inputs (N, T, 6) and a head of four classes per position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def transformer() -> Transformer:
    torch.manual_seed(0)
    return Transformer().eval()


def sequences(count: int = 12, seed: int = 1) -> list[Batch]:
    x = torch.randn(count, 5, 6, generator=generator(seed))
    return [((part,), {}) for part in x.split(8)]
