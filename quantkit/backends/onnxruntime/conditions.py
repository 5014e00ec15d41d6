"""What a traced model's sizes have to meet: torch.export follows one path through a model's code, and what it asked of
the sizes on that path holds for the file.

Most of these guards only say that no size is 0 or 1, or how tensors lie in memory; what is left is a condition: that
two halves fit together again (``2*(height//2) == height``), a longest sequence, the branch that was taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
from sympy.core.relational import Relational
from torch import SymInt, Tensor

from quantkit.program.input_shapes import Place
from quantkit.program.intercept import OpKey

_SIGNS = {sympy.Eq: "==", sympy.Ne: "!=", sympy.Lt: "<", sympy.Le: "<=", sympy.Gt: ">", sympy.Ge: ">="}
_SMALLEST = 2  # torch.export takes sizes of 0 and 1 for constants


@dataclass(frozen=True)
class Condition:
    """A relation between sizes, in symbols; ``place`` is the first call of the model behind it, if known."""

    relation: Any
    place: OpKey | None = None

    def holds(self, sizes: Mapping[Any, int]) -> bool:
        """Whether it does, given the sizes that symbols stand for; so does one that these do not decide."""
        value = self.relation.xreplace({symbol: sympy.Integer(size) for symbol, size in sizes.items()})
        return value != sympy.false

    def text(self, names: Mapping[Any, str]) -> str:
        """As a programmer writes it, with names for symbols."""
        named = self.relation.xreplace({symbol: sympy.Symbol(name, integer=True) for symbol, name in names.items()})
        sign = next((sign for kind, sign in _SIGNS.items() if isinstance(named, kind)), None)
        text = str(named) if sign is None else f"{named.args[0]} {sign} {named.args[1]}"
        return re.sub(r"\(\(([^()]*)\)\)", r"(\1)", text)


@dataclass
class SizeTrace:
    """The sizes of a model's inputs while torch.export traces it: their symbols, and after which call how many guards
    there were.
    """

    shapes: list[tuple[Any, ...]] = field(default_factory=list)
    counts: list[tuple[int, OpKey]] = field(default_factory=list)
    environment: Any = None  # torch's ShapeEnv

    def enter(self, inputs: Iterable[Tensor]) -> None:
        """A run begins."""
        self.counts.clear()
        self.shapes = [tuple(map(_symbol, tensor.shape)) for tensor in inputs]
        symbolic: list[Any] = [size for tensor in inputs for size in tensor.shape if isinstance(size, SymInt)]
        self.environment = symbolic[0].node.shape_env if symbolic else None

    def called(self, key: OpKey) -> None:
        """A call of the model was carried out."""
        if self.environment is not None:
            self.counts.append((len(self.environment.guards), replace(key, output=0)))

    def sizes(self, names: Sequence[str]) -> dict[Place, Any]:
        """What became of every size: a whole number, or an expression in symbols."""
        found: dict[Place, Any] = {}
        for name, shape in zip(names, self.shapes, strict=True):
            for axis, size in enumerate(shape):
                simple = size if isinstance(size, int) else self.environment.replace(size)
                found[name, axis] = int(simple) if isinstance(simple, sympy.Integer) else simple
        return found

    def conditions(self) -> list[Condition]:
        """Those that are left of all guards, each once."""
        found: dict[Any, Condition] = {}
        for relation, place in self._guards():
            simple = self.environment.replace(relation)
            for part in simple.args if isinstance(simple, sympy.And) else (simple,):
                if part.free_symbols and not _is_about_small_sizes(part):
                    found.setdefault(part, Condition(part, place))
        return list(found.values())

    def fixing(self, names: Sequence[str], at: Place) -> Condition | None:
        """The guard that made a whole number of a size, or tied it to another."""
        name, axis = at
        symbol = self.shapes[list(names).index(name)][axis]
        mine = [(r, place) for r, place in self._guards() if symbol in r.free_symbols and isinstance(r, sympy.Eq)]
        return Condition(*mine[0]) if mine else None

    def original(self, names: Sequence[str]) -> dict[Any, Place]:
        """Symbol -> the first size of an input that it stands for."""
        found: dict[Any, Place] = {}
        for name, shape in zip(names, self.shapes, strict=True):
            for axis, size in enumerate(shape):
                if isinstance(size, sympy.Symbol):
                    found.setdefault(size, (name, axis))
        return found

    def _guards(self) -> list[tuple[Any, OpKey | None]]:
        """Every guard, with the call of the model behind it."""
        if self.environment is None:
            return []
        return [
            (guard.expr, next((key for count, key in self.counts if count > i), None))
            for i, guard in enumerate(self.environment.guards)
        ]


def _symbol(size: int | SymInt) -> Any:
    if not isinstance(size, SymInt):
        return size
    return int(size) if size.node.expr.is_Integer else size.node.expr


def _is_about_small_sizes(relation: Any) -> bool:
    """Whether a guard only tells sizes from 0 and 1, which is also how strides are compared (``Max(1, size)``)."""
    if not isinstance(relation, Relational):
        return True
    parts = list(sympy.preorder_traversal(relation))
    if any(type(part).__name__ == "Max" and sympy.S.One in part.args for part in parts):
        return True
    if isinstance(relation, sympy.Eq):
        return False
    if isinstance(relation, sympy.Ne):
        remainder = any(type(side).__name__.endswith("Mod") for side in relation.args)
        return not remainder and any(side.is_Integer and side < _SMALLEST for side in relation.args)
    return bool(relation.lts.is_Integer and relation.lts <= _SMALLEST)  # whichever side it was written on
