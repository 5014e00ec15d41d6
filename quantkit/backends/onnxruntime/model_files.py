"""An ONNX model on disk: one file, or a graph with its tensors in a second file beside it.

Two where one cannot hold them, as protobuf's messages end at 2 GiB, or where that is asked for. ONNX calls the second
its external data; the graph names it without a folder, so that both can be moved together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from quantkit.backends.onnxruntime.translated import first_line
from quantkit.backends.onnxruntime.weight_forms import IR_VERSION
from quantkit.errors import QuantkitError
from quantkit.store import data_file

LARGEST_FILE = (1 << 31) - 1  # bytes, protobuf's limit for one message
PAGE = 4096  # bytes: ONNX wants offsets at multiples, which can be mapped; smaller tensors stay in the graph


@dataclass(frozen=True)
class ModelFiles:
    """What is written of a model: the graph, and the tensors that lie apart from it, which are not copied.

    ``offsets`` are the bytes in the data file at which each of ``apart`` begins.
    """

    graph: onnx.ModelProto
    apart: tuple[ir.TensorProtocol, ...] = ()
    offsets: tuple[int, ...] = ()

    @property
    def data_bytes(self) -> int:
        return self.offsets[-1] + int(self.apart[-1].nbytes) if self.apart else 0

    @property
    def file_bytes(self) -> int:
        """Bytes of the graph and the tensors apart from it."""
        return int(self.graph.ByteSize()) + self.data_bytes

    def write(self, path: Path) -> None:
        """Write the graph to ``path`` and the tensors apart from it, one by one, to its ``data_file``.

        Raises QuantkitError where the ONNX checker finds that they are no valid model.
        """
        message = self.graph.SerializeToString(deterministic=True)
        if not self.apart:
            _require_valid(message)
        path.write_bytes(message)
        if self.apart:
            with data_file(path).open("wb") as file:
                for tensor, offset in zip(self.apart, self.offsets, strict=True):
                    file.seek(offset)
                    file.write(tensor.tobytes())
            _require_valid(str(path))


def model_files(model: ir.Model, name: str, external_data: bool = False) -> ModelFiles:
    """The files of a model whose graph is called ``name``: two where one cannot hold it, or with ``external_data``.

    One holds a copy of the tensors until it is written, two none, and while they are written one of the largest.
    """
    model.ir_version = IR_VERSION
    model.producer_name = "quantkit"
    two = _with_tensors_apart(model, name)
    if external_data or two.file_bytes > LARGEST_FILE:
        return two
    return ModelFiles(ir.to_proto(model))


def size_on_disk(path: str | Path) -> int:
    """Bytes of a model's file, with those of its tensors where they lie beside it."""
    return sum(one.stat().st_size for one in (Path(path), data_file(path)) if one.exists())


def _with_tensors_apart(model: ir.Model, name: str) -> ModelFiles:
    """The files of a model with all initializers of a page and more in the data file, in the order of the graph."""
    model = model.clone()  # whose tensors are those of the original
    location, end = data_file(name).name, 0
    apart, offsets = list[ir.TensorProtocol](), list[int]()
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < PAGE:
                continue
            start, length = -(-end // PAGE) * PAGE, int(tensor.nbytes)
            end = start + length
            apart.append(tensor)
            offsets.append(start)
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor(
                location, start, length, tensor.dtype, shape=shape, name=str(value.name)
            )
    return ModelFiles(ir.to_proto(model), tuple(apart), tuple(offsets))


def _require_valid(model: bytes | str) -> None:
    """Raise QuantkitError where the ONNX checker refuses a message, or the file at a path."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise QuantkitError(
            "The model makes an ONNX file that is not valid; no file was written. Please report this: "
            f"{first_line(error)}"
        ) from error
