"""A metric is a number, or one for each sample; anything else is refused in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from quantkit.errors import InvalidRequest
from quantkit.stages.metric import metric_of, outcome_of


@pytest.mark.parametrize("value", [3, 3.0, np.float32(3), torch.tensor(3.0), torch.tensor([3]), [3]])
def test_one_number(value) -> None:
    assert outcome_of(lambda model: value, nn.Identity()) == 3.0
    assert isinstance(outcome_of(lambda model: value, nn.Identity()), float)


@pytest.mark.parametrize(
    "value", [[1, 0, 1, 1], (True, False, True, True), torch.tensor([1.0, 0, 1, 1]), np.array([[1, 0], [1, 1]])]
)
def test_one_number_for_each_sample(value) -> None:
    assert outcome_of(lambda model: value, nn.Identity()).tolist() == [1, 0, 1, 1]
    assert metric_of(lambda model: value, nn.Identity()) == 0.75


@pytest.mark.parametrize("value", ["good", None, {"top1": 3}, [1.0, float("nan")], [], float("inf"), ["a", 1]])
def test_what_is_no_metric(value) -> None:
    with pytest.raises(InvalidRequest, match="evaluate returned"):
        outcome_of(lambda model: value, nn.Identity())
