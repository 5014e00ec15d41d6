"""Norms are found in what a model computes, written out or called, and only where the numbers agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quantkit.targets import Target
from quantkit.transforms.norms import Normalization, normalizations
from quantkit.transforms.prepare import Prepared, prepare
from tests.program.architectures import ARCHITECTURES

WIDTH = 6


def found_in(name: str) -> list[Normalization]:
    entry = ARCHITECTURES[name]
    norms, wrong = normalizations(prepare(entry.build(), [entry.batch(2)], Target.load("onnxruntime-cpu")))
    assert wrong == {}
    return norms


@pytest.mark.parametrize(
    ("name", "kind", "offset", "count"),
    [
        ("bert", "layer", 0, 5),
        ("gpt2", "layer", 0, 5),
        ("llama", "rms", 0, 5),
        ("qwen3", "rms", 0, 9),  # four of them over the width of a head
        ("gemma2", "rms", 1, 9),
        ("swin", "layer", 0, 11),
        ("torchvision_vit", "layer", 0, 5),
    ],
)
def test_all_norms_of_a_model_are_found(name: str, kind: str, offset: float, count: int) -> None:
    norms = found_in(name)
    assert len(norms) == count
    assert {(norm.kind, norm.offset) for norm in norms} == {(kind, offset)}
    assert all(norm.gain == f"{norm.name}.weight" for norm in norms)
    assert all((norm.bias is not None) == (kind == "layer") for norm in norms)


def test_a_norm_of_each_head_is_as_wide_as_a_head() -> None:
    assert [norm.width for norm in found_in("qwen3")] == [16, 8, 8, 16, 16, 8, 8, 16, 16]


class Written(nn.Module):
    """Norms written out in several ways; ``way`` "power" only looks like one."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "layer":
            centered = x - x.mean(-1, keepdim=True)
            y = centered / torch.sqrt(centered.pow(2).mean(-1, keepdim=True) + 1e-4) * self.gain + self.shift
        elif self.way == "layer twice":
            mean = x.mean(-1, keepdim=True)
            y = self.gain * ((x - mean) / torch.sqrt((x - mean).square().mean(-1, keepdim=True) + 1e-4)) + self.shift
        elif self.way == "rms":
            y = (x.double() * (x.double() * x.double()).mean(-1, keepdim=True).add(1e-4).pow(-0.5)).float() * self.gain
        elif self.way == "plain":
            y = nn.functional.layer_norm(x, (WIDTH,), eps=1e-4) * self.gain
        else:
            y = x * torch.rsqrt(torch.pow(2, x).mean(-1, keepdim=True) + 1e-4) * self.gain
        return self.head(y)


def prepared(way: str) -> Prepared:
    torch.manual_seed(0)
    return prepare(Written(way).eval(), [((torch.randn(4, 5, WIDTH),), {})], Target.load("onnxruntime-cpu"))


@pytest.mark.parametrize(
    ("way", "kind", "bias"),
    [("layer", "layer", "shift"), ("layer twice", "layer", "shift"), ("rms", "rms", None), ("plain", "layer", None)],
)
def test_norms_that_are_written_out(way: str, kind: str, bias: str | None) -> None:
    ready = prepared(way)
    (norm,), wrong = normalizations(ready)
    assert (norm.kind, norm.gain, norm.bias, norm.eps, norm.width, wrong) == (kind, "gain", bias, 1e-4, WIDTH, {})
    x = ready.example[0][0]  # type: ignore[index]
    torch.testing.assert_close(ready.model.head(norm.of(x, ready.weights).float()), ready.model(x))


def test_what_only_looks_like_a_norm_is_refused_by_its_numbers() -> None:
    norms, wrong = normalizations(prepared("power"))
    assert norms == []
    assert "it is no rms norm: off by" in wrong["gain"]
