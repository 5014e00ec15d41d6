"""What a deployed file stores besides the layers' weights, counted before there is one.

A float32 weight of four bytes is not all: integer kernels want a zero point for every output channel and an INT32 bias
with a scale of its own, sites a scale, a zero point and the highest of their codes, and the exporter writes shapes and
scalars as constants. What cannot be told from the recording is allowed for by ``CONSTANTS``, so that a plan promises
no less than its file holds; both are compared in tests/backends/test_promised_bytes.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from quantkit.plan import Layer
from quantkit.program.integer_biases import WITH_BIAS, adds_integers, bias_calls
from quantkit.program.intercept import OpKey
from quantkit.program.ownership import Owned
from quantkit.program.program import Program
from quantkit.program.sites import Site

FLOAT_BYTES = 4  # of a number in the file, also where the user's model stores halves
INT32_BYTES = 4
HALF_BYTES = 2  # where what stays float is stored as float16
SITE_BYTES = 6  # a float32 scale, a zero point and the highest code of a byte each
SCALE_AND_ZERO = 5  # for every channel of codes that a float layer reads
TOKEN_BYTES = 12  # of a product of tokens: the highest code, the scalars around it
INDEX_BYTES = 8  # of a size in a shape
TRAINING = "num_batches_tracked"  # BatchNorm's counters, which no deployed model stores

# Bytes of shapes, axes and scalars that the exporter writes for a call. Element-wise ones have at most a scalar.
ELEMENTWISE = frozenset(
    "add sub mul div relu relu6 gelu sigmoid tanh silu hardtanh hardswish clamp dropout batch_norm layer_norm".split()
)
RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu".split())
CONSTANTS = {"element-wise": 4, "recurrent": 160, "other": 16}

CONVOLVING = (*WITH_BIAS, "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def floats_of(owned: Iterable[Owned], widths: Mapping[str, int]) -> int:
    """Bytes of what belongs to no layer: biases, norms, buffers, weights that no product reads. ``widths`` has the
    bytes of an element in the file of what is floating-point.
    """
    parts = [part for part in owned if not part.layer and not part.name.endswith(TRAINING)]
    return sum(widths[part.name] * part.elements if part.name in widths else part.bytes for part in parts)


def largest(owned: Iterable[Owned], share: float = 0.05, count: int = 3) -> dict[str, int]:
    """Of what belongs to no layer the largest parts that take at least a ``share`` of all bytes, with their bytes."""
    parts = list(owned)
    others = sorted((part for part in parts if not part.layer), key=lambda part: -part.bytes)
    least = share * sum(part.bytes for part in parts)
    return {part.name: part.bytes for part in others[:count] if part.bytes >= least}


def widened(layers: Mapping[str, Layer]) -> int:
    """What float layers take in the file beyond what the user's model stores: halves become float32."""
    return sum(max(0, FLOAT_BYTES * layer.weights - layer.float_bytes) for layer in layers.values() if layer.reason)


def of_sites(program: Program, layers: Mapping[str, Layer], sites: Sequence[Site], tokens: bool = False) -> int:
    """Bytes that the codes of ``sites`` bring with them, at the sites and in the layers around them. ``tokens``: codes
    are found row by row as the model runs, and only constants are stored.
    """
    readers = {name for site in sites for name in site.consumers}
    if tokens:
        return TOKEN_BYTES * (len(readers) + len(sites))
    coded = {place for site in sites for place in (site.place, *site.echoes)}
    integer = sum(_beside_codes(program, name) for name in readers) + _biases_again(program, sites, readers)
    float_kernels = [name for name, layer in layers.items() if layer.reason or layer.weight_only]
    around = sum(_dequantized(program, name, coded) for name in float_kernels)
    return SITE_BYTES * len(sites) + integer + around


def of_constants(program: Program) -> int:
    """The allowance for what the exporter writes for calls that are no layer's, and for recurrent ones."""
    ops = [(step.key.op, step.key in program.layer_of) for step in program.steps]
    kinds = [_kind(op) for op, of_layer in ops if not of_layer or op in RECURRENT]
    return sum(CONSTANTS[kind] for kind in kinds)


def of_layouts(program: Program, layers: Mapping[str, Layer]) -> int:
    """The shapes by which weights that lie otherwise than output channels first are laid out."""
    orders = [program.weights[name].order for name, layer in layers.items() if not layer.reason]
    return sum(2 * INDEX_BYTES * len(order) for order in orders if order is not None and len(order) > 2)


def _kind(op: str) -> str:
    if op in RECURRENT:
        return "recurrent"
    return "element-wise" if op.rstrip("_") in ELEMENTWISE else "other"


def _beside_codes(program: Program, name: str) -> int:
    """Zero points of a layer's output channels, and the scales of its INT32 bias, which may be beside a float one."""
    weight = program.weights[name]
    in_integers = [adds_integers(program, weight, call) for call in program.calls[name]]
    beside_float = any(in_integers) and not all(in_integers)
    return weight.shape[0] * (1 + FLOAT_BYTES * any(in_integers) + INT32_BYTES * beside_float)


def _biases_again(program: Program, sites: Sequence[Site], readers: Collection[str]) -> int:
    """The further INT32 biases, and their scales, of those that calls add on several grids."""
    grids = {(call.layer, call.site) for call in bias_calls(program, sites, readers)}
    stored = sum(program.weights[layer].shape[0] for layer, _ in grids)
    layers = [program.weights[layer] for layer in {layer for layer, _ in grids}]
    biases = {weight.bias: weight.shape[0] for weight in layers}  # counted once, each layer's scales too
    more_scales = stored - sum(weight.shape[0] for weight in layers)
    return INT32_BYTES * (stored - sum(biases.values())) + FLOAT_BYTES * more_scales


def _dequantized(program: Program, name: str, coded: Collection[OpKey]) -> int:
    """The scales that a float layer's input has, one for each channel, where it is made of codes."""
    weight = program.weights[name]
    reads = [program.producer.get(call.input) for call in program.calls.get(name, ())]
    if weight.kind not in (*CONVOLVING, "linear") or not any(place in coded for place in reads):
        return 0
    return SCALE_AND_ZERO * weight.groups * weight.shape[1]
