"""One row of the study, measured: what is asked of quantkit, what came of it, and what it took."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from study_promises import Meter
from torch import nn

import quantkit
from quantkit.errors import QuantkitError

from .rows import Row
from .subjects import Places, Subject, subject

MB = 1e6
FLOAT_BITS = 32
Record = dict[str, Any]


def measured(row: Row, places: Places) -> Record:
    """The figures of a row, or under "refused" why it cannot be had."""
    known = subject(row.subject, places)
    meter = Meter()
    try:
        result = quantized(row, known)
    except QuantkitError as error:
        return {"refused": str(error)}
    found: Record = {"seconds": meter.seconds}
    if row.metered:
        found |= cost(row, known, meter)
    found |= sizes(row, known, result) | known.scores(result.model)
    if row.file:
        found |= file_of(result)
    return found


def quantized(row: Row, known: Subject, **more: Any) -> quantkit.Result:
    """What the row asks for."""
    options = dict(row.options)
    pinned = known.pinned if row.linears else ()
    if pinned:
        options["rules"] = dict.fromkeys(pinned, "float")
    return quantkit.quantize(
        known.model, budget_of(row, known.model, pinned), known.calibration, progress=False, **options, **more
    )


def budget_of(row: Row, model: nn.Module, pinned: tuple[str, ...]) -> str:
    """The row's budget, over all layers: those that keep their numbers count as such."""
    bits, unit, _ = row.budget.partition(" bits")
    if not (unit and pinned):
        return row.budget
    every, kept = weights_of(model), weights_of(model, pinned)
    return f"{(float(bits) * (every - kept) + FLOAT_BITS * kept) / every:.6f} bits"


def weights_of(model: nn.Module, names: tuple[str, ...] | None = None) -> int:
    """Weights of the linears and tables of a model, or of those with these names."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    return sum(m.weight.numel() for n, m in layers.items() if names is None or n in names)


def sizes(row: Row, known: Subject, result: quantkit.Result) -> Record:
    """Average bits, of the linears alone where the row is about them; bytes; and the layers that stayed float."""
    bits = result.plan.average_bits
    if row.linears:
        every, kept = weights_of(known.model), weights_of(known.model, known.pinned)
        bits = (bits * every - FLOAT_BITS * kept) / (every - kept)
    floats = [name for name, scheme in result.plan.schemes.items() if scheme.is_float]
    pinned = len(known.pinned) if row.linears else 0
    read = [n for n, s in result.plan.schemes.items() if s.weight is not None and s.activation is None]
    reads_codes = any(s.activation is not None for s in result.plan.schemes.values())
    return {
        "bits": bits,
        "MB stored": result.plan.total_bytes / MB,
        "float": len(floats) - pinned,
        "weights alone": len(read) if reads_codes else 0,
    }


def file_of(result: quantkit.Result) -> Record:
    """The size of the ONNX file, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return {"MB file": result.export_onnx(Path(folder) / "model.onnx").file_bytes / MB}
        except QuantkitError as error:
            return {"file": f"not exported: {error}"}


def cost(row: Row, known: Subject, meter: Meter) -> Record:
    """Memory above what was there after loading, and time in float passes over the calibration data: of the whole
    call, and of learning, by the same call without it.
    """
    taken = {"MB": meter.bytes / MB}
    once = pass_seconds(known)
    whole, start = meter.seconds, time.process_time()
    quantized(row, known, reconstruction="none", correction=None)
    rounding = time.process_time() - start
    return taken | {"passes": whole / once, "learning": (whole - rounding) / once}


@torch.no_grad()
def pass_seconds(known: Subject) -> float:
    """Processor seconds of one float pass over the calibration data."""
    known.model(**known.calibration[0])
    start = time.process_time()
    for batch in known.calibration:
        known.model(**batch)
    return time.process_time() - start
