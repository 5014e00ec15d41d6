"""Turn the values of every head of attention by an orthogonal matrix, without any change of what the model computes
(R2 of SpinQuant, Liu et al., arXiv 2405.16406).

The rows of a head W in the layer of values become R^T W, their biases b R, the columns V of every head of queries that
reads them, in the layer behind, V R: probabilities P make P (X W^T R) (V R)^T = P X W^T V^T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.program.layers import Weights
from quantkit.transforms.orthogonal import random_hadamard
from quantkit.transforms.registry import TRANSFORMS, Proposal, Setting, Transform, recorded
from quantkit.transforms.value_heads import ValueHeads, value_heads

NAME = "head-rotation"


@dataclass(frozen=True)
class HeadRotation:
    """The values of an attention turned, each head by a Hadamard matrix with random signs of its own."""

    heads: ValueHeads
    seed: int

    def record(self) -> dict[str, Any]:
        return {"transform": NAME, "at": self.heads.name, "seed": self.seed}

    def apply(self, weights: Weights) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        count, width = self.heads.rows.shape
        rotate_heads(weights, self.heads, [random_hadamard(width, generator) for _ in range(count)])


@torch.no_grad()
def rotate_heads(weights: Weights, heads: ValueHeads, matrices: Sequence[Tensor]) -> None:
    """Turn each head by its matrix, in place, in float64."""
    values, output = weights[heads.values].double().clone(), weights[heads.output].double().clone()
    bias = None if heads.bias is None else weights.tensor(heads.bias)
    for head, matrix in enumerate(matrices):
        turn = matrix.to(values)
        values[heads.rows[head]] = turn.T @ values[heads.rows[head]]
        for columns in heads.columns[head]:
            output[:, columns] = output[:, columns] @ turn
        if bias is not None and heads.positions is not None:
            at = heads.positions[head]
            bias[at] = (bias[at].double() @ turn).to(bias)
    weights.write(heads.values, values)
    weights.write(heads.output, output)


def propose(setting: Setting) -> Proposal:
    """Every attention whose heads can be turned."""
    found, reasons = value_heads(setting.ready)
    return Proposal(tuple(HeadRotation(heads, setting.seed) for heads in found), reasons)


def redo(setting: Setting, records: Sequence[Mapping[str, Any]]) -> tuple[HeadRotation, ...]:
    """The rotations that a plan records. Raises InvalidRequest for an attention that the model does not have."""
    known = {heads.name: heads for heads in value_heads(setting.ready)[0]}
    places = recorded(records, known, "turns the heads of")
    return tuple(HeadRotation(place, record["seed"]) for place, record in zip(places, records, strict=True))


TRANSFORMS[NAME] = Transform(propose, redo)
