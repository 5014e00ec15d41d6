"""A model prepared once for all that is done with it: the verbs work on a session and record nothing again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from quantkit.plan import digest_of
from quantkit.program.inputs import digest_batches, digest_model
from quantkit.program.padding import Padding, are_padded
from quantkit.program.program import Program
from quantkit.progress import warn
from quantkit.rounding import Moments
from quantkit.sensitivity.damage import Reference
from quantkit.sensitivity.measure import Subject
from quantkit.stages.footprint import compared_bytes
from quantkit.stages.inputs import Inputs, require_accepted
from quantkit.stages.recording import Recording, Replay, program_of_sizes, recording_of, replay_of
from quantkit.targets import Target
from quantkit.transforms.plain_weights import copy_with_computed_tensors
from quantkit.transforms.prepare import Prepared, with_half_floats
from quantkit.version import VERSION

FORWARD_BYTES = 1 << 28  # that a batch may take while it passes through the model and its outputs are compared


@dataclass
class Session:
    """The user's ``model``, its data, the target, and the model ``prepared`` with every layer that may be quantized.

    The prepared model is a copy, recorded and with BatchNorm folded. What quantizes it takes it over; ``fork`` gives
    another where it has to stay float.
    """

    model: nn.Module
    inputs: Inputs
    target: Target
    prepared: Prepared
    references: dict[str, Reference] = field(default_factory=dict)
    moments: dict[tuple[str, int, int], dict[str, Moments]] = field(default_factory=dict)

    @classmethod
    def open(cls, model: nn.Module, inputs: Inputs, target: Target) -> Session:
        """Record, fold and copy the model, and try it on every form of batch. Raises InvalidRequest for a model that
        cannot be prepared and for a batch it rejects.
        """
        prepared = inputs.prepared(model, target)
        inputs = inputs.in_batches_of(max(1, FORWARD_BYTES // max(1, compared_bytes(prepared.program, 1))))
        require_accepted(prepared.model, inputs.batches)
        _tell_unreached(prepared)
        session = cls(model, inputs, target, prepared)
        if are_padded(prepared.model, inputs.batches):
            session.prepared = replace(prepared, padding=session._padding())
        return session

    def fork(self) -> Session:
        """The session with a float copy of its own of the prepared model."""
        own = copy_with_computed_tensors(self.prepared.model)
        forked = replace(self, prepared=replace(self.prepared, model=own, weights=self.prepared.weights.on(own)))
        for name in ("replay", "standing", "identity"):  # the same for every copy
            if name in vars(self):
                vars(forked)[name] = vars(self)[name]
        return forked

    def storing_halves(self) -> Session:
        """The session with all that stays float stored as float16."""
        return replace(self, prepared=with_half_floats(self.prepared))

    @cached_property
    def identity(self) -> dict[str, str]:
        """What every figure and every code depends on, whatever is asked for: the model, the data and this version."""
        return {
            "model": digest_model(self.model),
            "operations": _digest_operations(self.prepared.program),
            "calibration": digest_batches(self.inputs.shown),
            "quantkit": VERSION,
        }

    @cached_property
    def replay(self) -> Replay | str:
        """The program that stands for the model, with all samples; or why there is none."""
        return replay_of(self.prepared, self.inputs.batches)

    @cached_property
    def standing(self) -> Program | None:
        """The program that stands for the model, also where batches have several sizes; None where there is none."""
        if isinstance(self.replay, str):
            return program_of_sizes(self.prepared, self.inputs.batches)
        return self.replay.program

    def _padding(self) -> Padding | None:
        """The padding of the calibration inputs; a warning where it cannot be followed through the model."""
        ready, program = self.prepared, self.standing
        if program is not None and ready.example is not None:
            found = Padding.of(program, ready.model, ready.example)
            if found is not None:
                return found
        warn(
            "positions under padding count as data in ranges and rounding: the model could not be recorded at two "
            "lengths, which tells where its values have them. Pad no more than needed."
        )
        return None

    def recording(self, ready: Prepared) -> Recording | str:
        """The replay, cut into blocks by the layers and sites of ``ready``; or why there is none."""
        return self.replay if isinstance(self.replay, str) else recording_of(ready, self.replay)

    def reference(self, loss: str) -> Reference:
        """The float model's outputs on the calibration batches, and the damage that is measured against them."""
        if loss not in self.references:
            ready, batches = self.prepared, self.inputs.batches
            program = self.standing or ready.program
            subject = Subject(ready.model, batches, {}, loss, weights=ready.weights, program=program)
            self.references[loss] = Reference.of(subject)
        return self.references[loss]


def _tell_unreached(prepared: Prepared) -> None:
    """A warning on layers that stay float because no input reaches them, as experts that were never chosen."""
    names = [name for name, layer in prepared.layers.items() if layer.unread]
    if names:
        warn(
            f"no calibration input reaches {', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}: "
            "these layers stay float, no size counts them, and an exported file does not hold them. Where other "
            "inputs use them, as experts, put some of those into the first batch, where the model is recorded."
        )


def _digest_operations(program: Program) -> str:
    """Identifies what a model computes: its class and weights stay the same while its ``forward`` is being edited."""
    return digest_of(
        [
            [str(step.key), step.inputs, step.outputs, [repr(a) for a in step.arguments if _is_plain(a)]]
            for step in program.steps
        ]
    )


def _is_plain(value: Any) -> bool:
    """True for what prints the same in every process."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
