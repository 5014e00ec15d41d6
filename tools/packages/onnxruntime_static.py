"""onnxruntime's own static quantization: what a user gets who exports with torch and follows its documentation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from .case import Case, arguments, samples

SAMPLES = 100
OPSET = 21


class _Samples(CalibrationDataReader):  # type: ignore[misc]
    """One sample after the other, by the names of a file's inputs."""

    def __init__(self, case: Case, names: list[str]) -> None:
        rows = samples(case.calibration, SAMPLES)
        self.rows: Iterator[dict[str, Any]] = (
            {name: x.numpy() for name, x in zip(names, row, strict=True)} for row in rows
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self.rows, None)


def quantized_by_onnxruntime(case: Case, folder: Path) -> Path:
    """Export, preprocess, and quantize activations to 8 unsigned bits, weights to 8 bits for each channel."""
    plain, ready, path = folder / "float.onnx", folder / "preprocessed.onnx", folder / "static.onnx"
    export_float(case.model, case, plain)
    quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)  # it gives up on sizes of transformers
    names = [one.name for one in onnx.load(ready).graph.input]
    quantize_static(
        str(ready),
        str(path),
        _Samples(case, names),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return path


def export_float(model: nn.Module, case: Case, path: Path) -> None:
    """The float network as torch exports it, with the sizes of the case open."""
    args, kwargs = arguments(case.calibration[0])
    shapes = [dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in case.open_sizes]
    torch.onnx.export(
        model, args, path, kwargs=kwargs, dynamo=True, opset_version=OPSET, verbose=False, external_data=False,
        dynamic_shapes=dict(zip(kwargs, shapes, strict=True)) if kwargs else tuple(shapes),
    )  # fmt: skip
