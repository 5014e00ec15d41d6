"""Labels among the calibration inputs are told, whatever their names; what shapes every output is not."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quantkit.targets import Target
from quantkit.transforms.prepare import prepare


class Classifier(nn.Module):
    """Logits, and the loss where labels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 5)

    def forward(self, tokens, mask=None, labels=None):
        x = self.embedding(tokens)
        x = x if mask is None else x * mask.unsqueeze(-1)
        logits = self.head(F.relu(x.mean(1)))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Rated(Classifier):
    """One error for each sample, by another name, and both outputs in a tuple."""

    def forward(self, tokens, wanted=None):
        logits = self.head(self.embedding(tokens).mean(1))
        return logits if wanted is None else (logits, (logits - wanted).square().mean(1))


class Towers(nn.Module):
    """Two inputs that the model needs, each with an output."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, image, text):
        return self.left(image), self.right(text)


TOKENS, MASK, LABELS = torch.randint(0, 50, (6, 7)), torch.ones(6, 7), torch.randint(0, 5, (6,))
TOLD = {
    "labels": (
        Classifier,
        ((), {"tokens": TOKENS, "mask": MASK, "labels": LABELS}),
        "'labels' makes nothing but 'loss'",
    ),
    "another order": (
        Classifier,
        ((), {"labels": LABELS, "mask": MASK, "tokens": TOKENS}),
        "'labels' makes nothing but 'loss'",
    ),
    "positional": (Classifier, ((TOKENS, None, LABELS), {}), "'labels' makes nothing but 'loss'"),
    "other names": (Rated, ((TOKENS,), {"wanted": torch.randn(6, 5)}), "'wanted' makes nothing but"),
    "none": (Classifier, ((TOKENS,), {"mask": MASK}), ""),
    "two towers": (Towers, ((torch.randn(6, 8), torch.randn(6, 8)), {}), ""),
}


@pytest.mark.parametrize("name", TOLD)
def test_inputs_that_only_make_outputs_of_their_own_are_told(name: str, caplog: Any) -> None:
    make, batch, said = TOLD[name]
    with caplog.at_level(logging.INFO, "quantkit"):
        prepare(make().eval(), [batch], Target.load("onnxruntime-cpu"))
    told = [record.message for record in caplog.records if "makes nothing but" in record.message]
    assert [said in message for message in told] == ([True] if said else [])
