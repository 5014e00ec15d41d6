"""Moments that roundings by the loss of the whole network need, found once for a model and kept with its session."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from quantkit.formats import WeightFormat
from quantkit.progress import notice
from quantkit.rounding import AUTO, Moments, rounding_of
from quantkit.rounding.blocks import HESSIAN_BYTES
from quantkit.rounding.registry import BY_LOSS
from quantkit.sensitivity.kronecker import PASSES, FisherInputs, kronecker_moments, layers_with_factors
from quantkit.session import Session
from quantkit.stages.formatted import Formatted
from quantkit.stages.options import ApplyOptions
from quantkit.transforms.prepare import Prepared


def rounding_for(session: Session, asked: str, formats: Iterable[WeightFormat], alone: bool) -> str:
    """What "auto" stands for: rounding by the loss of the network where a model looks up what it reads in a table, as
    language models do, and weights ``alone`` become integers.
    """
    kinds = session.prepared.program.kinds.values()
    reads_words = {"embedding", "linear"} <= set(kinds) and bool(session.inputs.batches)
    integers = all(format.is_integer or format.is_half for format in formats)
    return BY_LOSS if asked == AUTO and alone and integers and reads_words else asked


def with_rounding(options: ApplyOptions, session: Session, formatted: Formatted) -> ApplyOptions:
    """The options with the rounding that "auto" stands for."""
    found = rounding_for(session, options.rounding, formatted.weights.values(), not formatted.sites)
    return replace(options, rounding=found)


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
    notice(f"rounding by the loss of the network: {PASSES} forward and backward passes for the Hessians of its layers")
    return kronecker_moments(given, layers, generator, progress)
