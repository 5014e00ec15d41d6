"""Does the file compute what the simulated model computes? Asked of onnxruntime twice, on the same inputs.

Once without optimization, where every operation runs in float as the file spells it: what differs beyond the last bits
of float sums, and the codes these tip over, is a fault of the file. A tipped code tips others behind it, so how much
that may be is a property of the model; it is measured on the simulated model by disturbing the last bit of what it
quantizes. And once as it will be deployed, on integer kernels, which round between layers in their own way by up to
one code.

Outputs that are integers or booleans are compared entry by entry. Entries that the last bits decide, as the order of
equal scores, are left out, in floating outputs too where these cannot be compared otherwise: ``ties`` finds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from quantkit.backends.onnxruntime.sessions import open_session, run_session
from quantkit.backends.onnxruntime.ties import Undecided, differing, joined, outputs_with
from quantkit.errors import ParityError
from quantkit.program.inputs import Batch
from quantkit.program.intercept import OpKey, tensors_of
from quantkit.program.outputs import results_of
from quantkit.program.sites import Site, coded_sites
from quantkit.program.updates import plain_mode, restored
from quantkit.progress import notice
from quantkit.simulation.model import SimulatedModel, at_sites

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_HALF_ULP = 2.0**-24  # of a float32 value
_STEPS = 0.5  # of a code: how far integer kernels round from what the file spells
_MOST_UNDECIDED = 0.5  # of an output's entries: beyond that little is left to compare a file on

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Tolerance:
    """The largest root mean square error of an output, relative to the root mean square of that output: ``exact`` on
    top of twice the simulated model's own rounding noise for the file as it is spelled, ``optimized`` on integer
    kernels."""

    exact: float = 5e-3
    optimized: float = 0.10

    def limit(self, found: OutputParity) -> float:
        return self.optimized if found.optimized else self.exact + min(2 * found.rounding_noise, self.optimized)


DEFAULT_TOLERANCE = Tolerance()


@dataclass(frozen=True)
class OutputParity:
    """How far one output of a session is from the simulated model's.

    ``relative_error`` is its root mean square error over the root mean square of the output, ``worst_error`` its
    largest error over the range of the output, ``rounding_noise`` the relative error of the simulated model against
    itself under another rounding of its sums, ``top1_agreement`` the share of rows with the same largest entry (None
    where rows have one entry).

    Of integers and booleans, and where entries are ``undecided`` (a share, of those whose value the last bits decide),
    ``by_entries`` is True: the errors are then the share of the decided entries that differ, floats by more than the
    tolerance.
    """

    output: str
    optimized: bool
    relative_error: float
    worst_error: float
    rounding_noise: float
    top1_agreement: float | None
    by_entries: bool = False
    undecided: float = 0.0


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square of the difference over that of ``wanted``, both of what is finite there; infinite where what is
    not, as logits that are masked, is something else.
    """
    error = _errors(found, wanted)
    size = wanted[np.isfinite(wanted)].astype(np.float64)
    return _ratio(_root_mean_square(error), _root_mean_square(size))


