"""What parts of a model take while they are worked on, in bytes and in seconds, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from quantkit.budget import read_bytes
from quantkit.program.layers import LayerWeight
from quantkit.program.program import Program
from quantkit.progress import warn
from quantkit.ranges.statistics import hessian_bytes
from quantkit.rounding import rounding_of
from quantkit.rounding.blocks import HESSIAN_BYTES, blocks_of
from quantkit.rounding.gptq import STRETCH, slice_rows
from quantkit.rounding.layer_inputs import positions_wanted
from quantkit.rounding.request import RoundingOptions
from quantkit.sensitivity.kronecker import GRAPH_ROWS, factor_bytes, layers_with_factors
from quantkit.stages.machine import machine

FLOAT = 4  # bytes
_FACTORS = 6  # matrices while a Hessian is factored: the sum, sorted twice, its factor, the inverse and its factor
_FACTORED = 3  # of all blocks: the sum, its factor, and that in float32 as it is and turned
_PRODUCT = 2.5  # the sum, and a product in float32 and in float64
_TRIED = 5  # copies of the weights that GPTQ tries at once: left, codes, errors, squares, scales
_GRAPH = 2  # copies of what a gradient of the first order keeps: values, and gradients by some
_COUNTING = 7  # copies of a value while it is counted: shifted, scaled, bins of 64 bits
_RETURNED = 1 << 25  # bytes: what the C library gives back to the system as soon as it is free
_LEAST_HESSIAN, _SHRINKING = 1 << 16, 0.8  # bytes, and the share that is tried next
_SEARCHED = 8  # of all weights while a range is searched for them


def value_bytes(program: Program, samples: int) -> dict[int, int]:
    """Bytes of every value for so many samples; none of those that are the same for all: they are held once."""
    sizes = {n: FLOAT * math.prod(shape) * samples // program.size for n, shape in program.shape.items()}
    return {n: size * (n in program.varying or n in program.rows) for n, size in sizes.items()}


def resident_bytes(size: int) -> int:
    """What a value that comes and goes adds to the process: a small one leaves a gap that others often do not fit."""
    return size if size >= _RETURNED else 2 * size


def forward_bytes(program: Program, samples: int) -> int:
    """The most bytes that values take at one time in a forward of so many samples."""
    sizes = {number: resident_bytes(size) for number, size in value_bytes(program, samples).items()}
    last = program.last_reads(0, len(program.steps))
    live: dict[int, int] = {}
    most = 0
    for i, step in enumerate(program.steps):
        live |= {n: sizes.get(n, 0) for n in step.outputs}
        most = max(most, sum(live.values()))
        for number in [n for n in live if last.get(n, -1) <= i]:
            del live[number]
    return most


def compared_bytes(program: Program, samples: int) -> int:
    """The bytes of a forward of so many samples, and of its outputs while they are compared with others."""
    return forward_bytes(program, samples) + together(value_bytes(program, samples), program.outputs)


def largest_value(program: Program, samples: int) -> int:
    """The bytes of the largest value of so many samples."""
    return max(value_bytes(program, samples).values(), default=0)


def counting_bytes(program: Program, samples: int) -> int:
    """What it takes to count the values of sites while so many samples pass."""
    return forward_bytes(program, samples) + _COUNTING * resident_bytes(largest_value(program, samples))


def rows_read(program: Program, layer: str) -> int:
    """How many rows of a sample's inputs rounding looks at: all that a layer reads, or the positions it draws."""
    weight = program.weights[layer]
    axes = slice(2, None) if weight.kind.startswith("conv") else slice(1, -1)
    rows = max(math.prod(program.shape[call.output][axes]) for call in program.calls[layer])
    return min(rows, positions_wanted(_inputs(weight))) if weight.kind.startswith("conv") else rows


