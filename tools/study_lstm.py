"""Is onnxruntime's DynamicQuantizeLSTM faster than the form of LSTM that quantkit writes, and what does it compute?

    python tools/study_lstm.py [--rounds 15]

Every LSTM is quantized at w8 and exported, which gives a file whose weights are expanded to float when it is loaded.
In two copies of it the node is DynamicQuantizeLSTM, which multiplies codes: once for the whole batch, once for one
sequence after the other, in a Scan. All run in turn on one thread. The first table has times, what the copies gain,
and the distance of outputs from the float network's (root mean square, relative).

The second has the distance of the kernel, on one and on two threads, from a twin in numpy that has ranges of the whole
batch, of half of it, or of single sequences, for the smallest and the largest LSTM. Weights and inputs are random.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import quantkit
from quantkit.backends.onnxruntime.node_times import clock
from quantkit.backends.onnxruntime.parity import relative_error
from quantkit.backends.onnxruntime.sessions import open_session

SIZES = ((64, 40, 1), (64, 256, 1), (128, 128, 1), (256, 40, 1), (256, 256, 1), (256, 256, 2))  # hidden, inputs, ways
STEPS, BATCHES = (50, 160), (1, 8)
GATES = (0, 3, 1, 2)  # torch has input, forget, cell, output; ONNX wants input, output, forget, cell
CODES = 255  # steps between the lowest and the highest code
DOMAIN = "com.microsoft"
WHOLE, ONE_BY_ONE = "whole batch", "one by one"


class Recurrent(nn.Module):
    """An LSTM alone: (batch, steps, inputs) in, all its outputs out."""

    def __init__(self, hidden: int, inputs: int, directions: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, bidirectional=directions == 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


@dataclass(frozen=True)
class Matrix:
    """Codes (outputs, inputs) of an LSTM's matrix, INT8, gates as ONNX orders them, and the scale of each output."""

    codes: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True)
class Direction:
    """One direction of an LSTM: what inputs and what the hidden state are multiplied by, and the sum of its biases."""

    inputs: Matrix
    hidden: Matrix
    bias: np.ndarray


def by_gates(values: np.ndarray) -> np.ndarray:
    """Rows in the order in which ONNX has gates."""
    return np.concatenate([np.split(values, len(GATES))[gate] for gate in GATES])


def directions_of(result: quantkit.Result) -> list[Direction]:
    simulated = result.simulated()
    found, lstm = [], simulated.model.lstm
    for ending in ("", "_reverse")[: 1 + lstm.bidirectional]:
        weights = [simulated.weights[f"lstm.weight_{which}_l0{ending}"] for which in ("ih", "hh")]
        matrices = [Matrix(by_gates(w.codes.numpy()), by_gates(w.scale.numpy()).reshape(-1)) for w in weights]
        biases = [getattr(lstm, f"bias_{which}_l0{ending}").detach().numpy() for which in ("ih", "hh")]
        found.append(Direction(*matrices, by_gates(biases[0] + biases[1])))
    return found


# The kernel in numpy


