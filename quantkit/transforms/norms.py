"""The norms of a model, whatever it calls them: a value divided by its root mean square or standard deviation along
the last axis, times a gain, plus a shift.

Calls of ``layer_norm`` and ``rms_norm`` are taken as they are. A norm that is written out is found by its shape in the
program: an inverse root of a mean of squares, multiplied into what was squared. What is found this way is computed
again from its formula on the example (Ba et al., arXiv 1607.06450; Zhang and Sennrich, arXiv 1910.07467), and refused
where the numbers differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.program.arguments import Ref
from quantkit.program.intercept import OpKey
from quantkit.program.layers import Weights
from quantkit.program.program import Program, Step
from quantkit.program.updates import plain_mode, restored
from quantkit.simulation.model import run_with
from quantkit.transforms.prepare import Prepared

RMS, LAYER = "rms", "layer"
CASTS = frozenset("to float double half bfloat16 type type_as contiguous clone detach".split())
CLOSE = 1e-3  # of the largest value: the program may compute in another type
_CALLS = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
}
_EPS = {"layer_norm": 1e-5, "rms_norm": None}


@dataclass(frozen=True)
class Normalization:
    """A norm over the last axis, of ``width`` channels, that reads the value ``input`` and makes ``output``.

    ``kind`` is "rms" or "layer", which subtracts the mean. Values are multiplied by ``offset`` + ``gain`` (``offset``
    is 1 where the model stores the gain's distance from one), then ``bias`` is added; both are names of parameters,
    None where there is none. ``eps`` is added to the mean square. ``name``: the module that owns the gain, else the
    scope that computes it.
    """

    name: str
    kind: str
    input: int
    output: int
    width: int
    eps: float
    gain: str | None = None
    offset: float = 0.0
    bias: str | None = None

    def of(self, x: Tensor, weights: Weights) -> Tensor:
        """What the norm makes of ``x``, (..., width), in float64."""
        x = x.double()
        centered = x - x.mean(-1, keepdim=True) if self.kind == LAYER else x
        made = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + self.eps)
        if self.gain is not None:
            made = made * (self.offset + weights.tensor(self.gain).detach().double().reshape(-1))
        return made if self.bias is None else made + weights.tensor(self.bias).detach().double().reshape(-1)


def normalizations(ready: Prepared) -> tuple[list[Normalization], dict[str, str]]:
    """The norms of a model in execution order, and for what only looked like one, by name, why it is none."""
    found, program = [], ready.program
    for step in program.steps:
        if not step.constant and (norm := _called(program, step) or _written_out(program, step)) is not None:
            found.append(_with_affine(program, norm))
    wrong = _differing(ready, found)
    return [norm for norm in found if norm not in wrong], {norm.name: why for norm, why in wrong.items()}


def through_casts(program: Program, value: int) -> int:
    """The value that this one is a cast or copy of."""
    while (step := program.makers.get(value)) is not None and step.key.op in CASTS and step.inputs:
        value = step.inputs[0]
    return value


def _called(program: Program, step: Step) -> Normalization | None:
    """The norm that a call of torch's own is, over the last axis."""
    if step.key.op not in _CALLS:
        return None
    given = dict(zip(_CALLS[step.key.op], step.args, strict=False)) | dict(step.kwargs)
    numbers = {name: x.number for name, x in given.items() if isinstance(x, Ref)}
    width = program.shape[numbers["input"]][-1]
    if len(given["normalized_shape"]) != 1:
        return None
    eps = given.get("eps", _EPS[step.key.op])
    eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
    parameters = {name: _parameter(program, numbers[name], width) for name in ("weight", "bias") if name in numbers}
    if None in parameters.values() or any(found and found[1] for found in parameters.values()):
        return None
    gain, bias = (found[0] if (found := parameters.get(name)) else None for name in ("weight", "bias"))
    kind = LAYER if step.key.op == "layer_norm" else RMS
    return Normalization(step.key.scope, kind, numbers["input"], step.outputs[0], width, eps, gain, 0.0, bias)


def _written_out(program: Program, step: Step) -> Normalization | None:
    """The norm that divides by the root that a step takes, without gain and shift."""
    inverse = step.key.op == "rsqrt" or (step.key.op == "pow" and -0.5 in step.arguments)
    if not (inverse or step.key.op == "sqrt") or len(step.outputs) != 1 or len(step.inputs) != 1:
        return None
    found = _mean_square(program, step.inputs[0])
    if found is None:
        return None
    squared, eps = found
    source = through_casts(program, squared)
    centered = _subtracted_from(program, source)
    root = through_casts(program, step.outputs[0])
    for reader in _readers(program, root):
        if reader.key.op != ("mul" if inverse else "div") or len(reader.inputs) != 2 or not reader.outputs:
            continue
        others = [through_casts(program, n) for n in reader.inputs if through_casts(program, n) != root]
        if len(others) == 1 and (others[0] == source or _alike(program, others[0], source)):
            kind, read = (RMS, source) if centered is None else (LAYER, centered)
            width = program.shape[read][-1]
            return Normalization(step.key.scope, kind, read, reader.outputs[0], width, eps)
    return None


def _mean_square(program: Program, value: int) -> tuple[int, float] | None:
    """What a value is the mean square of along the last axis, and the number that was added."""
    eps = 0.0
    while (step := program.makers.get(value)) is not None:
        numbers = [a for a in step.arguments if isinstance(a, float | int) and not isinstance(a, bool)]
        if step.key.op == "add" and len(step.inputs) == 1 and len(numbers) == 1:
            eps, value = eps + float(numbers[0]), step.inputs[0]
        elif step.key.op in CASTS and step.inputs:
            value = step.inputs[0]
        else:
            break
    if step is None or step.key.op != "mean" or len(step.inputs) != 1:
        return None
    shape = program.shape[step.inputs[0]]
    if program.shape[value] != (*shape[:-1], 1):
        return None
    square = program.makers.get(through_casts(program, step.inputs[0]))
    if square is None or len({through_casts(program, n) for n in square.inputs}) != 1:
        return None
    squares = square.key.op == "square" or (square.key.op == "mul" and len(square.inputs) == 2)
    if squares or (square.key.op == "pow" and 2 in square.arguments):
        return square.inputs[0], eps
    return None


def _subtracted_from(program: Program, value: int) -> int | None:
    """The value that this one is without its mean along the last axis; None where it is something else."""
    step = program.makers.get(value)
    if step is None or step.key.op != "sub" or len(step.inputs) != 2:
        return None
    source, mean = (through_casts(program, n) for n in step.inputs)
    maker = program.makers.get(mean)
    if maker is None or maker.key.op != "mean" or program.shape[mean][-1:] != (1,):
        return None
    return source if through_casts(program, maker.inputs[0]) == source else None


def _alike(program: Program, one: int, other: int) -> bool:
    """Whether two values were made by the same operation of the same values."""
    makers = program.makers.get(one), program.makers.get(other)
    if makers[0] is None or makers[1] is None:
        return False
    return makers[0].key.op == makers[1].key.op and makers[0].inputs == makers[1].inputs


def _with_affine(program: Program, norm: Normalization) -> Normalization:
    """With the gain that is multiplied into it next and the shift that is added to that, if there are any."""
    if norm.gain is None and norm.bias is None and (after := _next(program, norm, "mul")) is not None:
        output, (name, offset) = after
        norm = replace(norm, output=output, gain=name, offset=offset)
    if norm.bias is None and (after := _next(program, norm, "add")) is not None and not after[1][1]:
        norm = replace(norm, output=after[0], bias=after[1][0])
    owned = norm.gain or norm.bias
    return norm if owned is None else replace(norm, name=owned.rpartition(".")[0] or owned)


def _next(program: Program, norm: Normalization, op: str) -> tuple[int, tuple[str, float]] | None:
    """What the only reader of a norm's output makes of it and a parameter by ``op``; that parameter, and its
    offset.
    """
    readers = list(_readers(program, norm.output))
    if len(readers) != 1 or readers[0].key.op != op or len(readers[0].inputs) != 2 or norm.output in program.outputs:
        return None
    if any(a != 1 for a in readers[0].arguments):  # alpha is a multiplication
        return None
    others = [n for n in readers[0].inputs if through_casts(program, n) != norm.output]
    found = _parameter(program, others[0], norm.width) if len(others) == 1 else None
    return None if found is None else (readers[0].outputs[0], found)


def _readers(program: Program, value: int) -> Iterator[Step]:
    """The steps that read a value, as it is or cast."""
    for reader in program.consumers.get(value, ()):
        if reader.key.op in CASTS and reader.outputs:
            yield from _readers(program, reader.outputs[0])
        else:
            yield reader


def _parameter(program: Program, value: int, width: int) -> tuple[str, float] | None:
    """The parameter of one number a channel that a value is, as it is or cast, and what was added to it."""
    value, offset = through_casts(program, value), 0.0
    step = program.makers.get(value)
    if step is not None and step.key.op == "add" and len(step.inputs) == 1:
        numbers = [a for a in step.arguments if isinstance(a, float | int) and not isinstance(a, bool)]
        offset, value = float(sum(numbers)), through_casts(program, step.inputs[0])
    name = program.names.get(value)
    shape = program.shape.get(value, ())
    if name is None or shape[-1:] != (width,) or any(size != 1 for size in shape[:-1]):
        return None
    return name, offset


def _differing(ready: Prepared, norms: list[Normalization]) -> dict[Normalization, str]:
    """The norms that do not compute their formula on the example, and why."""
    program = ready.program
    wrong = dict.fromkeys(norms, "what it reads or makes is not seen when the model runs again")
    at_input: dict[OpKey, list[Normalization]] = {}
    at_output: dict[OpKey, list[Normalization]] = {}
    for norm in norms:
        places = program.producer.get(norm.input), program.producer.get(norm.output)
        if places[0] is not None and places[1] is not None:
            at_input.setdefault(places[0], []).append(norm)
            at_output.setdefault(places[1], []).append(norm)
    expected: dict[Normalization, Tensor] = {}

    def compare(place: OpKey, x: Tensor) -> Tensor:
        for norm in at_output.get(place, ()):
            wanted = expected.pop(norm, None)
            if wanted is None or wanted.shape != x.shape:
                continue
            error = float((x.double() - wanted).abs().max())
            if error <= CLOSE * float(wanted.abs().max()):
                del wrong[norm]
            else:
                wrong[norm] = f"it is no {norm.kind} norm: off by {error:.2g}"
        for norm in at_input.get(place, ()):
            expected[norm] = norm.of(x, ready.weights)
        return x

    if norms and ready.example is not None:
        with plain_mode(ready.model), restored(ready.model):
            run_with(ready.model, compare, *ready.example)
    return wrong
