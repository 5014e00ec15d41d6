"""Unknown factors on the channels of a model, and what is known of them: which are equal, inverse to each other, or
one.

A label is the number of a factor: 0 for one, and the negative for its inverse. A value has a label for each of its
elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.program.program import Program
from quantkit.transforms.norms import Normalization

ROWS, COLUMNS, GAIN = "rows", "columns", "gain"


@dataclass(frozen=True)
class Vector:
    """Factors that can be put into a model, one for each channel, with labels from ``first`` on: those of the ``rows``
    of a layer's weight and its bias, of its ``columns``, or of the ``gain`` and shift of a ``norm``. ``name`` is the
    layer's or the norm's.
    """

    kind: str
    name: str
    first: int
    size: int
    norm: Normalization | None = None

    @property
    def labels(self) -> Tensor:
        return torch.arange(self.first, self.first + self.size, device="cpu")


@dataclass(frozen=True)
class Flow:
    """The vectors of a model, pairs of labels (n, 2) whose factors are equal, and, for vectors by (kind, name), what
    makes some of their factors one.
    """

    vectors: tuple[Vector, ...]
    equal: Tensor
    reasons: Mapping[tuple[str, str], str]


class Labels:
    """The labels of values, by number, and what was learned of the factors so far."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.held: dict[int, Tensor] = {}
        self.vectors: dict[tuple[str, str], Vector] = {}
        self.pairs: list[Tensor] = []
        self.reasons: dict[tuple[str, str], str] = {}
        self.next = 1

    def flow(self) -> Flow:
        empty = torch.zeros(0, 2, dtype=torch.long, device="cpu")
        return Flow(tuple(self.vectors.values()), torch.cat([empty, *self.pairs]), self.reasons)

    def vector(self, kind: str, name: str, size: int, norm: Normalization | None = None) -> Vector:
        """The vector of a name, a new one where there is none yet."""
        if (kind, name) not in self.vectors:
            self.vectors[kind, name] = Vector(kind, name, self.next, size, norm)
            self.next += size
        return self.vectors[kind, name]

    def of(self, number: int) -> Tensor:
        """The labels of a value, also where nothing is known of it."""
        return self.held[number] if number in self.held else ones(self.program.shape[number])

    def equate(self, one: Tensor, other: Tensor, why: str) -> None:
        """Note that the factors of two labels are equal, element by element."""
        one, other = _once(*torch.broadcast_tensors(one, other))
        differ = one != other
        if not differ.any():
            return
        both = ((one[differ] + self.next) * (2 * self.next) + other[differ] + self.next).unique()
        pairs = torch.stack([both // (2 * self.next), both % (2 * self.next)], -1) - self.next
        self.pairs.append(pairs)
        fixed = pairs[(pairs == 0).any(-1)].abs().amax(-1)
        for key, vector in self.vectors.items():
            if key not in self.reasons and bool(
                ((fixed >= vector.first) & (fixed < vector.first + vector.size)).any()
            ):
                self.reasons[key] = why

    def make_one(self, number: int, why: str) -> None:
        """Note that the factors of a value are one."""
        if number in self.held:
            self.equate(self.held[number], ones(()), why)

    def along(self, number: int, axis: int, why: str) -> Tensor:
        """The labels of a value along an axis, equal everywhere else."""
        flat = self.of(number).movedim(axis, -1).flatten(0, -2) if self.program.shape[number][1:] else self.of(number)
        first = flat[:1].reshape(-1, flat.shape[-1])[0]
        self.equate(flat, first, why)
        return first


def _once(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of one shape without the elements that are repeated because both were expanded."""
    for axis in range(one.dim()):
        if one.stride(axis) == other.stride(axis) == 0 and one.shape[axis] > 1:
            one, other = one.narrow(axis, 0, 1), other.narrow(axis, 0, 1)
    return one, other


def ones(shape: tuple[int, ...]) -> Tensor:
    """The labels of a value without factors."""
    return torch.zeros((), dtype=torch.long, device="cpu").expand(shape)
