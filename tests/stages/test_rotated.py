"""Rotations from the request to the file: made, recorded, made again from the plan, left out where they do harm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.errors import InvalidRequest

WIDTH = 16
BOTH = "stream-rotation,head-rotation"


class Small(nn.Module):
    """A pre-norm transformer of one block; ``exact``: every weight is a code of 4 bits times one step."""

    def __init__(self, exact: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)
            if exact and parameter.dim() == 2:
                parameter.data = parameter.sign() * 0.2
                parameter.data[:, ::5] = 0
            if exact and parameter.dim() == 1 and len(parameter) == WIDTH:
                parameter.data.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.transpose(-2, -1) / 3, -1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(torch.relu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x)).mean(1)


def batches() -> list[Tensor]:
    return list(torch.randn(40, 5, 6, generator=torch.Generator().manual_seed(1)).split(20))


def quick(model: nn.Module, transforms: str, scheme: str = "w8a8") -> quantkit.Result:
    learning = {"reconstruction": "none", "correction": None}
    return quantkit.quantize(model, scheme, batches(), transforms=transforms, progress=False, seed=4, **learning)


@pytest.fixture(scope="module")
def turned() -> tuple[nn.Module, quantkit.Result]:
    torch.manual_seed(0)
    model = Small().eval()
    return model, quick(model, BOTH)


def test_the_plan_records_what_was_turned_and_with_which_seed(turned: tuple[nn.Module, quantkit.Result]) -> None:
    _, result = turned
    assert result.plan.provenance["transforms"] == [
        {"transform": "stream-rotation", "at": "embed/linear", "seed": 4},
        {"transform": "head-rotation", "at": "/matmul.1", "seed": 4},
    ]


def test_the_users_model_stays_and_the_quantized_one_computes_the_same(
    turned: tuple[nn.Module, quantkit.Result],
) -> None:
    model, result = turned
    torch.manual_seed(0)
    for one, other in zip(model.state_dict().values(), Small().state_dict().values(), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        wanted, found = model(batches()[0]), result.model(batches()[0])
    assert float((found - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_a_saved_result_and_its_file_compute_what_was_quantized(
    turned: tuple[nn.Module, quantkit.Result], tmp_path: Path
) -> None:
    model, result = turned
    x = batches()[0]
    result.save(tmp_path / "saved")
    assert torch.equal(quantkit.load(tmp_path / "saved", model).model(x), result.model(x))
    result.export_onnx(tmp_path / "model.onnx")  # compares with the quantized model in onnxruntime


def test_applying_the_plan_turns_the_same_again(turned: tuple[nn.Module, quantkit.Result]) -> None:
    model, result = turned
    again = quantkit.apply(model, result.plan, batches(), progress=False, reconstruction="none", correction=None)
    assert torch.equal(again.model(batches()[0]), result.model(batches()[0]))


def test_a_plan_for_another_model_is_refused() -> None:
    torch.manual_seed(0)
    result = quick(Small().eval(), "stream-rotation")
    plan = quantkit.Plan.of(result.plan)
    plan.provenance["transforms"][0]["at"] = "other/linear"
    with pytest.raises(InvalidRequest, match="'other/linear', which the model does not have"):
        quantkit.apply(Small().eval(), plan, batches(), progress=False)


def test_what_codes_hold_exactly_is_not_turned() -> None:
    torch.manual_seed(0)
    result = quick(Small(exact=True).eval(), "auto", "w4a8")
    kinds = {record["transform"] for record in result.plan.provenance.get("transforms", [])}
    assert not kinds & {"stream-rotation", "head-rotation"}