def codes_of(x: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Codes of a tensor around zero, and their scale: UINT8, from the least to the largest value, zero among them."""
    low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    scale = np.float32(1) if high == low else np.float32((high - low) / np.float32(CODES))
    zero = np.clip(np.rint(-low / scale), 0, CODES)
    return (np.clip(np.rint(x / scale) + zero, 0, CODES) - zero).astype(np.int32), scale


def product(x: np.ndarray, matrix: Matrix) -> np.ndarray:
    """An integer sum, times both scales."""
    codes, scale = codes_of(x)
    return (codes @ matrix.codes.T.astype(np.int32)).astype(np.float32) * (scale * matrix.scale)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.float32(1) / (np.float32(1) + np.exp(-x))


def run_direction(x: np.ndarray, own: Direction, together: int) -> np.ndarray:
    """All hidden states (batch, steps, hidden) of one direction. Inputs have one range for all steps of the batch, a
    hidden state has one for each step and ``together`` sequences.
    """
    batch, steps, inputs = x.shape
    given = product(x.reshape(-1, inputs), own.inputs).reshape(batch, steps, -1)
    hidden = cell = np.zeros((batch, own.hidden.codes.shape[1]), np.float32)
    made = []
    for step in range(steps):
        parts = [hidden[k : k + together] for k in range(0, batch, together)]
        sums = given[:, step] + np.concatenate([product(part, own.hidden) for part in parts]) + own.bias
        enter, leave, keep, new = np.split(sums, len(GATES), axis=1)
        cell = sigmoid(keep) * cell + sigmoid(enter) * np.tanh(new)
        hidden = sigmoid(leave) * np.tanh(cell)
        made.append(hidden)
    return np.stack(made, axis=1)


def twin(x: np.ndarray, layer: Sequence[Direction], together: int) -> np.ndarray:
    """What DynamicQuantizeLSTM makes of a batch, in numpy."""
    found = [run_direction(x, layer[0], together)]
    found += [run_direction(x[:, ::-1], own, together)[:, ::-1] for own in layer[1:]]
    return np.concatenate(found, axis=2)


def one_by_one(x: np.ndarray, layer: Sequence[Direction]) -> np.ndarray:
    return np.concatenate([twin(x[k : k + 1], layer, 1) for k in range(len(x))])


# The files


def with_kernel(model: onnx.ModelProto, layer: Sequence[Direction], scanned: bool) -> onnx.ModelProto:
    """A copy of an exported model with DynamicQuantizeLSTM for its LSTM, ``scanned``: for one sequence at a time."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    place, node = next((i, node) for i, node in enumerate(graph.node) if node.op_type == "LSTM")
    graph.node.remove(node)
    parts = [("w", [own.inputs for own in layer]), ("r", [own.hidden for own in layer])]
    for name, matrices in parts:
        scale = np.stack([one.scale for one in matrices])
        tensors = {
            name: np.stack([one.codes.T for one in matrices]),
            f"{name}_scale": scale,
            f"{name}_zero": np.zeros(scale.shape, np.int8),
        }
        graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in tensors.items())
    given = list(node.input) + [""] * (8 - len(node.input))
    read = [given[0], "w", "r", *given[3:], "w_scale", "w_zero", "r_scale", "r_zero"]
    kernel = helper.make_node("DynamicQuantizeLSTM", read, node.output, domain=DOMAIN)
    kernel.attribute.extend(one for one in node.attribute if one.name in ("hidden_size", "direction"))
    graph.node.insert(place, in_scan(graph, kernel) if scanned else kernel)
    copy.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return copy


def in_scan(graph: onnx.GraphProto, kernel: onnx.NodeProto) -> onnx.NodeProto:
    """A Scan over the batch, axis 1 of what a kernel reads and axis 2 of the first of what it makes."""
    graph.initializer.extend(numpy_helper.from_array(np.array([axis]), f"axis{axis}") for axis in (1, 2))
    read = [i for i in (0, 5, 6) if kernel.input[i]]  # the sequence and both states
    outer = [kernel.input[i] for i in read]
    nodes = [helper.make_node("Unsqueeze", [f"one{i}", "axis1"], [f"batch{i}"]) for i in read]
    for i in read:
        kernel.input[i] = f"batch{i}"
    made = [name for name in kernel.output if name]
    axes = [2, 1, 1][: len(made)]
    kept = list(made)
    for i, name in enumerate(kernel.output):
        kernel.output[i] = f"inner.{name}" if name else ""
    nodes += [kernel] + [
        helper.make_node("Squeeze", [f"inner.{name}", f"axis{axis}"], [f"own.{name}"])
        for name, axis in zip(made, axes, strict=True)
    ]
    body = helper.make_graph(
        nodes,
        "sequence",
        [helper.make_tensor_value_info(f"one{i}", TensorProto.FLOAT, None) for i in read],
        [helper.make_tensor_value_info(f"own.{name}", TensorProto.FLOAT, None) for name in made],
    )
    return helper.make_node(
        "Scan", outer, kept, body=body, num_scan_inputs=len(read),
        scan_input_axes=[1] * len(read), scan_output_axes=axes,
    )  # fmt: skip


