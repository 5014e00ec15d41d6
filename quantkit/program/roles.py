"""The tensors of attention: queries, keys, probabilities and values, told by a softmax between two products.

What stands between them does not matter as long as it acts on single scores: scales, masks, biases, soft caps, casts,
dropout, and whatever only moves values. Rotations of queries and keys come before the first product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from quantkit.program.codes import moves_values
from quantkit.program.intercept import OpKey
from quantkit.program.program import Program, Step
from quantkit.targets.roles import KEY, PROBABILITIES, QUERY, VALUE

_PRODUCTS = frozenset(("matmul", "bmm", "baddbmm"))
_ON_SCORES = frozenset(
    "add sub mul div where masked_fill masked_scatter clamp tanh dropout to type_as float half bfloat16 type "
    "repeat_interleave repeat cat nan_to_num".split()
)
Neighbours = Callable[[int], Iterator[tuple[Step, tuple[int, ...]]]]


def attention_roles(program: Program) -> dict[tuple[OpKey, int], str]:
    """(product, position of an operand) -> its role, for the products around every softmax."""
    found: dict[tuple[OpKey, int], str] = {}

    def makers(value: int) -> Iterator[tuple[Step, tuple[int, ...]]]:
        if (op := program.makers.get(value)) is not None:
            yield op, op.inputs

    def readers(value: int) -> Iterator[tuple[Step, tuple[int, ...]]]:
        yield from ((op, op.outputs) for op in program.consumers.get(value, ()))

    for softmax in (op for op in program.steps if op.key.op == "softmax"):
        before, _ = _products(softmax.inputs, makers)
        behind, probabilities = _products(softmax.outputs, readers)
        if not (before and behind):
            continue
        for product in before:
            *_, left, right = range(len(product.inputs))  # a sum may be added to first
            found |= {(product.key, left): QUERY, (product.key, right): KEY}
        for product in behind:
            for position, value in enumerate(product.inputs):
                found[product.key, position] = PROBABILITIES if value in probabilities else VALUE
    return found


def _products(values: Iterable[int], neighbours: Neighbours) -> tuple[list[Step], set[int]]:
    """The products next to ``values``, or to what other operations pass on of them, and all values on the way."""
    found: dict[OpKey, Step] = {}
    waiting = list(values)
    seen = set(waiting)
    while waiting:
        for op, further in neighbours(waiting.pop()):
            if op.key.op in _PRODUCTS:
                found[op.key] = op
            elif op.key.op in _ON_SCORES or moves_values(op):
                waiting += [value for value in further if value not in seen]
                seen.update(further)
    return list(found.values()), seen
