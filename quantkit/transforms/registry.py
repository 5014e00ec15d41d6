"""Transforms: changes of a float model that leave what it computes as it is, and make it easier to quantize."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from quantkit.errors import InvalidRequest
from quantkit.formats import ActivationFormat, WeightFormat
from quantkit.program.inputs import Batch
from quantkit.transforms.change import Change
from quantkit.transforms.prepare import Prepared

Place = TypeVar("Place")


@dataclass(frozen=True)
class Setting:
    """What a transform goes by: a model that is still float, calibration data, and the narrowest formats that layers
    and the sites of ``ready`` may get.
    """

    ready: Prepared
    batches: Sequence[Batch]
    weights: Mapping[str, WeightFormat]
    sites: Mapping[str, ActivationFormat]
    seed: int = 0


@dataclass(frozen=True)
class Proposal:
    """The changes that a transform would make, none where nothing is gained, and why it leaves other parts alone."""

    changes: tuple[Change, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Transform:
    """``propose`` finds the changes for a setting; ``redo`` makes them from their records again, and raises
    InvalidRequest for a record that names what the model does not have. The model stays as it is.
    """

    propose: Callable[[Setting], Proposal]
    redo: Callable[[Setting, Sequence[Mapping[str, Any]]], tuple[Change, ...]]


TRANSFORMS: dict[str, Transform] = {}  # in the order in which they are tried


def recorded(records: Sequence[Mapping[str, Any]], known: Mapping[str, Place], doing: str) -> list[Place]:
    """Where a plan made each change, of the places that a model has, by name. ``doing`` says what it did there. Raises
    InvalidRequest for a place that the model does not have.
    """
    for record in records:
        if record["at"] not in known:
            raise InvalidRequest(
                f"The plan {doing} {record['at']!r}, which the model does not have; it has "
                f"{', '.join(known) or 'none'}. Is it the model that the plan was made for? transforms='none' applies "
                "the plan without any."
            )
    return [known[record["at"]] for record in records]
