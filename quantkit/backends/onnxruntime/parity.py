"""Does the file compute what the simulated model computes? Asked of onnxruntime twice, on the same inputs.

Once without optimization, where every operation runs in float as the file spells it: what differs beyond the last bits
of float sums, and the codes these tip over, is a fault of the file. A tipped code tips others behind it, so how much
that may be is a property of the model; it is measured on the simulated model by disturbing the last bit of what it
quantizes. And once as it will be deployed, on integer kernels, which round between layers in their own way by up to
one code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantkit.backends.onnxruntime.sessions import open_session, run_session
from quantkit.errors import ParityError
from quantkit.program.inputs import Batch
from quantkit.program.intercept import OpKey, tensors_of
from quantkit.program.sites import Site, coded_sites
from quantkit.program.updates import plain_mode, restored
from quantkit.simulation.model import SimulatedModel, at_sites, run_with

_HALF_ULP = 2.0**-24  # of a float32 value


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
    """

    output: str
    optimized: bool
    relative_error: float
    worst_error: float
    rounding_noise: float
    top1_agreement: float | None


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square of the difference over that of ``wanted``."""
    error = found.astype(np.float64) - wanted.astype(np.float64)
    return _ratio(
        float(np.sqrt(np.mean(np.square(error)))), float(np.sqrt(np.mean(np.square(wanted, dtype=np.float64))))
    )


def _ratio(error: float, size: float) -> float:
    """``error / size``; infinite where it means nothing, so that it passes no tolerance."""
    if error == 0:
        return 0.0
    return error / size if size and math.isfinite(error) else math.inf


def _compared(
    output: str, optimized: bool, found: np.ndarray, wanted: np.ndarray, disturbed: np.ndarray
) -> OutputParity:
    rows, exact = wanted.ndim > 1 and wanted.shape[-1] > 1, wanted.astype(np.float64)
    return OutputParity(
        output=output,
        optimized=optimized,
        relative_error=relative_error(found, wanted),
        worst_error=_ratio(float(np.abs(found.astype(np.float64) - exact).max()), float(np.ptp(exact))),
        rounding_noise=relative_error(disturbed, wanted),
        top1_agreement=float(np.mean(found.argmax(-1) == wanted.argmax(-1))) if rows else None,
    )


def measure_parity(path: str | Path, simulated: SimulatedModel, batches: Sequence[Batch]) -> tuple[OutputParity, ...]:
    """Compare every output of an ONNX file with the simulated model's, without and with optimization; of batches of
    several sizes the figures are those of the size at which it differs most.
    """
    found: dict[tuple[str, bool], OutputParity] = {}
    for alike in _by_shapes(batches):
        for one in _measured(path, simulated, alike):
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


def _measured(path: str | Path, simulated: SimulatedModel, batches: Sequence[Batch]) -> list[OutputParity]:
    """The comparison on batches of the same sizes."""
    disturb = _disturbance(simulated)
    with plain_mode(simulated.model), restored(simulated.model):
        wanted = _joined([tensors_of(simulated(*args, **kwargs)) for args, kwargs in batches])
        disturbed = _joined([tensors_of(run_with(simulated.model, disturb, *batch)) for batch in batches])
    compared = []
    for optimized in (False, True):
        session = open_session(path, optimized=optimized)
        found = _joined([run_session(session, batch) for batch in batches])
        names = [output.name for output in session.get_outputs()]
        compared += [
            _compared(n, optimized, *arrays) for n, *arrays in zip(names, found, wanted, disturbed, strict=True)
        ]
    return compared


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


def _joined(batches: Sequence[Sequence[Tensor | np.ndarray]]) -> list[np.ndarray]:
    """Each output over all batches."""
    return [
        np.concatenate([np.atleast_1d(np.asarray(part)) for part in parts]) for parts in zip(*batches, strict=True)
    ]


def require_parity(found: Sequence[OutputParity], tolerance: Tolerance) -> None:
    """Raise ParityError with the worst output when any differs by more than ``tolerance``."""
    worst = max(found, key=lambda one: one.relative_error / tolerance.limit(one))
    limit = tolerance.limit(worst)
    if worst.relative_error > limit:
        how = "with integer kernels" if worst.optimized else "without optimization"
        raise ParityError(
            f"The exported file does not compute what the simulated model computes: output {worst.output!r} in "
            f"onnxruntime {how} differs by {worst.relative_error:.2%} (root mean square, relative to the output; the "
            f"largest error is {worst.worst_error:.2%} of its range), the tolerance is {limit:.2%}. No file was "
            "written. If this much is acceptable, pass a larger tolerance; otherwise keep sensitive layers float or "
            "give them 8 bits."
        )