def _errors(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The differences from what is finite in ``wanted``; an infinite one where anything else is not the same."""
    finite = np.isfinite(wanted)
    if not np.array_equal(found[~finite], wanted[~finite]):
        return np.array([np.inf])
    return found[finite].astype(np.float64) - wanted[finite].astype(np.float64)


def _root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def _ratio(error: float, size: float) -> float:
    """``error / size``; infinite where it means nothing, so that it passes no tolerance."""
    if error == 0:
        return 0.0
    return error / size if size and math.isfinite(error) else math.inf


def _compared(output: str, optimized: bool, found: np.ndarray, wanted: np.ndarray, noise: float) -> OutputParity:
    if found.shape != wanted.shape:
        return OutputParity(output, optimized, math.inf, math.inf, noise, None)
    if not np.issubdtype(wanted.dtype, np.floating):
        return _by_entries(output, optimized, found != wanted, None)
    rows, finite = wanted.ndim > 1 and wanted.shape[-1] > 1 and wanted.size, wanted[np.isfinite(wanted)]
    return OutputParity(
        output=output,
        optimized=optimized,
        relative_error=relative_error(found, wanted),
        worst_error=_ratio(
            float(np.abs(_errors(found, wanted)).max(initial=0.0)),
            float(np.ptp(finite.astype(np.float64))) if finite.size else 0.0,
        ),
        rounding_noise=noise,
        top1_agreement=float(np.mean(found.argmax(-1) == wanted.argmax(-1))) if rows else None,
    )


def _by_entries(output: str, optimized: bool, wrong: np.ndarray, undecided: np.ndarray | None) -> OutputParity:
    """``wrong``: the entries that differ; those that are ``undecided`` do not count."""
    share = _share(wrong if undecided is None else wrong & ~undecided)
    return OutputParity(output, optimized, share, share, 0.0, 1 - _share(wrong), True, _share(undecided))


def _share(entries: np.ndarray | None) -> float:
    return 0.0 if entries is None or not entries.size else float(np.mean(entries))


def measure_parity(
    path: str | Path,
    simulated: SimulatedModel,
    batches: Sequence[Batch],
    tolerance: Tolerance = DEFAULT_TOLERANCE,
    save_optimized: str | Path | None = None,
) -> tuple[OutputParity, ...]:
    """Compare every output of an ONNX file with the simulated model's, without and with optimization; of batches of
    several sizes the figures are those of the size at which it differs most. Undecided entries are looked for where an
    output differs by more than ``tolerance``. ``save_optimized``: where the graph that really runs is written.
    """
    groups = _by_shapes(batches)
    ran = {
        optimized: _run(open_session(path, optimized=optimized, save_optimized=save), groups)
        for optimized, save in ((False, None), (True, save_optimized))
    }
    found: dict[tuple[str, bool], OutputParity] = {}
    for k, alike in enumerate(groups):
        for one in _measured({optimized: group[k] for optimized, group in ran.items()}, simulated, alike, tolerance):
            worst = found.setdefault((one.output, one.optimized), one)
            if one.relative_error > worst.relative_error:
                found[one.output, one.optimized] = one
    return tuple(found.values())


def _by_shapes(batches: Sequence[Batch]) -> list[list[Batch]]:
    """Batches of the same sizes together, but for the number of samples."""
    found: dict[object, list[Batch]] = {}
    for batch in batches:
        found.setdefault(tuple(tensor.shape[1:] for tensor in tensors_of(batch)), []).append(batch)
    return list(found.values())


def _run(session: InferenceSession, groups: Sequence[Sequence[Batch]]) -> list[Outputs]:
    """What a session makes of each group of batches."""
    names = [output.name for output in session.get_outputs()]
    outputs = (joined([run_session(session, batch) for batch in batches]) for batches in groups)
    return [dict(zip(names, found, strict=True)) for found in outputs]


def _measured(
    ran: Mapping[bool, Outputs],
    simulated: SimulatedModel,
    batches: Sequence[Batch],
    tolerance: Tolerance,
) -> list[OutputParity]:
    """The comparison on batches of the same sizes of what ``ran`` on them without and with optimization."""
    with plain_mode(simulated.model), restored(simulated.model):
        wanted = joined([results_of(simulated(*args, **kwargs)) for args, kwargs in batches])
    disturbed = outputs_with(simulated, _disturbance(simulated), batches)
    noise = [relative_error(one, other) for one, other in zip(disturbed, wanted, strict=True)]
    undecided = Undecided(simulated, batches, wanted)
    compared = []
    for optimized, found in ran.items():
        ones = [
            _compared(name, optimized, got, expected, noise[i])
            for i, ((name, got), expected) in enumerate(zip(found.items(), wanted, strict=True))
        ]
        # by integer kernels all may turn on a tie, but a file as it is spelled is told by something that does not
        told = optimized or any(not one.by_entries and one.relative_error <= tolerance.limit(one) for one in ones)
        for i, (one, got, expected) in enumerate(zip(ones, found.values(), wanted, strict=True)):
            if one.relative_error > tolerance.limit(one) and got.shape == expected.shape:
                entries = undecided.entries(i, _STEPS if optimized else 0.0)
                if entries.any() and (told or _share(entries) <= _MOST_UNDECIDED):
                    wrong = differing(got, expected, tolerance.optimized if optimized else tolerance.exact)
                    one = _by_entries(one.output, optimized, wrong, entries)
                    _tell(one)
            compared.append(one)
    return compared


def _tell(found: OutputParity) -> None:
    how = "with integer kernels" if found.optimized else "without optimization"
    notice(
        f"{found.undecided:.1%} of output {found.output!r} depends on the last bits, as the order of equal scores "
        f"does: the file was compared on the rest, {how}"
    )


def _disturbance(simulated: SimulatedModel) -> Callable[[OpKey, Tensor], Tensor]:
    """Quantize sites as simulation does, after adding noise of half a unit in the last place of the largest value."""
    generator = torch.Generator().manual_seed(0)

    def quantize(site: Site, tensor: Tensor) -> Tensor:
        noise = (
            torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu")
            * tensor.abs().max()
            * _HALF_ULP
        )
        return simulated.ranges[site.name].fake_quantize(tensor + noise)

    return at_sites(coded_sites(simulated.sites, simulated.ranges), quantize)


def beyond_by_own_noise(found: Sequence[OutputParity], tolerance: Tolerance) -> list[OutputParity]:
    """The outputs that differ by more than ``tolerance``, where each is as near to the file as the simulated model is
    to itself, twice its rounding noise: deep networks that nobody has trained make a last bit as large as they like.
    None where one of them differs by more than that.
    """
    beyond = [one for one in found if one.relative_error > tolerance.limit(one)]
    by_noise = [one for one in beyond if one.relative_error <= tolerance.exact + 2 * one.rounding_noise]
    return beyond if len(by_noise) == len(beyond) else []


def require_parity(found: Sequence[OutputParity], tolerance: Tolerance) -> None:
    """Raise ParityError with the worst output when any differs by more than ``tolerance``."""
    worst = max(found, key=lambda one: one.relative_error / tolerance.limit(one))
    limit = tolerance.limit(worst)
    if worst.relative_error > limit:
        how = "with integer kernels" if worst.optimized else "without optimization"
        decided = worst.undecided > 0
        much = (
            f"in {worst.relative_error:.2%} of its entries{', beside those that the last bits decide' * decided}"
            if worst.by_entries
            else f"by {worst.relative_error:.2%} (root mean square, relative to the output; the largest error is "
            f"{worst.worst_error:.2%} of its range)"
        )
        raise ParityError(
            f"The exported file does not compute what the simulated model computes: output {worst.output!r} in "
            f"onnxruntime {how} differs {much}, the tolerance is {limit:.2%}. No file was "
            "written. If this much is acceptable, pass a larger tolerance; otherwise keep sensitive layers float or "
            "give them 8 bits."
        )
