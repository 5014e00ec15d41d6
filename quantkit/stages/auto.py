"""What "auto" stands for, by what a model is and what becomes codes: its loss and its rounding."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from quantkit.formats import EIGHT_BITS, WeightFormat
from quantkit.program.representations import is_representation
from quantkit.rounding import AUTO
from quantkit.rounding.registry import BY_LOSS
from quantkit.session import Session
from quantkit.stages.formatted import Formatted
from quantkit.stages.options import ApplyOptions


def loss_for(session: Session, asked: str) -> str:
    """The squared error where the model's answer is a representation; else "auto", by which each output is compared
    as ``OutputRule`` says.
    """
    return "mse" if asked == AUTO and is_representation(session.prepared.program) else asked


def rounding_for(session: Session, asked: str, formats: Collection[WeightFormat]) -> str:
    """What "auto" stands for: rounding by the loss of the network where that reads tokens and weights become integers
    of less than 8 bits.
    """
    integers = all(format.is_integer or format.is_half for format in formats)
    narrow = any(format.is_integer and format.bits < EIGHT_BITS for format in formats)
    reads_tokens = "embedding" in session.prepared.program.kinds.values()
    fits = integers and narrow and reads_tokens and bool(session.inputs.batches)
    return BY_LOSS if asked == AUTO and fits else asked


def with_auto_decided(options: ApplyOptions, session: Session, formatted: Formatted) -> ApplyOptions:
    """The options with the loss and the rounding that "auto" stands for."""
    found = rounding_for(session, options.rounding, formatted.weights.values())
    return replace(options, rounding=found, loss=loss_for(session, options.loss))
