"""Measuring layer by layer and site by site, without repeating what a killed run had finished."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from quantkit.progress import track
from quantkit.sensitivity.measure import Perturbation, Place, Subject
from quantkit.store import Codec

Found = Mapping[str, np.ndarray]


def by_place(
    subject: Subject,
    perturbations: Sequence[Perturbation],
    estimator: str,
    progress: bool,
    measure: Callable[[int], Found],
) -> Iterator[tuple[int, Found]]:
    """(k, ``measure(k)``) of every perturbation k, all formats of a layer or site one after the other.

    A place that the subject's artefacts have whole is not measured again; others are kept as soon as they are
    finished. ``measure`` must not depend on the order it is called in.
    """
    if subject.artefacts.folder is None:
        work: Iterable[tuple[int, Found]] = ((k, measure(k)) for k in range(len(perturbations)))
    else:
        work = _places(subject, perturbations, estimator, measure)
    return track(work, "measuring formats", len(perturbations), progress)


def _places(
    subject: Subject, perturbations: Sequence[Perturbation], estimator: str, measure: Callable[[int], Found]
) -> Iterator[tuple[int, Found]]:
    def measured(place: Place, members: Sequence[int]) -> list[Found]:
        name = f"{estimator}: {'site' if place[1] else 'layer'} {place[0]}"
        key = [digest_changes([perturbations[k] for k in members]), digest_changes(subject.base)]
        return subject.artefacts.cached(name, key, lambda: [measure(k) for k in members], ROWS)

    for place, members in members_of(perturbations).items():
        yield from zip(members, measured(place, members), strict=True)


ROWS: Codec[list[Found]] = Codec(
    lambda rows: ({name: np.stack([row[name] for row in rows]) for name in rows[0]}, ""),
    lambda arrays, note: [dict(zip(arrays, row, strict=True)) for row in zip(*arrays.values(), strict=True)],
)


def members_of(perturbations: Iterable[Perturbation]) -> dict[Place, list[int]]:
    """Which perturbations change the same layer or site, in order of first appearance."""
    members: dict[Place, list[int]] = {}
    for k, p in enumerate(perturbations):
        members.setdefault(p.place, []).append(k)
    return members


def digest_changes(perturbations: Iterable[Perturbation]) -> str:
    """Identifies perturbations by owner, format, and every code, scale and zero point."""
    hasher = hashlib.sha256()
    for p in perturbations:
        hasher.update(repr((p.owner, p.format)).encode())
        hasher.update(p.change.fingerprint())
    return hasher.hexdigest()[:16]
