"""What runs on codes: which tensors can carry them, and which operations compute on them under which condition.

Sites are placed by this (``sites``), and a model is written down by it as operations over names (``operations``), from
which ``quantkit.operations`` tells what runs how under any plan. Of a quantized model, its ``coded_sites`` hold codes.
"""

from __future__ import annotations

from collections.abc import Collection, Container
from dataclasses import dataclass

from quantkit.program.program import Program, Step
from quantkit.targets import Target
from quantkit.targets.roles import ADDITION_OPERAND, ADDITION_RESULT

_MOVES = frozenset(
    "reshape reshape_as view view_as flatten unflatten squeeze unsqueeze permute transpose t T mT swapaxes movedim "
    "contiguous clone detach getitem select narrow chunk split unbind expand expand_as max_pool1d max_pool2d "
    "max_pool3d pixel_shuffle channel_shuffle".split()
)


def moves_values(op: Step) -> bool:
    """True when every output element is an input element or zero, so that codes can be moved instead of values."""
    if op.key.op == "pad":
        mode = next((a for a in op.arguments if isinstance(a, str)), "constant")
        fill = next((a for a in op.arguments if isinstance(a, float | int) and not isinstance(a, bool)), 0)
        return mode == "constant" and fill == 0
    if op.key.op == "masked_fill":  # of attention: what may look at nothing is zero
        return 0 in op.arguments
    return op.key.op in _MOVES


def root_of(program: Program, value: int) -> int:
    """The value whose codes this one carries: back through operations that only move values."""
    while (op := program.makers.get(value)) is not None and moves_values(op) and op.inputs:
        value = op.inputs[0]
    return value


def can_hold_codes(program: Program, value: int) -> bool:
    """True when the value, or the one it was moved from, is made at a place that running the model again will find."""
    return root_of(program, value) in program.producer


def fused_output(program: Program, value: int, activations: Collection[str]) -> int:
    """The value after the activation a runtime fuses into the operation that made ``value`` (or ``value`` itself)."""
    readers = program.consumers.get(value, ())
    if (
        len(readers) == 1
        and readers[0].key.op in activations
        and len(readers[0].inputs) == 1
        and value not in program.outputs
    ):
        return readers[0].outputs[0]
    return value


@dataclass(frozen=True)
class OnCodes:
    """An operation that runs on codes as soon as one of its operands has them: its operands and, for an element-wise
    one, its ``result`` after the activation that is fused into it. A product is left in float, and an operand may
    also come from a quantized layer that writes float.
    """

    operands: tuple[int, ...]
    result: int | None = None

    def takes_place(self, program: Program, coded: Container[int], made_by_layers: Container[int] = ()) -> bool:
        """Whether it runs on codes, by the roots that hold codes and those that quantized layers make."""
        roots = [root_of(program, value) for value in self.operands]
        return any(root in coded or (self.result is None and root in made_by_layers) for root in roots)


def on_codes(program: Program, op: Step, target: Target) -> OnCodes | None:
    """How an operation beside the layers runs on codes on ``target``; None for one that only runs in float.

    All operands have to be activations that can hold codes. Those of an element-wise operation are of one shape, and
    nothing else is multiplied into it.
    """
    element_wise, product = op.key.op in target.integer_ops, op.key.op in target.integer_products
    if element_wise:
        scaled = any(a != 1 for a in op.arguments)  # alpha is a multiplication
        alike = len(op.inputs) >= 2 and len({program.shape.get(v) for v in op.inputs}) == 1
        allowed = target.can_hold_codes(ADDITION_OPERAND) and target.can_hold_codes(ADDITION_RESULT)
        element_wise = alike and allowed and not scaled
    if not (element_wise or (product and len(op.inputs) == 2)) or len(op.outputs) != 1:
        return None
    if not all(v in program.varying and v in program.producer and can_hold_codes(program, v) for v in op.inputs):
        return None
    return OnCodes(op.inputs, fused_output(program, op.outputs[0], target.fused_activations) if element_wise else None)
