"""Residual streams: values of one width that additions join, what writes to them, and what reads them.

A stream can be multiplied by an orthogonal matrix as a whole where all that writes to it and all that reads it can
take the matrix up: linear layers, convolutions and embeddings in their weights, tables that are added (positions,
class tokens) as they are, and norms, which commute with it once their gains are in the layers behind them (Ashkboos et
al., "SliceGPT", arXiv 2401.15024). Streams are found by the identity of values; whatever stands between
must treat channels alike (``program.channels``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from quantkit.program.channels import channel_axes, keeps_shifts
from quantkit.program.convolutions import CONVOLUTIONS
from quantkit.program.intercept import OpKey
from quantkit.program.layers import LayerCall
from quantkit.program.program import Program, Step
from quantkit.transforms.norms import Normalization
from quantkit.transforms.prepare import Prepared

_SHOWN = 3  # reasons of one stream


@dataclass(frozen=True)
class ReadNorm:
    """A norm that reads a stream, and the layers behind it. ``folded``: these absorb its gain, which need not be where
    it is the same for all channels. ``shift_folded``: their biases absorb its shift.
    """

    norm: Normalization
    layers: tuple[str, ...]
    folded: bool = False
    shift_folded: bool = False


@dataclass(frozen=True)
class ResidualStream:
    """A stream of ``width`` channels that an orthogonal matrix can turn. ``writers`` are the layers whose outputs,
    ``readers`` those whose inputs are its channels, or several times as many; embeddings are ``readers``: their
    weights have the channels there. ``tables`` are the stored tensors that hold values of it, biases of writers among
    them, with the axis of the channels. ``name``: the call that made the first value that a norm reads.
    """

    name: str
    width: int
    norms: tuple[ReadNorm, ...]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    tables: tuple[tuple[str, int], ...]


def residual_streams(ready: Prepared, norms: Iterable[Normalization]) -> tuple[list[ResidualStream], dict[str, str]]:
    """The streams that ``norms`` read and that can be turned, in execution order, and for the others, by name, why
    not. What no addition joins is no stream.
    """
    found: list[ResidualStream] = []
    reasons: dict[str, str] = {}
    seen: set[Normalization] = set()
    inside = {key: norm for norm in norms for key in _steps_of(ready.program, norm)}
    for norm in norms:
        if norm in seen:
            continue
        walk = _Walk(ready, inside, norm)
        name = str(ready.program.producer.get(norm.input, norm.name))
        stream = walk.stream(name)
        seen |= {norm, *walk.norms}
        if stream is not None:
            found.append(stream)
        elif walk.joined:
            reasons[name] = "; ".join(list(walk.reasons)[:_SHOWN])
    return found, reasons


class _Walk:
    """All that one norm's input is joined with. ``axes`` holds its values, each with the axis of its channels,
    ``covered`` the calls of layers that read it or look it up, ``reasons`` what keeps the stream as it is.
    """

    def __init__(self, ready: Prepared, inside: dict[OpKey, Normalization], first: Normalization) -> None:
        self.ready, self.program, self.inside, self.width = ready, ready.program, inside, first.width
        self.axes: dict[int, int] = {}
        self.waiting: list[int] = []
        self.followed: set[OpKey] = set()
        self.norms: dict[Normalization, None] = {}
        self.writers: dict[str, None] = {}
        self.readers: dict[str, None] = {}
        self.tables: dict[str, int] = {}
        self.covered: set[OpKey] = set()
        self.reasons: dict[str, None] = {}
        self.joined = False
        self._join(first.input, len(self.program.shape[first.input]) - 1)

    def stream(self, name: str) -> ResidualStream | None:
        """The stream; None where ``reasons`` are in its way, or no addition joins anything."""
        while self.waiting:
            value = self.waiting.pop(0)
            self._go_back(value)
            for reader in self.program.consumers.get(value, ()):
                self._go_on(reader, value)
        norms = [] if self.reasons or not self.joined else self._read_norms()
        self._require_all_calls()
        self._require_own_gains(norms)
        self._require_closed_norms()
        if self.reasons or not self.joined:
            return None
        writers, readers, tables = tuple(self.writers), tuple(self.readers), tuple(self.tables.items())
        return ResidualStream(name, self.width, tuple(norms), writers, readers, tables)

    def _refuse(self, reason: str) -> None:
        self.reasons[reason] = None

    def _join(self, value: int, axis: int) -> None:
        if value not in self.axes:
            self.axes[value] = axis
            self.waiting.append(value)
            if value in self.program.outputs:
                self._refuse(f"the model returns {self.program.producer.get(value, value)}")
        elif self.axes[value] != axis:
            self._refuse(f"{self.program.producer.get(value, value)} has its channels along two axes")

    def _go_back(self, value: int) -> None:
        """What made a value."""
        program, name = self.program, self.program.names.get(value)
        if name is not None:
            self._table(name, self.axes[value])
        elif (maker := program.makers.get(value)) is None:
            zero = value in program.constants and not bool(program.constants[value].any())
            if not zero:
                self._refuse(f"{program.producer.get(value, 'a constant of the code')} is part of it")
        elif maker.key in program.layer_of:
            self._written_by(program.layer_of[maker.key], maker)
        elif maker.key in self.inside:
            self._refuse(f"the norm {self.inside[maker.key].name} writes to it")
        else:
            self._follow(maker)

    def _go_on(self, reader: Step, value: int) -> None:
        """What reads a value."""
        norm, layer = self.inside.get(reader.key), self.program.layer_of.get(reader.key)
        if norm is not None and norm.input == value:
            self.norms[norm] = None
            if self.axes[value] != len(self.program.shape[value]) - 1:
                self._refuse(f"{norm.name} reads other axes of it")
        elif layer is not None:
            self._read_by(layer, reader, value, self.axes[value])
        else:
            self._follow(reader)

    def _follow(self, step: Step) -> None:
        """Join all that a call reads or makes and that follows what is known."""
        if step.key in self.followed:
            return
        self.followed.add(step.key)
        known = {n: self.axes[n] for n in (*step.inputs, *step.outputs) if n in self.axes}
        found = channel_axes(self.program, step, known, self.width)
        if found is None:
            self._refuse(f"{step.key} does not treat its channels alike")
            return
        self.joined |= sum(n in self.program.varying for n in step.inputs if n in found) > 1
        for value, axis in found.items():
            self._join(value, axis)

    def _table(self, name: str, axis: int) -> None:
        """A stored tensor that is part of the stream, and of nothing else."""
        weights = self.ready.weights.layers.values()
        if any(name in (weight.parameter, *weight.sources) for weight in weights):
            self._refuse(f"{name} is also the weight of a layer")
        self.tables[name] = axis

    def _written_by(self, layer: str, step: Step) -> None:
        weight, program = self.ready.weights.layers[layer], self.program
        if step.key.op == "embedding":
            self._looked_up(layer)
            return
        if layer in self.writers:
            return
        self.writers[layer] = None
        if not weight.reads_rows or weight.groups != 1 or weight.shape[0] % self.width:
            self._refuse(f"{layer}, which writes to it, is a {weight.kind} that cannot take a matrix up")
            return
        for call in program.calls[layer]:
            self._join(call.output, _axis(call, program.shape[call.output]))
        reads_bias = any(len(program_step.inputs) > 2 for program_step in self._steps(layer))
        if reads_bias and weight.bias is None:
            self._refuse(f"{layer} adds a bias that is not its own")
        elif weight.bias is not None:
            self._table(weight.bias, 0)

    def _steps(self, layer: str) -> Iterator[Step]:
        keys = {call.key for call in self.program.calls[layer]}
        return (step for step in self.program.steps if step.key in keys)

    def _looked_up(self, layer: str) -> None:
        """An embedding, whose rows are values of the stream in all its calls."""
        self.readers[layer] = None
        for call in self.program.calls[layer]:
            if call.key.op == "embedding":
                self.covered.add(call.key)
                self._join(call.output, len(self.program.shape[call.output]) - 1)

    def _read_by(self, layer: str, step: Step, value: int, axis: int) -> None:
        """A layer that reads the stream, or what norms made of it."""
        weight = self.ready.weights.layers[layer]
        call = next((c for c in self.program.calls[layer] if c.key == step.key and c.input == value), None)
        tied = step.key.op == "linear" and weight.order is None and weight.kind == "embedding"
        if call is None or not (weight.reads_rows or tied) or weight.groups != 1:
            self._refuse(f"{step.key} reads it, which is no linear layer")
        elif axis != _axis(call, self.program.shape[value]) or weight.shape[1] % self.width:
            self._refuse(f"{layer} reads other axes of it")
        else:
            self.readers[layer] = None
            self.covered.add(step.key)

    def _read_norms(self) -> list[ReadNorm]:
        """The norms that read the stream, those with the same gain and shift as one, with the layers behind them."""
        weights = self.ready.weights
        groups: dict[tuple[str | None, str | None], list[Normalization]] = {}
        for norm in self.norms:
            groups.setdefault((norm.gain, norm.bias), []).append(norm)
        found = []
        for (gain, bias), norms in groups.items():
            behind = [self._behind(norm) for norm in norms]
            layers = dict.fromkeys(layer for layers, _ in behind for layer in layers)
            values = None if gain is None else weights.tensor(gain).detach().reshape(-1)
            folded = values is not None and bool((values != values[0]).any())
            shifts = bias is not None and all(kept for _, kept in behind)
            shifts = shifts and all(weights.layers[name].kind in ("linear", "matmul") for name in layers)
            shifts = shifts and all(weights.bias(name) is not None for name in layers)
            found.append(ReadNorm(norms[0], tuple(layers), folded, shifts))
        return found

    def _behind(self, norm: Normalization) -> tuple[list[str], bool]:
        """The layers that read what a norm makes, and whether a shift of the norm reaches them as it is."""
        program = self.program
        axes, waiting = {norm.output: len(program.shape[norm.output]) - 1}, [norm.output]
        layers: dict[str, None] = {}
        shifts = True
        while waiting:
            value = waiting.pop(0)
            if value in program.outputs:
                self._refuse(f"the model returns what the norm {norm.name} makes")
            for reader in program.consumers.get(value, ()):
                layer = program.layer_of.get(reader.key)
                if layer is not None:
                    self._read_by(layer, reader, value, axes[value])
                    layers[layer] = None
                    continue
                known = {value: axes[value]}
                found = None if reader.key in self.inside else channel_axes(program, reader, known, self.width)
                if found is None or not set(found) <= {value, *reader.outputs}:
                    self._refuse(f"{reader.key} reads what the norm {norm.name} makes, and is no linear layer")
                    continue
                shifts = shifts and keeps_shifts(program, reader, found)
                waiting += [made for made in reader.outputs if made not in axes]
                axes |= found
        return list(layers), shifts

    def _require_all_calls(self) -> None:
        """Refuse where a layer reads something else in another call, or a bias of the stream is read by others."""
        for layer in self.readers:
            if others := [call.key for call in self.program.calls[layer] if call.key not in self.covered]:
                self._refuse(f"{layer} also reads something else, in {others[0]}")
        for name in self.tables:
            value, layer_of = self.program.stored[name], self.program.layer_of
            steps = () if value in self.axes else self._readers(value)
            if others := [step.key for step in steps if layer_of.get(step.key) not in self.writers]:
                self._refuse(f"{name} is also read by {others[0]}")

    def _require_own_gains(self, norms: list[ReadNorm]) -> None:
        """Refuse where a layer would absorb a gain or shift that is not in all that it reads, or others use one."""
        direct = {self.program.layer_of.get(step.key) for value in self.axes for step in self._readers(value)}
        known: dict[str, tuple[str | None, str | None]] = {}
        for read in norms:
            for name in (read.norm.gain, read.norm.bias):
                steps = () if name is None else self._readers(self.program.stored[name])
                if others := [step.key for step in steps if self.inside.get(step.key) not in self.norms]:
                    self._refuse(f"{name} is also read by {others[0]}")
            absorbed = read.norm.gain if read.folded else None, read.norm.bias if read.shift_folded else None
            for layer in read.layers:
                looked_up = any(call.key.op == "embedding" for call in self.program.calls[layer])
                used_without = absorbed != (None, None) and (looked_up or layer in direct)
                if known.setdefault(layer, absorbed) != absorbed or used_without:
                    self._refuse(f"{layer} cannot absorb {read.norm.gain}, as it is used without it too")

    def _require_closed_norms(self) -> None:
        """Refuse where others read what a norm computes on its way."""
        for step in self.program.steps:
            norm = self.inside.get(step.key)
            if norm not in self.norms or norm is None:
                continue
            for made in {*step.outputs} & self.program.varying - {norm.output}:
                inner = [self.inside.get(reader.key) for reader in self._readers(made)]
                if any(other is None or other.input != norm.input for other in inner):
                    self._refuse(f"what the norm {norm.name} makes of it first is read by others")

    def _readers(self, value: int) -> tuple[Step, ...]:
        return self.program.consumers.get(value, ())


def _axis(call: LayerCall, shape: tuple[int, ...]) -> int:
    """The axis of a layer's channels in what it reads or makes."""
    if call.key.op in CONVOLUTIONS:
        return len(shape) - 1 - int(call.key.op[-2])
    return len(shape) - 1


def _steps_of(program: Program, norm: Normalization) -> set[OpKey]:
    """The calls that make up a norm, from what it reads to what it makes."""
    found: set[OpKey] = set()
    waiting = [norm.output]
    while waiting:
        value = waiting.pop()
        maker = program.makers.get(value)
        if value != norm.input and maker is not None and maker.key not in found:
            found.add(maker.key)
            waiting += maker.inputs
    return found
