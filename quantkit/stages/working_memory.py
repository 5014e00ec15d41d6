"""What rounding and learning will hold, known before either begins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from quantkit.program.segments import between_layers
from quantkit.rounding.layer_inputs import positions_wanted
from quantkit.simulation.playback import CHUNK, SPILL_BYTES
from quantkit.stages.recording import Recording
from quantkit.transforms.prepare import Prepared

_FLOAT = 4  # bytes
_HESSIANS = 6  # a layer's: summed, sorted, damped, its inverse and factor in float64, the factor in float32
_DRAWING = 9  # copies of the samples: recorded, divided, and one draw while it is changed, mixed and laid out
_COPIES = 9  # of parameters: float, learned, computed with, their gradients, two of Adam, mean, present and best
_GRAPH = 3  # what a gradient keeps of a value: itself, quantized, and its own gradient


@dataclass(frozen=True)
class WorkingMemory:
    """Bytes beyond the model and its calibration inputs: ``values`` between layers, or that enter and leave one block,
    for all samples, ``drawing`` what is learned from (freed before learning, but a process seldom gives small pieces
    back), ``hessian`` of the largest layer, ``graph`` of one batch while it is differentiated, ``copies`` of the
    model's state.
    """

    values: int
    drawing: int
    hessian: int
    graph: int
    copies: int

    @property
    def peak_bytes(self) -> int:
        return self.values + self.drawing + max(self.hessian, self.graph) + self.copies

    def __str__(self) -> str:
        return (
            f"rounding and learning: memory at most about {self.peak_bytes / 1e6:,.0f} MB beyond the model and its "
            f"inputs, {self.values / 1e6:,.0f} MB of them values between layers and blocks; a single value beyond "
            f"{SPILL_BYTES / 1e6:,.0f} MB goes to disk"
        )


def working_memory(ready: Prepared, recording: Recording, samples: int, learned: int, by_blocks: int) -> WorkingMemory:
    """The working memory of rounding on ``samples`` and learning the network on ``learned`` ones and its blocks on
    ``by_blocks`` ones, held-back ones included (0 where nothing is learned so).

    Rounding holds what is read from a layer on. Learning holds what enters it in the quantized and in
    the float network, what leaves it in both, and what is wanted.
    """
    program = recording.program
    sizes = {number: _FLOAT * math.prod(shape[1:]) for number, shape in program.shape.items()}
    edges = [(_together(sizes, b.entering), _together(sizes, b.leaving)) for b in recording.blocks]
    enters, leaves = (max(side) for side in zip(*edges, strict=True))
    inputs = _together(sizes, program.inputs)
    held = max(_together(sizes, segment.entering) for segment in between_layers(program, ready.quantizable))
    values = max(samples * held, learned * inputs + by_blocks * (2 * enters + 3 * leaves))
    state = _FLOAT * sum(t.numel() for t in ready.model.state_dict().values())
    floating = sum(math.prod(program.shape[number][1:]) for number in program.producer)
    graph = _GRAPH * CHUNK * floating * _FLOAT
    hessian = max(_hessian(ready, name) for name in ready.quantizable)
    return WorkingMemory(values, _DRAWING * samples * inputs * (learned > 0), hessian, graph, _COPIES * state)


def _together(sizes: Mapping[int, int], numbers: Iterable[int]) -> int:
    return sum(sizes[number] for number in numbers)


def _hessian(ready: Prepared, layer: str) -> int:
    """Bytes that rounding a layer takes: its Hessian several times, and the inputs of one chunk as a matrix."""
    weight, width = ready.weights.layers[layer], ready.weights.inputs(layer)
    if not weight.reads_rows:
        return 0
    rows = CHUNK * positions_wanted(width)
    return weight.groups * (_HESSIANS * 8 * width**2 + 3 * _FLOAT * rows * width)
