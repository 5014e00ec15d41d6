"""What is measured of one network: quantized, stored, exported, compared; and where it stopped."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

import quantkit
from quantkit.backends.onnxruntime.marks import OPSET
from quantkit.backends.onnxruntime.parity import measure_parity, relative_error
from quantkit.backends.onnxruntime.sessions import feeds, open_session
from quantkit.program.inputs import as_batch
from quantkit.program.ownership import UNREAD, ownership
from quantkit.program.record import record
from quantkit.program.updates import restored

from .entry import Entry, run

SAMPLES, BATCHES, UNSEEN = 4, 2, 100  # UNSEEN: the seed of inputs that nothing was decided on
MANY = 4_000_000  # parameters from which on weights are rounded to nearest: GPTQ of all of them takes minutes
NEAREST: dict[str, Any] = {"rounding": "nearest", "correction": "none"}
_ONLY_ADDED = "only added or multiplied"  # how the ownership of a table that is in no product says so
# Operators that onnxruntime computes products with in integers.
_INTEGER = {"QLinearConv", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
_INTEGER |= {"QLinearMatMul", "QGemm", "QAttention", "MatMulNBits", "DynamicQuantizeLSTM"}

Record = dict[str, Any]
Tell = Callable[[Record], None]


def measure(entry: Entry, budget: str, tell: Tell) -> None:
    """Tell everything about a network, piece by piece, so that what is known survives a stop."""
    model: nn.Module | None = None
    try:
        tell({"stage": "build"})
        model = entry.model()
        parameters = sum(p.numel() for p in model.parameters())
        tell({"parameters": parameters})
        tell({"stage": "run"})
        with torch.no_grad(), restored(model):
            run(model, entry.inputs(SAMPLES, 0))
        options = entry.options if parameters < MANY else NEAREST | entry.options
        result = _quantized(entry, model, budget, options, tell)
        _exported(entry, result, tell)
        tell({"stage": "done"})
    except Exception as error:  # whatever it is, it is what this tool is there to tell
        tell({"failure": failure(error)})
        if isinstance(error, ImportError | MemoryError) or model is None:
            return
        tell({"plain": plain_export(model, entry.inputs(SAMPLES, UNSEEN))})


def _quantized(entry: Entry, model: nn.Module, budget: str, options: dict[str, Any], tell: Tell) -> quantkit.Result:
    tell({"stage": "quantize"})
    start = time.process_time()
    calibration = [entry.inputs(SAMPLES, seed) for seed in range(BATCHES)]
    try:
        result = quantkit.quantize(model, budget, calibration, progress=False, **options)
    finally:
        tell({"quantize_seconds": time.process_time() - start})
    tell({"quantized": True, "share": stored_share(result, calibration[0])})
    return result


def _exported(entry: Entry, result: quantkit.Result, tell: Tell) -> None:
    tell({"stage": "export"})
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path, optimized = Path(folder) / "model.onnx", Path(folder) / "optimized.onnx"
        report = result.export_onnx(path)
        tell({"exported": True, "export_seconds": time.process_time() - start, "file_bytes": report.file_bytes})
        tell({"stage": "compare"})
        tell(_compared(entry, result, path))
        open_session(path, save_optimized=optimized)
        tell({"kernels": integer_kernels(onnx.load(optimized, load_external_data=False))})


def stored_share(result: quantkit.Result, item: Any) -> float:
    """The share of weights that are stored at 8 bits or fewer: of the elements of floating-point parameters of two or
    more dimensions, ties once, without tables that are only added or multiplied element by element.
    """
    simulated = result.simulated()
    model, weights = simulated.model, simulated.weights
    owned = ownership(model, record(model, as_batch(item)))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    narrow = total = 0
    for part in owned:
        parameter = parameters.get(part.name)
        if parameter is None or parameter.dim() < 2 or not parameter.is_floating_point():
            continue
        if _ONLY_ADDED not in part.reason and part.reason != UNREAD:
            total += part.elements
            narrow += part.elements if part.layer in weights and weights[part.layer].format.bits <= 8 else 0
    return narrow / total if total else 1.0


def _compared(entry: Entry, result: quantkit.Result, path: Path) -> Record:
    """The error of the file on unseen inputs, what of it the network's own rounding makes, and the sizes it takes.

    ``noise`` is the error of the quantized model against itself under another rounding of its sums, ``undecided`` the
    share of an output's entries that such roundings decide, as the order of equal scores does.
    """
    session = open_session(path, optimized=False)
    dynamic = {size for given in session.get_inputs() for size in given.shape if isinstance(size, str)}
    item = entry.inputs(SAMPLES - 1 if dynamic else SAMPLES, UNSEEN)
    with torch.no_grad():
        error = file_error(path, run(result.model, item), item)
    exact = [one for one in measure_parity(path, result.simulated(), [as_batch(item)]) if not one.optimized]
    own = {"noise": max(one.rounding_noise for one in exact), "undecided": max(one.undecided for one in exact)}
    return {"sizes": sorted(dynamic), "error": error, **own}


def file_error(path: Path, outputs: Any, item: Any) -> float:
    """The relative error of a file, run without optimization on ``item``, against the model's ``outputs``; the worst
    of all.
    """
    session = open_session(path, optimized=False)
    found = [x for x in session.run(None, feeds(session, as_batch(item))) if x.dtype.kind == "f"]
    return max(relative_error(one, other) for one, other in zip(found, _floating(outputs), strict=True))


def _floating(outputs: Any) -> list[np.ndarray]:
    from quantkit.program.outputs import results_of

    return [tensor.numpy() for tensor in results_of(outputs) if tensor.is_floating_point()]


def integer_kernels(model: onnx.ModelProto) -> dict[str, int]:
    """How many products the optimized graph computes in integers, by operator, those inside loops too."""
    found: Counter[str] = Counter()
    graphs = [model.graph]
    for graph in graphs:  # grows while it is read
        found.update(node.op_type for node in graph.node if node.op_type in _INTEGER)
        graphs += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return dict(sorted(found.items()))


def plain_export(model: nn.Module, item: Any) -> Record:
    """Does torch's own exporter write the float model, and does onnxruntime run what it wrote?"""
    args, kwargs = as_batch(item)
    with tempfile.TemporaryDirectory() as folder:
        path, done = Path(folder) / "plain.onnx", ""
        try:
            with restored(model):
                torch.onnx.export(model, args, path, kwargs=kwargs, dynamo=True, opset_version=OPSET, verbose=False)
            done = "exported"
            session = open_session(path)
            session.run(None, feeds(session, (args, kwargs)))
        except Exception as error:  # as above
            return {"reached": done or "nothing", "failure": failure(error)}
    return {"reached": "ran"}


def failure(error: BaseException) -> Record:
    """An error in one line, whether it was raised on purpose, and the innermost place in the package."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/quantkit/" in frame.filename]
    place = f"{frames[-1].filename.rpartition('/quantkit/')[2]}:{frames[-1].lineno}" if frames else ""
    line = str(error).strip().partition("\n")[0]
    return {
        "type": type(error).__name__,
        "line": line,
        "deliberate": isinstance(error, quantkit.QuantkitError),
        "place": place,
    }
