"""Sums of activations that stay float although the target could run them on codes.

In some one operand is so much larger than the other, as a mask of -10000 beside scores, that no grid for the result
tells the values of the smaller one apart. Of others only norms, means and further such sums read the result, as in a
transformer: they would be quantized for nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable
from typing import Any

from torch import Tensor, nn

from quantkit.program.arguments import leaves_of
from quantkit.program.codes import fused_output, moves_values, on_codes, root_of
from quantkit.program.inputs import Batch, first_samples
from quantkit.program.intercept import OpKey, device_of, intercept, own_inputs
from quantkit.program.program import Program, Step
from quantkit.program.updates import plain_mode, restored
from quantkit.targets import Target

SAMPLES = 32
LEVELS = 255  # of the finest codes
COARSE = 1.0  # a step of the result over the standard deviation of an operand


def drowned_additions(model: nn.Module, program: Program, target: Target, batch: Batch) -> frozenset[OpKey]:
    """The sums of activations that would run on codes and lose an operand, on some samples of a batch: a step of their
    result's range is larger than that operand's standard deviation.
    """
    steps = ((step.key, on_codes(program, step, target)) for step in program.steps)
    keys = {key for key, found in steps if found is not None and found.result is not None}
    if not keys:
        return frozenset()
    ranges: dict[OpKey, list[float]] = defaultdict(lambda: [0.0, 0.0])
    spreads: dict[OpKey, float] = {}

    def note(key: OpKey, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if key in keys:  # before the call, which may write to an operand
            read = [x.detach().float() for x in leaves_of((args, kwargs)) if isinstance(x, Tensor)]
            stds = [float(x.std()) for x in read if x.numel() > 1]
            spreads[key] = min([s for s in stds if s > 0], default=0.0)
        result = func(*args, **kwargs)
        if key in keys and result.numel():
            ranges[key] = [min(0.0, float(result.min())), max(0.0, float(result.max()))]
        return result

    args, kwargs = own_inputs(*first_samples(batch, SAMPLES), device_of(model))
    with plain_mode(model), restored(model), intercept(model, note):
        model(*args, **kwargs)
    return frozenset(
        key for key, (low, high) in ranges.items() if spreads[key] and (high - low) / LEVELS > COARSE * spreads[key]
    )


def additions_of_no_use(
    program: Program, target: Target, layers: Iterable[str], in_float: Container[OpKey] = ()
) -> frozenset[OpKey]:
    """The sums that could run on codes, whose codes neither one of the quantized ``layers`` reads nor a product of
    activations, where some operand would get codes for the sum alone. The operations ``in_float`` have no codes. None
    where the target wants codes for every sum.
    """
    if not target.adds_for_products:
        return frozenset()
    names, useless = tuple(layers), set()
    read, coded = _CodesRead(program, target, names, in_float), _codes_of_layers(program, target, names)
    for step in program.steps:
        found = None if step.key in in_float else on_codes(program, step, target)
        if found is None or found.result is None:
            continue
        operands = {root_of(program, value) for value in found.operands}
        if operands <= coded or read.of(found.result):
            coded |= operands | {root_of(program, found.result)}
        else:
            useless.add(step.key)
    return frozenset(useless)


def _codes_of_layers(program: Program, target: Target, layers: Iterable[str]) -> set[int]:
    """The roots of what layers read, and of what they make where their kernels write codes."""
    found = set()
    for name in layers:
        for call in program.calls[name]:
            found.add(root_of(program, call.input))
            if program.kinds[name] in target.output_coded:
                found.add(fused_output(program, call.output, target.fused_activations))
    return found


class _CodesRead:
    """Whether a layer or a product of activations reads the codes of a value: as they are, moved, or added to others
    and behind an activation that is fused into the sum.
    """

    def __init__(self, program: Program, target: Target, layers: Iterable[str], in_float: Container[OpKey]) -> None:
        self.program, self.target, self.in_float = program, target, in_float
        self.inputs = {(call.key, call.input) for name in layers for call in program.calls[name]}
        self.known: dict[int, bool] = {}

    def of(self, value: int) -> bool:
        if value not in self.known:
            self.known[value] = any(self._by(step, value) for step in self.program.consumers.get(value, ()))
        return self.known[value]

    def _by(self, step: Step, value: int) -> bool:
        if (step.key, value) in self.inputs:
            return True
        if moves_values(step):
            return value == step.inputs[0] and any(self.of(moved) for moved in step.outputs)
        found = None if step.key in self.in_float else on_codes(self.program, step, self.target)
        return found is not None and (found.result is None or self.of(found.result))
