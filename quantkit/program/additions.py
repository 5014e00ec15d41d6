"""Sums that cannot run on codes: where one operand is so much larger than the other, as a mask of -10000 beside
scores, that no grid for the result tells the values of the smaller one apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from quantkit.program.arguments import leaves_of
from quantkit.program.codes import on_codes
from quantkit.program.inputs import Batch, first_samples
from quantkit.program.intercept import OpKey, device_of, intercept, own_inputs
from quantkit.program.program import Program
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
        if key in keys:
            ranges[key] = [min(0.0, float(result.min())), max(0.0, float(result.max()))]
        return result

    args, kwargs = own_inputs(*first_samples(batch, SAMPLES), device_of(model))
    with plain_mode(model), restored(model), intercept(model, note):
        model(*args, **kwargs)
    return frozenset(
        key for key, (low, high) in ranges.items() if spreads[key] and (high - low) / LEVELS > COARSE * spreads[key]
    )
