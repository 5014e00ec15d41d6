"""What a request may go by: calibration data, one example of the model's inputs, or the model alone.

Without calibration data nothing is known of activations: only weights are quantized, by what is known of weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme
from quantkit.program.input_shapes import form_of
from quantkit.program.inputs import Batch, batch_size, read_batches, split_batches
from quantkit.program.intercept import tensors_of
from quantkit.program.record import run_model
from quantkit.progress import notice
from quantkit.rounding import AUTO, WITHOUT_INPUTS, names_without_inputs
from quantkit.sensitivity import NO_INPUTS
from quantkit.targets import Target
from quantkit.transforms.prepare import Prepared, prepare, prepare_unrecorded

BATCH = 128
TOKENS = 1 << 11  # of a batch: each is a row of values, and often of as many logits as there are words
_PASS = "Pass calibration=, a few hundred typical inputs; labels are not needed"


@dataclass(frozen=True)
class Inputs:
    """The calibration ``batches``, none without data, and an ``example`` to trace the model on, None without one."""

    batches: list[Batch]
    example: Batch | None

    @classmethod
    def of(cls, model: nn.Module, calibration: Any, example_inputs: Any, samples: int | None) -> Inputs:
        """Reads the data once, in batches of at most ``BATCH`` samples; ``example_inputs`` is one batch, only for
        requests without data.
        """
        if calibration is not None:
            if example_inputs is not None:
                raise InvalidRequest("example_inputs is for quantizing without data: leave it or calibration out.")
            batches = calibration_batches(model, calibration, samples)
            return cls(batches, batches[0])
        if not isinstance(model, nn.Module):
            raise InvalidRequest(f"The model must be a torch.nn.Module, not {type(model).__name__}.")
        if example_inputs is None:
            return cls([], None)
        return cls([], read_batches(model, [example_inputs])[0])

    def in_batches_of(self, most: int) -> Inputs:
        """The same in batches of at most so many samples."""
        if all(batch_size(batch) <= most for batch in self.batches):
            return self
        return replace(self, batches=split_batches(self.batches, most))

    @property
    def shown(self) -> list[Batch]:
        """What there is to show the model's inputs by: the batches, or the example."""
        return self.batches or ([] if self.example is None else [self.example])

    def prepared(self, model: nn.Module, target: Target) -> Prepared:
        """The model made ready."""
        return prepare_unrecorded(model, target) if self.example is None else prepare(model, self.shown, target)

    def require_schemes(self, schemes: Iterable[Scheme]) -> None:
        """Raise InvalidRequest for schemes whose activations need data that is not there, and where only some layers
        would quantize theirs.
        """
        quantized = [scheme for scheme in schemes if scheme.has_codes]
        coded = [scheme for scheme in quantized if scheme.activation is not None]
        dynamic = [scheme for scheme in coded if scheme.activation is not None and scheme.activation.dynamic]
        if 0 < len(dynamic) < len(coded):
            static = next(scheme for scheme in coded if scheme not in dynamic)
            raise InvalidRequest(
                f"{static} beside {dynamic[0]}: ranges known before in some layers and found token by token in others "
                f"are not supported yet. Use {static.weight}{dynamic[0].activation}, or static activations everywhere."
            )
        if coded and not self.batches:
            self._require_no_ranges(coded)
        if coded and len(coded) < len(quantized):
            alone = next(scheme for scheme in quantized if scheme.activation is None)
            raise InvalidRequest(
                f"{alone} beside {coded[0]}: weights alone in some layers and activations too in others is not "
                f"supported yet. Use {alone}{coded[0].activation}, or leave activations out everywhere."
            )

    def _require_no_ranges(self, coded: Sequence[Scheme]) -> None:
        """Raise InvalidRequest for activations that cannot be quantized, or chosen, without data."""
        formats = list(dict.fromkeys(scheme.activation for scheme in coded if scheme.activation is not None))
        if not formats[0].dynamic:
            raise InvalidRequest(
                f"{coded[0]} quantizes activations, and without data nothing is known of their ranges. {_PASS}; or "
                f"ask for weights only, as in schemes=['{coded[0].weight}']."
            )
        if self.example is None:
            raise InvalidRequest(
                f"{coded[0]} quantizes what layers read, and without any input nobody knows where they read it: pass "
                "example_inputs=, one batch of model inputs."
            )
        if len(formats) > 1:
            raise InvalidRequest(
                f"{formats[0]} and {formats[1]}: without data nothing tells what activations of fewer bits would do. "
                f"{_PASS}; or use one activation format in all schemes."
            )

    def rounding(self, asked: str) -> str:
        """The rounding to use; raises InvalidRequest for one that looks at inputs that are not there."""
        if self.batches or asked in names_without_inputs():
            return asked
        return WITHOUT_INPUTS if asked == AUTO else self._refuse("rounding", asked, names_without_inputs())

    def sensitivity(self, asked: str) -> str:
        """The estimator to use, "auto" where that is up to the model; raises InvalidRequest for one that measures on
        inputs that are not there.
        """
        if asked == "auto" and not self.batches:
            return "weight-error"
        return asked if self.batches or asked in NO_INPUTS else self._refuse("sensitivity", asked, sorted(NO_INPUTS))

    def require_none(self, **asked: str) -> None:
        """Raise InvalidRequest, without data, for what would be learned or measured on it."""
        for name, value in asked.items():
            if not self.batches and value not in ("auto", "none", "fast"):
                self._refuse(name, value, ["fast" if name == "effort" else "none"])

    def _refuse(self, name: str, asked: str, others: Sequence[str]) -> str:
        known = " or ".join(f"{name}={other!r}" for other in others)
        raise InvalidRequest(f"{name}={asked!r} needs data. {_PASS}; or {known}.")


def calibration_batches(model: nn.Module, calibration: Any, samples: int | None) -> list[Batch]:
    """The calibration data, read once, in batches of at most ``BATCH`` samples and about ``TOKENS`` tokens."""
    if samples is not None and samples < 1:
        raise InvalidRequest(f"samples={samples}: at least one calibration sample is needed.")
    batches = read_batches(model, calibration, samples)
    return [part for batch in batches for part in split_batches([batch], _samples_at_once(batch))]


def _samples_at_once(batch: Batch) -> int:
    whole = (t for t in tensors_of(batch) if t.dim() > 1 and not t.is_floating_point() and len(t))
    tokens = max((t.numel() // len(t) for t in whole), default=1)
    return max(1, min(BATCH, TOKENS // max(1, tokens)))


def require_accepted(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Run the model on one batch of every form beyond the first batch's, which it was traced on: raises InvalidRequest
    for what it rejects.
    """
    seen = {form_of(batch) for batch in batches[:1]}
    for batch in batches[1:]:
        if (form := form_of(batch)) not in seen:
            seen.add(form)
            run_model(model, batch)


def tell_what_is_missing(inputs: Inputs, offered: Iterable[Scheme]) -> None:
    """A notice on what a request without data, or without an example, does not know."""
    if inputs.batches:
        return
    only = "widths of weights" if any(scheme.activation is not None for scheme in offered) else "weights only"
    traced = "" if inputs.example is not None else "; without example_inputs no BatchNorm is folded either"
    notice(f"no calibration data: {only}, by the error of the weights{traced}")
