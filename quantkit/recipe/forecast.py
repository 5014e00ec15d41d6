"""``quantkit plan``: what a recipe would do to which layer, whether its budget can be met, how long and how much
memory.
"""

from __future__ import annotations

from quantkit.allocation.allocate import allocate, narrowest
from quantkit.allocation.only_plan import only_plan
from quantkit.budget import Budget
from quantkit.plan import Composition, Plan
from quantkit.recipe.read import DECIDED_LATER, Recipe
from quantkit.recipe.run import inputs_of
from quantkit.stages.forecast import forecast
from quantkit.stages.quantize import candidates_of
from quantkit.stages.request import Request, make_ready


def forecast_of(recipe: Recipe) -> str:
    """The text that ``quantkit plan`` prints. Raises InfeasibleBudget when no plan can meet the recipe's budget."""
    inputs = inputs_of(recipe)
    settings = {key: value for key, value in recipe.settings().items() if key not in DECIDED_LATER}
    limit = Budget.parse(recipe.get("budget"))
    settings |= candidates_of(limit, settings.get("schemes"))
    request = make_ready(inputs.model, **inputs.shown(), **settings)
    certain = limit.without_accuracy()
    if certain is not None and certain.file_size is not None:
        certain = certain.with_tensors(certain.file_bytes, request.unmeasured())
    only = only_plan(request.unmeasured(), certain or limit)
    if only is None and certain is not None:
        allocate(request.unmeasured(), certain)
    return "\n".join(
        [
            *_layers(request),
            f"{len(request.ready.sites)} activation sites",
            _sizes(request),
            _composition(request),
            _certain(limit, certain),
            _measuring(request, only),
        ]
    )


def _certain(limit: Budget, certain: Budget | None) -> str:
    """What is known of the limits: ``certain`` are those that can be counted."""
    if certain is None:
        return "what the budget asks of accuracy has to be measured"
    rest = "; what the graph takes of the file is known once one is made" if limit.file_size is not None else ""
    return f"{certain} can be met{rest}"


def _measuring(request: Request, only: Plan | None) -> str:
    """What the profile takes, or why there is none."""
    if only is not None:
        return "every layer has one candidate: nothing is profiled"
    return str(forecast(request)) if request.batches else "without calibration data nothing is measured"


def _layers(request: Request) -> list[str]:
    """A line per layer: kind, shape, and its candidates or why it stays float."""
    width = max(len(name) for name in request.ready.layers)
    return [
        f"{name:<{width}}  {layer.kind:<8} {'x'.join(map(str, layer.shape)):<14} "
        + (f"float: {layer.reason}" if layer.reason else ", ".join(map(str, request.candidates[name])))
        for name, layer in request.ready.layers.items()
    ]


def _composition(request: Request) -> str:
    """What the bytes of the smallest plan consist of."""
    least = narrowest(request.unmeasured())
    ready = request.ready
    return f"at the least: {Composition.of(ready.layers, least, ready.other_bytes, ready.float_bytes)}"


def _sizes(request: Request) -> str:
    ready = request.ready
    sizes = [
        [layer.weight_bytes(scheme) for scheme in request.candidates.get(name, ())] or [layer.float_bytes]
        for name, layer in ready.layers.items()
    ]
    least, most = (sum(pick(options) for options in sizes) + ready.other_bytes for pick in (min, max))
    return f"size between {least:,} and {most:,} bytes; {ready.float_bytes:,} in float"
