"""The options of the verbs as frozen records: what a person may choose, checked where it is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from quantkit.budget import read_bytes
from quantkit.errors import InvalidRequest, did_you_mean
from quantkit.formats import Scheme
from quantkit.ranges.activations import RANGES
from quantkit.reconstruction.blocks import RECONSTRUCTIONS
from quantkit.reconstruction.corrections import CORRECTIONS
from quantkit.reconstruction.learning import LearningOptions
from quantkit.rounding import AUTO, ROUNDINGS
from quantkit.sensitivity import ESTIMATORS
from quantkit.sensitivity.outputs import LOSSES
from quantkit.stages.first_last import FIRST_LAST, SAME
from quantkit.stages.inputs import Inputs
from quantkit.targets.rules import Rules
from quantkit.transforms.known import TRANSFORMS

Schemes = Sequence[str | Scheme]
FLOAT32, FLOAT16 = "float32", "float16"  # as what is stored that stays float
REPARAMETERIZATIONS = (
    "auto", "none", "norm", "clip", "reads", "softmax", "norm+softmax", "clip+softmax", "clip+reads", "reads+softmax",
    "clip+reads+softmax",
)  # fmt: skip


def asked_transforms(asked: str) -> list[str]:
    """The transforms that are looked at, in the order in which they are made; raises InvalidRequest for others."""
    if asked in ("auto", "none"):
        return list(TRANSFORMS) if asked == "auto" else []
    names = [name.strip() for name in asked.split(",")]
    for name in names:
        choose("transforms", name, ("auto", "none", *TRANSFORMS))
    return [name for name in TRANSFORMS if name in names]


def choices() -> dict[str, tuple[str, ...]]:
    """The names that each argument may take, those registered so far among them."""
    return {
        "sensitivity": ("auto", *ESTIMATORS),
        "rounding": (AUTO, *ROUNDINGS),
        "ranges": tuple(RANGES),
        "reconstruction": RECONSTRUCTIONS,
        "correction": CORRECTIONS,
        "reparameterization": REPARAMETERIZATIONS,
        "loss": ("auto", *LOSSES),
        "first_last": FIRST_LAST,
        "float_storage": (FLOAT32, FLOAT16),
    }


@dataclass(frozen=True)
class ProfileOptions:
    """What is measured, and how: the candidates and the names in ``choices``. ``everywhere``: the one candidate is
    for every layer that can take it, and the others stay float. ``float_storage``: as what is stored that stays
    float. ``memory``: as much, "4 GB", may be taken beyond the model and its inputs.
    """

    schemes: Schemes | None = None
    everywhere: bool = False
    rules: Rules | None = None
    first_last: str = SAME
    float_storage: str = FLOAT32
    loss: str = "auto"
    sensitivity: str = "auto"
    rounding: str = "auto"
    ranges: str = "mse"
    seed: int = 0
    memory: str | None = None
    transforms: str = "auto"

    def __post_init__(self) -> None:
        require_choices(**chosen(self))
        require_memory(self.memory)
        asked_transforms(self.transforms)


@dataclass(frozen=True)
class ApplyOptions:
    """How a plan is met, by the names in ``choices``, within which ``memory``; a correction that is None is off."""

    rounding: str = "auto"
    ranges: str = "mse"
    reconstruction: str = "auto"
    correction: str = "auto"
    loss: str = "auto"
    seed: int = 0
    reparameterization: str = "auto"
    memory: str | None = None
    learning: LearningOptions = field(default_factory=LearningOptions)  # not among what the verbs ask for

    def __post_init__(self) -> None:
        require_choices(**chosen(self))
        require_memory(self.memory)

    def require_known(self, inputs: Inputs) -> None:
        """Raise InvalidRequest for what needs data that is not there."""
        inputs.require_none(
            reconstruction=self.reconstruction, correction=self.correction, reparameterization=self.reparameterization
        )

    def with_inputs(self, inputs: Inputs, schemes: Iterable[Scheme]) -> ApplyOptions:
        """The options for ``schemes``, given the data at hand; raises InvalidRequest for what needs data that is not
        there.
        """
        inputs.require_schemes(schemes)
        self.require_known(inputs)
        return replace(self, rounding=inputs.rounding(self.rounding))


@dataclass(frozen=True)
class Run:
    """How a stage runs, which does not change what comes of it: progress shown, and where finished pieces are kept."""

    progress: bool = True
    workdir: Path | None = None


def chosen(options: ProfileOptions | ApplyOptions) -> dict[str, str]:
    """The options that are names in ``choices``."""
    return {field.name: getattr(options, field.name) for field in fields(options) if field.name in choices()}


def choose(name: str, value: str, known: Iterable[str] | Mapping[str, Any]) -> None:
    """Raise InvalidRequest, with the known names, for a name that is none of them."""
    if value not in (names := list(known)):
        raise InvalidRequest(f"Unknown {name} {value!r}; known: {', '.join(names)}.{did_you_mean(str(value), names)}")


def require_memory(asked: str | None) -> None:
    """Raise InvalidRequest for what is no amount of memory."""
    if asked is not None:
        read_bytes("memory", asked)


def require_choices(**asked: str) -> None:
    """Raise InvalidRequest for a name that is not among the ``choices`` of its argument."""
    for name, value in asked.items():
        choose(name, value, choices()[name])
