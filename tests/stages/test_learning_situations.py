"""Learning on models that people bring: flattening by ``view``, transformers with many samples of one length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit.errors import InvalidRequest
from quantkit.reconstruction.learning import LearningOptions, Schedule
from tests.program.architectures import ARCHITECTURES
from tests.program.models import randn
from tests.stages.schedules import apply_with, quantize_with

SAMPLES = 64


SHORT = LearningOptions(
    network=Schedule(steps=12, batch=32, code_rate=3e-4),
    block=Schedule(steps=4, batch=32),
    positions_network=Schedule(steps=8, batch=8, code_rate=0.0),
    positions_block=Schedule(steps=8, batch=8, code_rate=6e-3),
)


class Flattened(nn.Module):
    """A convolution and a linear layer behind a flattening that its ``notation`` writes."""

    def __init__(self, notation: str) -> None:
        super().__init__()
        self.notation = notation
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 10 * 10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        n = x.size(0)
        flat = {
            "view(x.size(0), -1)": lambda: x.view(x.size(0), -1),
            "reshape(x.shape[0], -1)": lambda: x.reshape(x.shape[0], -1),
            "view(len(x), -1)": lambda: x.contiguous().view(len(x), -1),
            "view((-1, 800))": lambda: x.reshape((-1, 800)),
            "sizes by arithmetic": lambda: x.reshape(n, x.shape[1] * x.shape[2] * (x.numel() // (n * 8 * x.size(2)))),
            "transposed": lambda: x.permute(1, 2, 3, 0).reshape(-1, n).t(),
            "stacked": lambda: torch.stack([x[i].flatten() for i in range(n)]),
            "unbatched rows": lambda: x.view(n * 8, -1).view(n, -1),
        }
        return self.head(flat[self.notation]())


NOTATIONS = (
    "view(x.size(0), -1)", "reshape(x.shape[0], -1)", "view(len(x), -1)", "view((-1, 800))", "sizes by arithmetic",
    "transposed", "unbatched rows",
)  # fmt: skip


@pytest.mark.parametrize("notation", NOTATIONS)
def test_flattening_is_learned_with_more_samples_than_recorded(notation: str) -> None:
    torch.manual_seed(0)
    result = quantize_with(SHORT, Flattened(notation).eval(), "3 bits", randn(SAMPLES, 3, 12, 12))
    assert "network" in result.notes["reconstruction"]
    assert result.model(randn(5, 3, 12, 12)).shape == (5, 4)


def test_a_loop_over_samples_is_quantized_and_says_why_it_is_not_learned(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="quantkit")
    torch.manual_seed(0)
    model, samples = Flattened("stacked").eval(), randn(SAMPLES, 3, 12, 12)
    result = quantize_with(SHORT, model, "3 bits", samples)
    assert not result.notes.get("reconstruction")
    assert any("nothing is learned after rounding" in record.getMessage() for record in caplog.records)
    assert result.model(samples[:7]).shape == (7, 4)
    with pytest.raises(InvalidRequest, match="cannot learn this model"):
        quantize_with(SHORT, model, "3 bits", samples, reconstruction="network")


def plan_of(name: str, model: nn.Module, scheme: str) -> dict[str, str]:
    """All linear layers but the head."""
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return dict.fromkeys(linear[:-1], scheme)


# Learning blocks ends with learning the network, scales and biases of it: codes too in the first two.
TRANSFORMERS = [("bert", "network"), ("t5", "network")]
TRANSFORMERS += [(name, "block") for name in ("bert", "llama", "llama_padded", "llama_eager", "vit", "t5")]


@pytest.mark.parametrize(("name", "how"), TRANSFORMERS)
def test_transformers_learn_from_many_samples_of_one_length(name: str, how: str) -> None:
    entry = ARCHITECTURES[name]
    model = entry.build()
    _, inputs = entry.batch(SAMPLES)
    options: dict[str, Any] = {"reconstruction": how, "correction": None}
    result = apply_with(SHORT, model, plan_of(name, model, "w3a8"), inputs, **options)
    learned = result.notes["reconstruction"]
    assert learned["network"].after <= learned["network"].before
    assert len(learned) >= (entry.blocks // 2 if how == "block" else 1)
