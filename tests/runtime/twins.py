"""The integer linear layer in plain math."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.runtime.int_linear.reference import Rows


def int_linear_reference(
    rows: Rows,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """float32 (rows, channels) of ``rows`` and int8 ``codes`` (channels, inputs).

    ``scale`` and ``zero_point`` (channels, groups); ``offset`` int32 (channels,) is added to the integer sums, where
    there is one group; ``bias`` (channels,) to the result.
    """
    (activations, activation_scale), groups = rows, scale.shape[1]
    per_group = activations.shape[1] // groups
    total = torch.zeros(activations.shape[0], codes.shape[0], dtype=torch.float32)
    for group in range(groups):
        part = slice(group * per_group, (group + 1) * per_group)
        sums = activations[:, part].double() @ codes[:, part].double().t()  # exact: far below 2^53
        if zero_point is not None:
            sums -= activations[:, part].double().sum(1, keepdim=True) * zero_point[:, group]
        if offset is not None:
            sums += offset
        total = total + sums.float() * scale[:, group]
    total = total * activation_scale.unsqueeze(1)
    return total if bias is None else total + bias