def collecting_bytes(program: Program, layer: str, samples: int, most: int) -> int:
    """What it takes beside the sum to add the inputs of so many samples to X^T X, which has at most ``most`` bytes."""
    weight = program.weights[layer]
    if not weight.inputs_seen:
        return 0
    blocks = blocks_of(weight, most)
    product = (_PRODUCT - 1) * hessian_bytes(weight, most) / blocks.count
    if not weight.kind.startswith("conv"):
        return int(product)
    read = max(math.prod(program.shape[call.input]) for call in program.calls[layer]) * samples // program.size
    columns = weight.groups * samples * rows_read(program, layer) * blocks.width
    return int(product) + FLOAT * (2 * read + columns)


def rounding_bytes(weight: LayerWeight, options: RoundingOptions) -> int:
    """What it takes to round a layer, X^T X included where it is looked at."""
    elements, most = math.prod(weight.shape), options.hessian_bytes
    if not (weight.inputs_seen and rounding_of(options.name).hessian):
        return FLOAT * _SEARCHED * elements
    blocks, hessian = blocks_of(weight, most), hessian_bytes(weight, most)
    factoring = _FACTORS * hessian if blocks.count == 1 else 2 * hessian + _FACTORS * hessian // blocks.count
    groups, _, inputs = _rows(weight)
    tried = FLOAT * _TRIED * len(STRETCH) * min(elements, slice_rows(groups, inputs) * groups * inputs)
    return max(factoring, _FACTORED * hessian + tried, hessian + FLOAT * _SEARCHED * elements)


def by_loss_bytes(program: Program, layers: Sequence[str], options: RoundingOptions) -> int:
    """What it takes to find the factors of the Hessian of the network's loss, where a rounding asks for them: two
    pairs of each layer, and the graph of a few samples.
    """
    if not rounding_of(options.name).fisher:
        return 0
    own = layers_with_factors(program, layers, HESSIAN_BYTES)
    factors = sum(factor_bytes(program.weights[name]) for name in own)
    rows = max((rows_read(program, name) for name in own), default=1)
    values = value_bytes(program, max(1, GRAPH_ROWS // max(1, rows)))
    return 2 * factors + _GRAPH * sum(resident_bytes(values[number]) for number in program.producer)


def rounding_seconds(program: Program, layer: str, formats: int, samples: int, options: RoundingOptions) -> float:
    """Seconds to round a layer to so many formats, from the inputs of so many samples where it looks at any."""
    weight, asked = program.weights[layer], rounding_of(options.name)
    speed = machine(asked.name if weight.inputs_seen or not asked.hessian else "nearest")
    blocks, rows = blocks_of(weight, options.hessian_bytes), 0
    if asked.hessian and weight.inputs_seen:
        rows = samples * rows_read(program, layer) * len(program.calls[layer])
    collecting = rows * weight.groups * blocks.count * blocks.width**2 * speed.product
    return collecting + speed.rounding(_rows(weight), blocks.width, formats)


def fitting(memory: str | None, options: RoundingOptions, peak: Callable[[RoundingOptions], int]) -> RoundingOptions:
    """The options with the largest X^T X whose ``peak`` is within ``memory``; a warning where none is so small."""
    if memory is None:
        return options
    most = read_bytes("memory", memory)
    while peak(options) > most and options.hessian_bytes > _LEAST_HESSIAN:
        options = replace(options, hessian_bytes=int(options.hessian_bytes * _SHRINKING))
    if (needed := peak(options)) > most:
        warn(f"memory={memory!r} cannot be kept: about {needed / 1e6:,.0f} MB are needed; fewer samples need less")
    return options


def together(sizes: Mapping[int, int], numbers: Iterable[int]) -> int:
    return sum(sizes[number] for number in numbers)


def _inputs(weight: LayerWeight) -> int:
    return math.prod(weight.shape[1:])


def _rows(weight: LayerWeight) -> tuple[int, int, int]:
    """The shape (groups, O, K) in which a weight is rounded."""
    return weight.groups, weight.shape[0] // weight.groups, _inputs(weight)
