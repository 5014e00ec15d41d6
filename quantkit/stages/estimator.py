"""Which estimator "auto" is: measuring every format, or, where that is too much, a fixed number of backward passes."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.errors import InvalidRequest
from quantkit.program.inputs import Batch, batch_size, first_samples
from quantkit.progress import notice
from quantkit.sensitivity import COSTS
from quantkit.sensitivity.fisher import try_gradients
from quantkit.sensitivity.measure import Subject
from quantkit.sensitivity.registry import Workload
from quantkit.transforms.prepare import Prepared

MEASURED, DIFFERENTIATED = "gram", "fisher"
MOST_MEASURED = 2e13  # multiply-accumulates: about a quarter of an hour of one core


def estimator_for(ready: Prepared, batches: Sequence[Batch], loss: str, formats: int, places: int) -> str:
    """The estimator that measures each of so many ``formats`` of layers and sites, up to ``MOST_MEASURED``
    multiply-accumulates of forwards; beyond, the one whose passes do not grow with the formats, if the model can be
    differentiated.
    """
    samples = sum(map(batch_size, batches))
    forwards = {n: COSTS[n].forwards(Workload(formats, places, samples)) for n in (MEASURED, DIFFERENTIATED)}
    macs = samples * sum(layer.macs for layer in ready.layers.values())
    if macs * forwards[MEASURED] <= MOST_MEASURED or forwards[DIFFERENTIATED] >= forwards[MEASURED]:
        return MEASURED
    try:
        some = [first_samples(batch, 1) for batch in batches[:1]]
        try_gradients(Subject(ready.model, some, {}, loss, weights=ready.weights))
    except InvalidRequest as error:
        notice(f"sensitivity={MEASURED!r}, though it takes {forwards[MEASURED]:.0f} forwards: {error}")
        return MEASURED
    notice(
        f"sensitivity={DIFFERENTIATED!r}: what {forwards[DIFFERENTIATED]:.0f} forwards of the samples take, where "
        f"{MEASURED!r} takes {forwards[MEASURED]:.0f}, more than {MOST_MEASURED:.0e} multiply-accumulates"
    )
    return DIFFERENTIATED
