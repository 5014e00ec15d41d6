"""Which factors on its channels a model lets through.

Every channel that a layer or a norm makes gets an unknown factor, and what the calls make of them tells which factors
are equal, inverse to each other, or one. What moves values moves labels, a product with something else keeps them, a
sum makes the factors of its operands equal, a product of two matrices makes those that it sums over inverse (queries
and keys), and a layer takes up those of what it reads in its columns. Whatever else is done to a value makes its
factors one. Rotations of pairs of channels need no rule of their own: they are sums of products.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quantkit.program.halves import VIEWS
from quantkit.program.intercept import OpKey
from quantkit.program.layers import LayerCall, LayerWeight
from quantkit.program.program import Program, Step
from quantkit.transforms.channel_labels import COLUMNS, GAIN, ROWS, Flow, Labels, ones
from quantkit.transforms.channel_rules import made_by
from quantkit.transforms.norms import CASTS, Normalization

_READS_ROWS = frozenset(("linear", "matmul", "mm", "addmm", "conv1d", "conv2d", "conv3d"))


def channel_flow(program: Program, norms: Sequence[Normalization]) -> Flow:
    """Follow the factors of all channels through a program, whose ``norms`` are known."""
    walk, last = _Walk(program, norms), program.last_reads(0, len(program.steps))
    for i, step in enumerate(program.steps):
        if step.constant:
            continue
        walk.follow(step)
        for number in {*step.inputs, *step.makes}:
            if last.get(number, i) <= i and number not in program.outputs:
                walk.labels.held.pop(number, None)
    for number in program.outputs:
        walk.labels.make_one(number, "the model returns it")
    return walk.labels.flow()


class _Walk:
    """The way of labels through a program."""

    def __init__(self, program: Program, norms: Sequence[Normalization]) -> None:
        self.program, self.labels = program, Labels(program)
        self.norms = {norm.output: norm for norm in norms if norm.gain is not None}
        self.makers = {program.makers[number].key for number in self.norms}
        self.calls: dict[OpKey, list[tuple[str, LayerCall]]] = {}
        for name, calls in program.calls.items():
            for call in calls:
                self.calls.setdefault(call.key, []).append((name, call))

    def follow(self, step: Step) -> None:
        """Note what a call makes of the labels that it reads."""
        labels = self.labels
        norm = next((self.norms[n] for n in step.outputs if n in self.norms), None)
        if norm is not None:
            made = self._normalized(step, norm)
        elif step.key in self.calls:
            made = self._layer(step)
        elif labels.held.keys().isdisjoint(step.reads):
            return
        elif (found := made_by(labels, step, self.program.constants)) is not None:
            made = found
        else:
            made = self._stopped(step, f"{step.key} reads it")
        for old, new in step.rewrites:
            if new not in step.makes:
                labels.make_one(old, f"{step.key} writes into it")
            labels.held.pop(old, None)
        for number, own in zip(step.makes, made, strict=False):
            if bool(own.any()):
                labels.held[number] = own

    def _stopped(self, step: Step, why: str) -> list[Tensor]:
        for number in step.reads:
            self.labels.make_one(number, why)
        return []

    def _normalized(self, step: Step, norm: Normalization) -> list[Tensor]:
        """What a norm reads has no factors left, what it makes has those of its gain."""
        self._stopped(step, f"{step.key} reads it")
        labels = self.labels
        vector = labels.vector(GAIN, norm.name, norm.width, norm)
        alone = all(self._read_by_norms(name) for name in (norm.gain, norm.bias) if name is not None)
        if not alone or vector.norm is None or (vector.norm.gain, vector.norm.bias) != (norm.gain, norm.bias):
            labels.equate(vector.labels, ones(()), f"the gain or shift of {norm.name} is read by other calls too")
        made = vector.labels.expand(self.program.shape[norm.output])
        return [made if number == norm.output else ones(self.program.shape[number]) for number in step.makes]

    def _read_by_norms(self, name: str) -> bool:
        """Whether norms alone read a parameter, as their gain or shift."""
        waiting = [self.program.stored[name]]
        while waiting:
            for reader in self.program.consumers.get(waiting.pop(), ()):
                if reader.key in self.makers or any(
                    s.key in self.makers for n in reader.outputs for s in self.program.consumers.get(n, ())
                ):
                    continue  # where a shift is added, the gain is multiplied in the call before
                if reader.key.op not in CASTS:
                    return False
                waiting += reader.outputs
        return True

    def _layer(self, step: Step) -> list[Tensor]:
        """A layer takes up the factors of what it reads in its columns; what it makes has those of its rows."""
        program, labels, found = self.program, self.labels, self.calls[step.key]
        name, call = found[0]
        weight = program.weights[name]
        why = f"{step.key} has several weights" if len(found) > 1 else self._why_fixed(name, weight)
        if why:
            return self._stopped(step, why)
        spatial = max(0, len(weight.shape) - 2)
        rows = labels.vector(ROWS, name, weight.shape[0])
        columns = labels.vector(COLUMNS, name, weight.shape[1] * weight.groups)
        read = labels.along(call.input, -1 - spatial, f"{step.key} mixes it")
        labels.equate(read, columns.labels, f"{step.key} reads what has no factors")
        for number in step.inputs:
            if number != call.input:
                labels.make_one(number, f"{step.key} reads it")
        if len(step.inputs) > 2 and (weight.bias is None or not self._own_bias(name, weight)):
            labels.equate(rows.labels, ones(()), f"the bias of {name} is computed, or read by other calls too")
        return [rows.labels.reshape(-1, *[1] * spatial).expand(program.shape[call.output])]

    def _why_fixed(self, name: str, weight: LayerWeight) -> str:
        """Why no factors can be put into a layer's weight; nothing where they can."""
        program, keys = self.program, {call.key for call in self.program.calls[name]}
        if weight.parameter is None:
            return f"the weight of {name} is computed"
        if not weight.reads_rows or any(key.op not in _READS_ROWS for key in keys):
            return f"{name} is a {weight.kind}, or its weight is used otherwise too"
        others = [n for n, w in program.weights.items() if w.parameter == weight.parameter and n != name]
        apart = weight.region is not None and all(program.weights[n].region is not None for n in others)
        if (others and not apart) or not self._read_by_layers(program.stored[weight.parameter]):
            return f"{weight.parameter} is read by other calls than those of {name}"
        return ""

    def _read_by_layers(self, value: int) -> bool:
        """Whether layers alone read a value, or a view of it."""
        readers = [reader for reader in self.program.consumers.get(value, ()) if reader.key not in self.calls]
        return all(r.key.op in VIEWS and all(map(self._read_by_layers, r.outputs)) for r in readers)

    def _own_bias(self, name: str, weight: LayerWeight) -> bool:
        keys = {call.key for call in self.program.calls[name]}
        return all(s.key in keys for s in self.program.consumers[self.program.stored[str(weight.bias)]])
