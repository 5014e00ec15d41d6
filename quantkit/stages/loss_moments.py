"""Moments that roundings by the loss of the whole network need, found once for a model and kept with its session."""

from __future__ import annotations

import torch

from quantkit.progress import notice
from quantkit.rounding import Moments, rounding_of
from quantkit.rounding.blocks import HESSIAN_BYTES
from quantkit.sensitivity.kronecker import PASSES, FisherInputs, kronecker_moments, layers_with_factors
from quantkit.session import Session
from quantkit.stages.options import ApplyOptions
from quantkit.transforms.prepare import Prepared


def loss_moments(
    session: Session, ready: Prepared, options: ApplyOptions, progress: bool, rewritten: bool = False
) -> dict[str, Moments]:
    """Kronecker factors of the Hessian of the damage for the layers that have any; none for other roundings than by
    the loss. They are found once for a model, and again where it was ``rewritten`` for a plan.
    """
    if not rounding_of(options.rounding).fisher or not session.inputs.batches:
        return {}
    if rewritten:
        return _found(session, ready, options.loss, options.seed, progress)
    key = (options.loss, options.seed, len(ready.changes))
    if key not in session.moments:
        session.moments[key] = _found(session, ready, options.loss, options.seed, progress)
    return session.moments[key]


def _found(session: Session, ready: Prepared, loss: str, seed: int, progress: bool) -> dict[str, Moments]:
    layers = layers_with_factors(ready.program, ready.quantizable, HESSIAN_BYTES)
    damage, generator = session.reference(loss).damage, torch.Generator().manual_seed(seed)
    given = FisherInputs(ready.model, ready.program, session.inputs.batches, damage)
    notice(f"rounding by the loss of the network: {PASSES} passes over the inputs for the Hessians of its layers")
    return kronecker_moments(given, layers, generator, progress)
