"""The program of a model that replays can be taken from."""

from __future__ import annotations

from torch import nn

from quantkit.program.inputs import Batch
from quantkit.program.program import Program
from quantkit.program.record import record
from quantkit.program.replayable import replayable


def program_of(model: nn.Module, batch: Batch, *others: Batch) -> Program | None:
    """The program of ``model``, recorded on ``batch``; None where a replay would compute something else."""
    return replayable(record(model, batch), model, batch, others)
