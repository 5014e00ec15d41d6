"""``quantkit plan``: what a recipe would do to which layer, whether its budget can be met, how long and how much
memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.allocation.allocate import allocate
from quantkit.allocation.only_plan import only_plan
from quantkit.allocation.what_holds import narrowest
from quantkit.budget import Budget
from quantkit.plan import Composition, Plan
from quantkit.progress import track
from quantkit.recipe.read import DECIDED_LATER, Recipe
from quantkit.recipe.run import inputs_of
from quantkit.stages.forecast import forecast
from quantkit.stages.formatted import Formatted
from quantkit.stages.options import ApplyOptions
from quantkit.stages.quantize import candidates_of
from quantkit.stages.request import Request, make_ready
from quantkit.stages.working_memory import Learning, expected_work

PARTS = 6  # of the text: layers, sites, sizes, what the limits come to, measuring and applying


def forecast_of(recipe: Recipe, progress: bool = False) -> str:
    """The text that ``quantkit plan`` prints. Raises InfeasibleBudget when no plan can meet the recipe's budget."""
    return "\n".join(track(_parts(recipe), "planning", PARTS, progress))


def _parts(recipe: Recipe) -> Iterator[str]:
    """The parts of the text, as they become known."""
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
    yield "\n".join(_layers(request))
    yield f"{len(request.ready.sites)} activation sites"
    yield f"{_sizes(request)}\n{_composition(request)}"
    yield _certain(limit, certain)
    yield _measuring(request, only)
    yield _rounding(request, ApplyOptions(rounding=request.settings["rounding"], memory=recipe.get("memory")))


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


def _rounding(request: Request, options: ApplyOptions) -> str:
    """What rounding by a plan takes. How much is learned after it depends on the plan."""
    recording = request.session.recording(request.ready)
    if not request.batches:
        return "without calibration data rounding takes what the weights take"
    if isinstance(recording, str):
        return f"rounding runs the whole model for every layer: {recording}"
    narrowest = {
        name: min((s.weight for s in schemes if s.weight is not None), key=lambda format: format.bits)
        for name, schemes in request.candidates.items()
    }
    formatted = Formatted(request.ready, narrowest, {}, request.batches)
    expected = expected_work(formatted, recording, options, Learning())
    return f"{expected}; what is learned after it depends on the plan, and is announced then"


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