@dataclass(frozen=True)
class Files:
    """The same LSTM in several files, by what runs it."""

    paths: Mapping[str, Path]
    layer: Sequence[Direction]
    floating: nn.Module

    def sessions(self, threads: int) -> dict[str, onnxruntime.InferenceSession]:
        return {name: open_session(path, threads) for name, path in self.paths.items()}


def files_of(size: tuple[int, int, int], steps: int, folder: Path) -> Files:
    """``size``: hidden, inputs, directions."""
    hidden, inputs, directions = size
    torch.manual_seed(0)
    model = Recurrent(hidden, inputs, directions).eval()
    example = torch.randn(2, steps, inputs)
    result = quantkit.quantize(model, "w8", [example], rounding="nearest", progress=False)
    paths = {name: folder / f"{name}.onnx" for name in ("w8", WHOLE, ONE_BY_ONE)}
    result.export_onnx(paths["w8"])
    layer, written = directions_of(result), onnx.load(paths["w8"])
    for name in (WHOLE, ONE_BY_ONE):
        onnx.save(with_kernel(written, layer, name == ONE_BY_ONE), paths[name])
    return Files(paths, layer, model)


def values(batch: int, steps: int, inputs: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, steps, inputs), dtype=np.float32)


# The tables


def times(sessions: Mapping[str, onnxruntime.InferenceSession], x: np.ndarray, rounds: int) -> dict[str, list[int]]:
    """Nanoseconds of runs in turn, behind one that does not count."""
    found: dict[str, list[int]] = {name: [] for name in sessions}
    now = clock(1)
    for round_ in range(rounds + 1):
        for name, session in sessions.items():
            start = now()
            session.run(None, {"x": x})
            if round_:
                found[name].append(now() - start)
    return found


def speeds(files: Files, size: tuple[int, int, int], steps: int, rounds: int) -> Iterator[str]:
    sessions = files.sessions(threads=1)
    for batch in BATCHES:
        x = values(batch, steps, size[1])
        with torch.no_grad():
            wanted = files.floating(torch.from_numpy(x)).numpy()
        taken = times(sessions, x, rounds)
        gains = [
            statistics.median(ours / own for ours, own in zip(taken["w8"], taken[name], strict=True))
            for name in (WHOLE, ONE_BY_ONE)
        ]
        errors = [relative_error(session.run(None, {"x": x})[0], wanted) for session in sessions.values()]
        cells = [*size, batch, steps, f"{statistics.median(taken['w8']) / 1e6:.2f}"]
        cells += [f"{gain:.2f}" for gain in gains] + [f"{error:.2%}" for error in errors]
        yield f"| {' | '.join(map(str, cells))} |"


def distances(files: Files, size: tuple[int, int, int], steps: int) -> Iterator[str]:
    batch = max(BATCHES)
    x = values(batch, steps, size[1])
    twins = {
        "of the batch": twin(x, files.layer, batch),
        "of half of it": twin(x, files.layer, batch // 2),
        "of a sequence": one_by_one(x, files.layer),
    }
    for threads in (1, 2):
        sessions = files.sessions(threads)
        for name in (WHOLE, ONE_BY_ONE):
            found = sessions[name].run(None, {"x": x})[0]
            cells = [*size, threads, name, *(f"{relative_error(found, wanted):.0e}" for wanted in twins.values())]
            yield f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="runs of each file, in turn (default 15)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    compared = []
    print("| hidden | inputs | directions | batch | steps | w8, ms | whole batch, times as fast | one by one "
          "| error w8 | error whole batch | error one by one |")  # fmt: skip
    print("|" + "---|" * 11)
    for size, steps in itertools.product(SIZES, STEPS):
        with TemporaryDirectory() as folder:
            files = files_of(size, steps, Path(folder))
            for line in speeds(files, size, steps, options.rounds):
                print(line, flush=True)
            if size in (SIZES[0], SIZES[-1]) and steps == STEPS[0]:
                compared += list(distances(files, size, steps))
    print(
        "\n| hidden | inputs | directions | threads | kernel | ranges of the batch | of half of it | of a sequence |"
    )
    print("|" + "---|" * 8)
    print("\n".join(compared))


if __name__ == "__main__":
    main()
