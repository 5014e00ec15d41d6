"""Weights that multiply activations and are no layer that could be quantized: parameters that calls of other kinds
read, and tensors that are no parameters of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from quantkit.program.layers import LayerWeight
from quantkit.program.ownership import ELEMENTWISE, readers
from quantkit.program.products import PRODUCTS, is_weight
from quantkit.program.program import Program


def with_float_weights(program: Program, model: nn.Module) -> Program:
    """The program with a layer, of which no call is known, for every parameter that a call with activations reads and
    that no layer holds. What is only added or multiplied element by element is no weight.
    """
    held = {name for w in program.weights.values() for name in ([w.parameter] if w.parameter else w.sources)}
    claimed, modules = {program.stored[str(name)] for name in held}, dict(model.named_modules())
    found = {}
    for name, parameter in model.named_parameters():
        number = program.stored.get(name)
        if not is_weight(parameter) or number is None or number in claimed:
            continue
        others = (step for step in readers(program, number) if step.key.op not in ELEMENTWISE)
        if call := next((step for step in others if not program.varying.isdisjoint(step.inputs)), None):
            owner, _, attribute = name.rpartition(".")
            label = owner if attribute == "weight" and owner in modules else name
            found[label] = LayerWeight(call.key.op, tuple(parameter.shape), name)
    kinds = {name: weight.kind for name, weight in found.items()}
    return replace(program, weights={**found, **program.weights}, kinds={**kinds, **program.kinds})


def weights_outside(program: Program, model: nn.Module) -> list[str]:
    """What multiplies activations and is neither a parameter nor a buffer nor made by the model's code: its name where
    the model holds it, else the call that reads it, and its shape.
    """
    made = {number for step in program.steps for number in step.makes}
    names = {id(tensor): name for name, tensor in _attributes(model)}
    found: dict[int, str] = {}
    for step in program.steps:
        if step.key.op not in PRODUCTS or program.varying.isdisjoint(step.inputs):
            continue
        for number in step.inputs:
            tensor = program.constants.get(number)
            if tensor is None or number in made or not is_weight(tensor):
                continue
            found.setdefault(number, f"{names.get(id(tensor), f'what {step.key} reads')} {tuple(tensor.shape)}")
    return list(found.values())


def _attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors in plain attributes of a model's modules, those in lists and in modules there too, with names."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in ("_parameters", "_buffers", "_modules"):
                yield from _tensors(f"{name}.{attribute}" if name else attribute, value)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, nn.Module):
        yield from ((f"{name}.{own}", tensor) for own, tensor in value.named_parameters())
    elif isinstance(value, list | tuple | Mapping):
        keyed = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in keyed:
            yield from _tensors(f"{name}[{key!r}]", item)
